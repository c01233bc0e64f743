"""How an embedding checkpoint is used: what the config asks for, else what the checkpoint says, else its family.

A contradiction between the config and the checkpoint is a warning.  Loads no weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from retune.config import EmbedderConfig
from retune.model import checkpoint, endings
from retune.model.backbone import load_tokenizer
from retune.model.checkpoint import Card
from retune.model.embedder_families import FAMILIES, detected
from retune.model.pooling import POOLINGS
from retune.runtime import UserError, log


def usage(settings: EmbedderConfig, folder: Path) -> Card:
    """The card of the checkpoint in `folder` with nothing but lengths and prompts left open.

    Raises:
        UserError: if neither the config nor the checkpoint nor its family says how token vectors become one.
    """
    card = checkpoint.card(folder)
    family = _chosen("family", settings.family, card.family, detected(folder))
    pooling = _chosen("pooling", settings.pooling, card.pooling, FAMILIES[family].pooling)
    if pooling is None:
        raise UserError(
            f"model {settings.model}: it does not say how it pools; set embedder.pooling ({', '.join(POOLINGS)})"
        )
    return replace(
        card, family=family, pooling=pooling,
        normalize=_chosen("normalize", settings.normalize, card.normalize, True),
        truncate_dim=_chosen("truncate_dim", settings.truncate_dim, card.truncate_dim, None),
        formats={kind: _format(settings, card, family, kind) for kind in ("query", "passage")},
    )  # fmt: skip


def embedding_tokenizer(folder: Path, settings: EmbedderConfig, card: Card) -> Any:
    """The checkpoint's tokenizer; a language model's ends texts where it should, and can pad.

    The checkpoint's own way holds; where nobody has made it an embedder yet, texts are ended.
    """
    tokenizer = load_tokenizer(folder, settings.trust_remote_code)
    if FAMILIES[card.family].causal:
        endings.fill_padding(tokenizer)
        if endings.asked_for(folder) or checkpoint.card(folder).pooling is None:
            endings.end_texts(tokenizer)
    return tokenizer


def _format(settings: EmbedderConfig, card: Card, family: str, kind: str) -> str:
    asked = getattr(settings, f"{kind}_instruction_format")
    own = FAMILIES[family].instruction_format if kind == "query" else "{}{}"
    return asked or card.formats.get(kind) or own


def _chosen(name: str, asked: Any, said: Any, default: Any) -> Any:
    if asked is not None and said is not None and asked != said:
        log.warning("embedder.%s: %r is asked for, but the checkpoint says %r", name, asked, said)
    return asked if asked is not None else said if said is not None else default
