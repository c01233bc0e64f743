"""Scorers of M3's heads: texts by head (see `representations`) → a query-major matrix [Q, P].

sparse is the inner product of the texts' vocabularies, each token at its largest weight in the text.
colbert is late interaction (ColBERT, arXiv:2004.12832): the mean over a query's tokens of the largest
inner product with a token of the passage; the first token, which is dense's, is left out on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from retune.objective.representations import Texts
from retune.objective.scores import score_matrix

BLOCK = 1 << 24  # products of token pairs that are held at a time


def dense(queries: Texts, passages: Texts) -> Tensor:
    return score_matrix(queries["dense"], passages["dense"])


def sparse(queries: Texts, passages: Texts) -> Tensor:
    """[Q, P]; only tokens that occur in a query of the batch have a column, so the vocabulary never counts."""
    columns = torch.unique(queries["ids"])  # [C], rising
    left, right = _bag(queries, columns), _bag(passages, columns)  # [Q, C], [P, C]
    return left @ right.T


def _bag(texts: Texts, columns: Tensor) -> Tensor:
    """The largest weight of each of the tokens `columns` int64 [C] in each text, 0 where it is not there: [n, C]."""
    n, ids, weights = len(texts["lengths"]), texts["ids"], texts["sparse"]
    rows = torch.arange(n, device=ids.device).repeat_interleave(texts["lengths"])  # [T]
    at = torch.searchsorted(columns, ids).clamp(max=len(columns) - 1)  # [T]
    known = columns[at] == ids
    cells = (rows * len(columns) + at)[known]
    empty = weights.new_zeros(n * len(columns))
    # weights are at least 0, so that the zeros they start from are never in their way
    return empty.scatter_reduce(0, cells, weights[known], "amax").view(n, -1)


def colbert(queries: Texts, passages: Texts) -> Tensor:
    """[Q, P]; a text whose only token is its first has nothing to compare and scores 0."""
    counts = queries["lengths"] - 1  # [Q]
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)  # [t]
    parts = []
    for vectors, real in _padded(passages, len(rows)):  # [b, L, c], [b, L]
        products = queries["colbert"] @ vectors.flatten(0, 1).T  # [t, b * L]
        products = products.view(len(rows), *real.shape).masked_fill(~real, -torch.inf)
        best = products.max(-1).values  # [t, b]
        best = torch.where(real.any(1), best, 0)
        total = best.new_zeros(len(counts), best.shape[1]).index_add(0, rows, best)  # [Q, b]
        parts.append(total / counts.clamp(min=1)[:, None])
    return torch.cat(parts, 1)


def _padded(texts: Texts, query_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of texts, their vectors padded: [b, L, c], and which are real: bool [b, L]."""
    lengths = texts["lengths"] - 1  # [P]
    rows = max(1, BLOCK // max(1, query_tokens * int(lengths.max())))
    ends = lengths.cumsum(0)
    for first in range(0, len(lengths), rows):
        own = lengths[first : first + rows]
        start = int(ends[first] - lengths[first])
        real = torch.arange(max(1, int(own.max())), device=own.device) < own[:, None]  # [b, L]
        vectors = texts["colbert"][start : start + int(own.sum())]
        padded = vectors.new_zeros(*real.shape, vectors.shape[-1])
        yield padded.masked_scatter(real[..., None], vectors), real


Scorer = Callable[[Texts, Texts], Tensor]
SCORERS: dict[str, Scorer] = {"dense": dense, "sparse": sparse, "colbert": colbert}
"""By head."""
