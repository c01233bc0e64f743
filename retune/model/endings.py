"""How a tokenizer ends texts: with the end-of-text token where last-token pooling reads its vector, or not.

transformers 5 takes what tokenizer.json says and leaves tokenizer_config.json's `add_eos_token` aside, which
transformers 4 followed, and with it the trainers that made today's decoders.  Both are followed here.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers.processors import TemplateProcessing

from retune.model.checkpoint import read_json
from retune.runtime import UserError, log

PROBE = "a"


def adds(hf) -> tuple[bool, bool]:
    """Whether a tokenizer puts its beginning-of-text token before a text, and its end-of-text token after it."""
    ids = hf(PROBE)["input_ids"]
    return bool(ids) and ids[0] == hf.bos_token_id, bool(ids) and ids[-1] == hf.eos_token_id


def ended(hf) -> bool:
    """Whether a tokenizer puts any token of its own after a text; Qwen's has another end than the one it names."""
    whole, text = hf(PROBE)["input_ids"], hf(PROBE, add_special_tokens=False)["input_ids"]
    return bool(whole) and (not text or whole[-1] != text[-1])


def asked_for(folder: Path) -> bool:
    """Whether the checkpoint's tokenizer_config.json asks for the end-of-text token."""
    return bool(read_json(folder / "tokenizer_config.json").get("add_eos_token"))


def end_texts(hf) -> None:
    """Have the tokenizer end every text with its end-of-text token, in this process and where it is saved.

    Raises:
        UserError: if it has no such token, or is no fast tokenizer, or puts other tokens around a text.
    """
    if ended(hf):
        return
    begins, _ = adds(hf)
    fast, name = getattr(hf, "backend_tokenizer", None), getattr(hf, "name_or_path", "")
    if hf.eos_token_id is None:
        raise UserError(f"model {name}: its tokenizer has no end-of-text token")
    around = len(hf(PROBE)["input_ids"]) - len(hf(PROBE, add_special_tokens=False)["input_ids"])
    if fast is None or around != int(begins):
        raise UserError(f"model {name}: its tokenizer cannot be made to end texts with {hf.eos_token}")
    tokens = [(hf.eos_token, hf.eos_token_id)] + ([(hf.bos_token, hf.bos_token_id)] if begins else [])
    first = f"{hf.bos_token}:0 " if begins else ""
    second = f"{hf.bos_token}:1 " if begins else ""
    single = f"{first}$A:0 {hf.eos_token}:0"
    fast.post_processor = TemplateProcessing(
        single=single, pair=f"{single} {second}$B:1 {hf.eos_token}:1", special_tokens=tokens
    )
    log.info("every text is ended with %s", hf.eos_token)


def fill_padding(hf) -> None:
    """Give a language model's tokenizer a padding token, which no text's vector depends on, where it has none."""
    if hf.pad_token_id is None:
        hf.pad_token = hf.unk_token if hf.unk_token_id is not None else hf.eos_token
