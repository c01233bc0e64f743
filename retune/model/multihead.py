"""Texts through all heads of an M3 embedder: vectors, bags of weighted tokens, vectors of tokens.

What has a different size for every text lies flat, as tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from retune.model import device, engine, fused
from retune.model.engine import Tokens, ragged
from retune.model.pooling import POOLINGS, of_flat
from retune.runtime import UserError, log

if TYPE_CHECKING:
    from retune.model.embedder import Embedder

HEADS = ("dense", "sparse", "colbert")


@dataclass(frozen=True)
class Flat:
    """Values of many texts: those of text i are `values[offsets[i]:offsets[i + 1]]`; offsets int64 [n + 1]."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: np.ndarray) -> Flat:
        """The texts at `rows`, in that order."""
        where, offsets = ragged(self.offsets[:-1][rows], np.diff(self.offsets)[rows])
        return Flat(self.values[where], offsets)


@dataclass(frozen=True)
class Encoded:
    """n texts by head; None for a head that was not asked for."""

    dense: np.ndarray
    """float32 [n, d]"""
    tokens: Flat | None = None
    """Ids of the tokens that weigh something, each once, rising: int32."""
    weights: Flat | None = None
    """Their weights, the largest of each: float32."""
    colbert: Flat | None = None
    """A vector for each token but the first: float32 [., c]."""


def check(embedder: Embedder, heads: Sequence[str]) -> None:
    """Raise a UserError for heads that the model does not have: drawn anew they would give random scores."""
    if set(heads) - {"dense"} and embedder.heads is None:
        raise UserError(
            f"model {embedder.settings.model}: it has no sparse and colbert heads (heads.safetensors, or "
            "sparse_linear.pt and colbert_linear.pt); new ones would give random scores, so only training may draw "
            "them: train.unified_finetuning with embedder.family m3"
        )


def represent(
    embedder: Embedder, input_ids: Tensor, attention_mask: Tensor | None = None, heads: Sequence[str] = HEADS
) -> dict[str, Tensor]:
    """What the heads make of a padded batch [B, L], its T tokens flat, one text after the other.

    Returns:
        dense float32 [B, dim], lengths int64 [B], ids int64 [T], sparse float32 [T], colbert float32 [T - B, C].
    """
    pooling = embedder.card.pooling
    if (flat := embedder.shortcut.of(embedder.backbone, attention_mask)) is not None:
        batch = fused.Flat.of(input_ids, attention_mask)
        states = flat(batch)  # [T, D]
        pooled = of_flat(pooling, states, batch)
    else:
        hidden = embedder.backbone(
            input_ids=input_ids, attention_mask=attention_mask, **embedder.family.options
        ).last_hidden_state  # [B, L, D]
        pooled = POOLINGS[pooling](hidden, attention_mask)
        states = hidden.flatten(0, 1) if attention_mask is None else hidden[attention_mask.bool()]  # [T, D]
    every = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    ids, lengths = input_ids[every.bool()], every.sum(1)  # [T], [B]
    found = {"dense": embedder.finished(pooled), "lengths": lengths, "ids": ids}
    if "sparse" in heads:
        found["sparse"] = embedder.heads.sparse(states, ids)
    if "colbert" in heads:
        later = torch.ones_like(ids, dtype=torch.bool)
        later[lengths.cumsum(0) - lengths] = False
        found["colbert"] = embedder.heads.colbert(states[later], embedder.card.normalize)
    return found


def encode(
    embedder: Embedder, tokens: Tokens, heads: Sequence[str] = HEADS, max_tokens: int | None = None, bar=None
) -> Encoded:
    """What the heads make of tokenised texts, in their order.

    Raises:
        UserError: for heads that the model does not have.
    """
    check(embedder, heads)
    order, parts = [], {"dense": [np.empty((0, embedder.dim), np.float32)]}
    with embedder.shortcut.settled(embedder.backbone):
        for rows, out in engine.stream(
            partial(represent, embedder, heads=heads), tokens, pad_id=embedder.pad_token_id,
            max_tokens=embedder.budget(max_tokens),
            multiple=device.length_multiple(embedder.dtype, embedder.device), device=embedder.device, bar=bar,
        ):  # fmt: skip
            order.append(rows)
            for name, values in out.items():
                parts.setdefault(name, []).append(values.cpu().numpy())
    done = {name: np.concatenate(values) for name, values in parts.items()}
    back = np.argsort(np.concatenate(order)) if order else np.empty(0, np.int64)
    lengths = tokens.lengths[np.concatenate(order)] if order else np.empty(0, np.int64)  # as they came
    dense = done["dense"][back]
    bags = _bags(done, lengths, back) if "sparse" in heads and order else (None, None)
    vectors = Flat(done["colbert"], _offsets(lengths - 1)).take(back) if "colbert" in heads and order else None
    return Encoded(dense, *bags, vectors)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _bags(done: dict[str, np.ndarray], lengths: np.ndarray, back: np.ndarray) -> tuple[Flat, Flat]:
    """Each text's tokens once, with the largest weight."""
    place = np.argsort(back)  # as the texts came → their order
    rows, ids, weights = place.repeat(lengths), done["ids"], done["sparse"]
    if len(ids) and not (weights > 0).any():
        log.warning("the sparse head weighs every token 0: it has collapsed, and finds nothing")
    counted = weights > 0
    rows, ids, weights = rows[counted], ids[counted], weights[counted]
    order = np.lexsort((-weights, ids, rows))
    rows, ids, weights = rows[order], ids[order], weights[order]
    first = np.ones(len(rows), bool)
    first[1:] = (rows[1:] != rows[:-1]) | (ids[1:] != ids[:-1])
    offsets = _offsets(np.bincount(rows[first], minlength=len(lengths)))
    return Flat(ids[first].astype(np.int32), offsets), Flat(weights[first], offsets)
