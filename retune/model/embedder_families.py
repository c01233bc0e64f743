"""The families of embedders: for each what holds where neither the config nor the checkpoint says otherwise.

| family | backbone | pooling | known by |
|---|---|---|---|
| encoder | sees the whole text | the checkpoint must say | bge-*-v1.5, e5, gte, all-MiniLM, ModernBERT |
| m3 | sees the whole text; heads dense, sparse and colbert | first token | bge-m3; its two heads |
| decoder | sees what is before a token | last token | bge-multilingual-gemma2, e5-mistral, Qwen3-Embedding |
| icl | a decoder that reads solved examples before a query | last token | bge-en-icl |

A language model that was never made an embedder says nothing of pooling; its texts are ended with the
end-of-text token, at which the last token's vector is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retune.config import EmbedderConfig
from retune.model import heads
from retune.model.checkpoint import card, read_json
from retune.model.known import Known, known
from retune.model.parts import Parts


@dataclass(frozen=True)
class Family:
    """A row of the table: `pooling` and `instruction_format` where nothing else says; `causal` whether the backbone
    is a language model; `options` of the backbone's forward; `suffix` after every query, of an in-context model.
    """

    pooling: str | None = None
    instruction_format: str = "{}{}"
    causal: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    suffix: str | None = None


NO_CACHE = {"use_cache": False}  # keys and values of earlier tokens are for generating
FAMILIES: dict[str, Family] = {
    "encoder": Family(),
    "m3": Family("cls"),
    "decoder": Family("last_token", causal=True, options=NO_CACHE),
    "icl": Family("last_token", "<instruct>{}\n<query>{}", True, NO_CACHE, "\n<response>"),
}


def detected(folder: Path, config: Path | None = None) -> str:
    """The family that a checkpoint's files tell: M3 by its heads, language models are decoders, others encoders.

    Args:
        config: folder of another `config.json` than its own.
    """
    if heads.there(folder):
        return "m3"
    return "decoder" if _is_causal(read_json((config or folder) / "config.json")) else "encoder"


def known_as(model: str, made_of: Parts) -> Known | None:
    """What is known of a checkpoint by its reference, or by that of its base where it is adapters alone."""
    return known(model) or (known(made_of.weights) if made_of.weights != made_of.checkpoint else None)


def family_of(model: str, made_of: Parts) -> str:
    """The family of a checkpoint that does not say it: by its name where that is known, else by its files."""
    row = known_as(model, made_of)
    return row.family if row else detected(made_of.weights, made_of.config)


def family_chosen(settings: EmbedderConfig, made_of: Parts) -> str:
    """The family that the config names, else the checkpoint's card, else its name or its files."""
    return settings.family or card(made_of.checkpoint).family or family_of(settings.model, made_of)


def pools(settings: EmbedderConfig, made_of: Parts) -> bool:
    """Whether it is said anywhere, in the config or of the checkpoint, how it pools."""
    said, row = card(made_of.checkpoint), known_as(settings.model, made_of)
    if settings.pooling or said.pooling or (row and row.pooling):
        return True
    return FAMILIES[family_chosen(settings, made_of)].pooling is not None


def _is_causal(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = config.get("model_type")
    if kind in CAUSAL or kind in MASKED:  # BERT and its kin are in both
        return kind not in MASKED
    return any(name.endswith("ForCausalLM") for name in config.get("architectures") or ())
