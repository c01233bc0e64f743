"""Checkpoints that transformers 4 reads as transformers 5 does: what FlagEmbedding and others still run on.

transformers 5 renamed a class of tokenizers and some keys of the configs.  Both names are written, the
old ones beside the new.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retune.model import endings
from retune.model.checkpoint import read_json

GENERIC, OLDER_GENERIC = "TokenizersBackend", "PreTrainedTokenizerFast"


def make_portable(folder: Path, hf=None, causal: bool = False) -> None:
    """Complete a checkpoint's config.json and tokenizer_config.json.

    Args:
        hf: its tokenizer. causal: whether it is a language model, whose tokenizer classes follow `add_eos_token`.
    """
    _change(folder / "tokenizer_config.json", _tokenizer_keys(read_json(folder / "tokenizer_config.json"), hf, causal))
    _change(folder / "config.json", _rope_keys(read_json(folder / "config.json")))


def _tokenizer_keys(config: dict[str, Any], hf, causal: bool) -> dict[str, Any]:
    changed = dict(config)
    if changed.get("tokenizer_class") == GENERIC:
        changed["tokenizer_class"] = OLDER_GENERIC
    if isinstance(changed.get("extra_special_tokens"), list):  # a mapping by name, until transformers 5
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    if causal:
        changed |= dict(zip(("add_bos_token", "add_eos_token"), endings.adds(hf), strict=True))
    return changed


def _rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:  # none, or some for each kind of layer
        return config
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    more = {"rope_theta": rope["rope_theta"]}
    if scaling.get("rope_type", "default") != "default":
        more["rope_scaling"] = scaling
    return more | config


def _change(file: Path, config: dict[str, Any]) -> None:
    if config and config != read_json(file):
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
