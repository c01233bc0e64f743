"""Loading transformers backbones, strictly: weights that a checkpoint lacks are an error, not noise."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError

from retune.runtime import UserError

VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json")
CHARACTERS = 256  # a tokenizer without a file knows at least as many, where it is one of characters or bytes
BROKEN = (ValueError, OSError, RuntimeError, KeyError, SafetensorError)  # what transformers raises for a bad folder


def _quiet() -> None:
    """Keep transformers' loading bars and advice out of a job's log."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pickle.*")


def load_backbone(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool = False, config: Path | None = None, flash: bool = False,
    both_ways: bool = False,
) -> torch.nn.Module:  # fmt: skip
    """The encoder or decoder in `folder`, without a head.  A pooler which the checkpoint does not hold is left out.

    Args:
        config: folder of another `config.json` than its own.
        flash: whether attention is computed by the package flash-attn.
        both_ways: whether a language model's tokens see the whole text, as those of an encoder.

    Raises:
        UserError: if weights are missing, the architecture is not known or has both an encoder and a decoder, or
            flash-attn is asked for and cannot be used.
    """
    from transformers import AutoConfig, AutoModel

    _quiet()
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    options |= {"attn_implementation": _flash()} if flash else {}
    try:
        if config is not None:
            options["config"] = AutoConfig.from_pretrained(config, trust_remote_code=trust_remote_code)
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    except BROKEN as error:
        raise UserError(f"model {folder}: {str(error).strip().splitlines()[0]}") from None
    if model.config.is_encoder_decoder:
        raise UserError(f"model {folder}: an encoder-decoder ({model.config.model_type}), not an encoder")
    missing = sorted(info["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        model.pooler = None
    elif missing:
        raise UserError(f"model {folder}: {len(missing)} weights are missing, such as {missing[0]}")
    if both_ways:
        model.config.is_causal = False
    if getattr(model.config, "is_causal", True) is False:
        for module in model.modules():  # an attention layer without a mask asks itself
            if isinstance(getattr(module, "is_causal", None), bool):
                module.is_causal = False
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, torch.nn.Module):
        pooler.requires_grad_(False)  # no vector goes through it
    return model


def _flash() -> str:
    """transformers' name of flash-attn's attention.

    Raises:
        UserError: where it cannot be used, and why.
    """
    if not torch.cuda.is_available():
        raise UserError("embedder.use_flash_attn: flash-attn runs on GPUs alone, and none is here; leave it out")
    if importlib.util.find_spec("flash_attn") is None:
        raise UserError("embedder.use_flash_attn: flash-attn is not installed; pip install flash-attn, or leave it out")
    return "flash_attention_2"


def set_dropout(model: torch.nn.Module, share: float) -> None:
    """Drop `share` of the activations during training; what the checkpoint's config says stays as it is."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
        for name, value in vars(module).items():  # attention layers keep theirs as a number
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, share)


def load_classifier(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool = False, fresh: bool = False
) -> torch.nn.Module:
    """The sequence classifier with one logit in `folder`; with `fresh`, an encoder under a new head.

    Raises:
        UserError: if the checkpoint has no one-logit head (unless `fresh`), or weights are missing.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    _quiet()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if fresh:
            config.num_labels = 1
        elif config.num_labels != 1:
            raise UserError(f"model {folder}: it has {config.num_labels} labels; a reranker has one logit: is it one?")
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except BROKEN as error:
        raise UserError(f"model {folder}: {str(error).strip().splitlines()[0]}") from None
    missing = sorted(info["missing_keys"])
    head = [key for key in missing if key.split(".")[0] in ("classifier", "score") or ".pooler." in f".{key}"]
    if [key for key in missing if key not in head] or (missing and not fresh):
        raise UserError(f"model {folder}: {len(missing)} weights are missing, such as {missing[0]}: is it a reranker?")
    return model


def load_tokenizer(folder: Path, trust_remote_code: bool = False):
    """The checkpoint's tokenizer.

    Raises:
        UserError: if there is none.  Where its files are missing, transformers makes one that knows special tokens
            alone, to which every word is unknown.
    """
    from transformers import AutoTokenizer

    _quiet()
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the package tokenizers has no kinds of its own
        raise UserError(f"model {folder}: no tokenizer: {str(error).strip().splitlines()[0]}") from None
    if len(found) < CHARACTERS and not any(next(Path(folder).glob(name), None) for name in VOCABULARIES):
        raise UserError(
            f"model {folder}: no tokenizer: expected its files (tokenizer.json, tokenizer_config.json) beside the "
            "weights; copy them from the model that it was made from"
        )
    return found


def load_whole(kind, folder: Path, **options) -> torch.nn.Module:
    """`kind.from_pretrained(folder, **options)`, for any of transformers' model classes.

    Raises:
        UserError: if it cannot be loaded, or weights are missing.
    """
    _quiet()
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (*BROKEN, ImportError, AttributeError, TypeError) as error:  # the last three are what outdated code raises
        raise UserError(f"model {folder}: {str(error).strip().splitlines()[0]}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"model {folder}: {len(missing)} weights are missing, such as {missing[0]}")
    return model
