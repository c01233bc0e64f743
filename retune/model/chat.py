"""Rerankers that say how they are used: chat templates, answer tokens, sentence-transformers' modules.

Qwen3-Reranker and its kin are causal language models that read a chat about a query and a document
and answer yes or no.  sentence-transformers saves such models as a Transformer with a LogitScore, and
the template of the pair with the tokenizer; that is read here as it stands.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from retune.config import RerankerConfig
from retune.model import frames
from retune.model.checkpoint import read_json
from retune.model.engine import Tokenizer
from retune.model.frames import PASSAGE_SLOT, QUERY_SLOT, Frame
from retune.runtime import UserError

# the template that the model card of Qwen3-Reranker gives (https://huggingface.co/Qwen/Qwen3-Reranker-0.6B)
QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
SUPPORTED = (["Transformer"], ["Transformer", "LogitScore"])


def modules(folder: Path) -> list[str]:
    """Kinds of sentence-transformers' modules that a checkpoint lists; [] where it lists none.

    Raises:
        UserError: for modules that score in a way not known here.
    """
    kinds = [module["type"].rsplit(".", 1)[-1] for module in read_json(folder / "modules.json") or []]
    scores = read_json(folder / "config_sentence_transformers.json").get("model_type") == "CrossEncoder"
    if (scores or "LogitScore" in kinds) and kinds and kinds not in SUPPORTED:
        raise UserError(f"model {folder}: a reranker of the modules {', '.join(kinds)} is not supported")
    return kinds


def activation(folder: Path) -> str | None:
    """What `CrossEncoder` applies to a checkpoint's scores, such as "Sigmoid"; None where the checkpoint is silent."""
    config = read_json(folder / "config.json")
    said = (
        read_json(folder / "config_sentence_transformers.json").get("activation_fn")
        or (config.get("sentence_transformers") or {}).get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
    )
    return said.rsplit(".", 1)[-1] if said else None


def token(tokenizer: Tokenizer, word: str) -> int:
    """The id of the first token of a word.

    Raises:
        UserError: if the tokenizer does not know it.
    """
    ids = frames.ids_of(tokenizer, word)
    if not len(ids) or ids[0] == tokenizer.hf.unk_token_id:
        raise UserError(f"reranker.family: its tokenizer has no token {word!r}, whose logit would be the score")
    return int(ids[0])


def answer_ids(tokenizer: Tokenizer, folder: Path) -> list[int]:
    """The token whose logit is the score and, where there is one, the token whose logit is taken off it."""
    for module in read_json(folder / "modules.json") or []:
        if module["type"].endswith(".LogitScore"):
            said = read_json(folder / module["path"] / "config.json")
            return [said[key] for key in ("true_token_id", "false_token_id") if said.get(key) is not None]
    return [token(tokenizer, "yes"), token(tokenizer, "no")]


def frame(tokenizer: Tokenizer, folder: Path, settings: RerankerConfig) -> Frame:
    """How a checkpoint reads a pair: through its chat template where it says so, else as its tokenizer joins two texts.

    sentence-transformers' prompt goes before the query, or is the system's message in a chat;
    `query_instruction` takes its place.

    Raises:
        UserError: for a template that does not show both texts, or an instruction with a format of its own in a chat.
    """
    said = read_json(folder / "sentence_bert_config.json")
    prompt = _default_prompt(folder)
    if "message" not in (said.get("modality_config") or {}):
        pair = frames.pair(tokenizer)
        return replace(pair, heads={"query": prompt}) if prompt and settings.query_instruction is None else pair
    options = (said.get("processing_kwargs") or {}).get("chat_template") or {}
    text = _rendered(tokenizer, _instruction(settings) or prompt, options)
    if text is None:
        raise UserError(f"model {folder}: its chat template does not show a query and a document")
    return frames.template(tokenizer, text)


def qwen3_frame(tokenizer: Tokenizer, settings: RerankerConfig) -> Frame:
    """The frame of Qwen3-Reranker; `query_instruction` is its <Instruct>."""
    instruction = _instruction(settings) or QWEN3_INSTRUCTION
    return frames.template(tokenizer, QWEN3.format(instruction=instruction, query=QUERY_SLOT, passage=PASSAGE_SLOT))


def _instruction(settings: RerankerConfig) -> str | None:
    if settings.query_instruction is not None and settings.query_instruction_format != "{}{}":
        raise UserError(
            "reranker.query_instruction_format: the chat template has a place for the instruction; leave it out"
        )
    return settings.query_instruction


def _default_prompt(folder: Path) -> str | None:
    """What sentence-transformers says to a checkpoint where the caller says nothing."""
    said = read_json(folder / "config_sentence_transformers.json")
    return (said.get("prompts") or {}).get(said.get("default_prompt_name")) or None


def _rendered(tokenizer: Tokenizer, instruction: str | None, options: dict[str, Any]) -> str | None:
    """The checkpoint's chat template around the two slots; None where it has none that shows both."""
    if not getattr(tokenizer.hf, "chat_template", None):
        return None
    options = {key: value for key, value in options.items() if key != "restore_suffix"}
    for wrap in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        chat = [{"role": "system", "content": wrap(instruction)}] if instruction else []
        chat += [{"role": "query", "content": wrap(QUERY_SLOT)}, {"role": "document", "content": wrap(PASSAGE_SLOT)}]
        try:
            text = str(tokenizer.hf.apply_chat_template(chat, tokenize=False, **options))
        except Exception:  # a template is a program; one for other chats may fail in any way
            continue
        if text.count(QUERY_SLOT) == 1 == text.count(PASSAGE_SLOT):
            return text
    return None
