"""How an embedding checkpoint is used: what the config asks for, else what the checkpoint says, else what is known of
it by name, else its family's way.

A contradiction is a warning.  Loads no weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from retune.config import EmbedderConfig
from retune.model import checkpoint, endings
from retune.model.checkpoint import Card
from retune.model.embedder_families import FAMILIES, family_of, known_as
from retune.model.known import Known
from retune.model.parts import Parts
from retune.model.pooling import POOLINGS
from retune.runtime import UserError, log


def usage(settings: EmbedderConfig, made_of: Parts) -> Card:
    """The card of the checkpoint with nothing but lengths left open.

    Raises:
        UserError: if it is said nowhere how token vectors become one.
    """
    card = checkpoint.card(made_of.checkpoint, made_of.config or made_of.weights)
    row = known_as(settings.model, made_of) or Known(normalize=None)
    _compare(settings.model, card, row)
    family = _chosen("family", settings.family, card.family, family_of(settings.model, made_of))
    pooling = _chosen("pooling", settings.pooling, card.pooling, row.pooling, FAMILIES[family].pooling)
    if pooling is None:
        raise UserError(
            f"model {settings.model}: it does not say how it pools; set embedder.pooling ({', '.join(POOLINGS)})"
        )
    prompts = {"query": row.query, "document": row.passage}
    return replace(
        card, family=family, pooling=pooling,
        normalize=_chosen("normalize", settings.normalize, card.normalize, row.normalize, True),
        truncate_dim=_chosen("truncate_dim", settings.truncate_dim, card.truncate_dim),
        prompts=card.prompts or {name: text for name, text in prompts.items() if text},
        max_length=card.max_length or row.max_length,
        formats={kind: _format(settings, card, row, family, kind) for kind in ("query", "passage")},
        suffix=_suffix(settings, card, family),
    )  # fmt: skip


def embedding_tokenizer(tokenizer: Any, folder: Path, made_of: Parts, card: Card) -> Any:
    """The tokenizer in `folder`, after this: a language model's ends texts where it should, and can pad.

    The checkpoint's own way holds; where nobody has made it an embedder yet, texts are ended.
    """
    if FAMILIES[card.family].causal:
        endings.fill_padding(tokenizer)
        if endings.asked_for(folder) or checkpoint.card(made_of.checkpoint).pooling is None:
            endings.end_texts(tokenizer)
    return tokenizer


def looks_both_ways(settings: EmbedderConfig, made_of: Parts) -> bool:
    """Whether the backbone must be told that its tokens see the whole text; a checkpoint's own code knows it."""
    row = known_as(settings.model, made_of)
    return row is not None and row.looks_both_ways and not settings.trust_remote_code


def _compare(model: str, card: Card, row: Known) -> None:
    for name in ("pooling", "normalize", "family"):
        said, expected = getattr(card, name), getattr(row, name)
        if row != Known(normalize=None) and None not in (said, expected) and said != expected:
            log.warning("model %s: it says %s %r, but is known for %r; its own word holds", model, name, said, expected)


def _format(settings: EmbedderConfig, card: Card, row: Known, family: str, kind: str) -> str:
    asked = getattr(settings, f"{kind}_instruction_format")
    own = (row.query_format or FAMILIES[family].instruction_format) if kind == "query" else "{}{}"
    return asked or card.formats.get(kind) or own


def _suffix(settings: EmbedderConfig, card: Card, family: str) -> str | None:
    if FAMILIES[family].suffix is None:
        return None
    return _chosen("icl_suffix_str", settings.icl_suffix_str, card.suffix, FAMILIES[family].suffix)


def _chosen(name: str, asked: Any, said: Any, *otherwise: Any) -> Any:
    """The first of them that is not None; a warning where what is asked for is not what is said."""
    said = next((value for value in (said, *otherwise[:-1]) if value is not None), None)
    if asked is not None and said is not None and asked != said:
        log.warning("embedder.%s: %r is asked for, but the checkpoint says %r", name, asked, said)
    return next((value for value in (asked, said, *otherwise[-1:]) if value is not None), None)
