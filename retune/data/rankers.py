"""Rankings of an embedded benchmark by M3's heads, in a table: (queries, texts, k, weights, nearest) → scores and ids.

    dense         search among vectors, by `nearest`
    sparse        a product of the tokens' weights
    colbert       late interaction, among the k that dense ranks first
    hybrid        the weighted sum of the heads, among the first k of dense and of sparse
    dense+sparse  the same without colbert

All return scores float32 [q, k] and ids int64 [q, k], best first, ties by rising id; -inf and -1 where there are fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from retune.data import headvectors
from retune.data.search import load, pair_scores

Ranking = tuple[np.ndarray, np.ndarray]
Nearest = Callable[[np.ndarray, int], Ranking]
"""(vectors of queries float32 [q, d], k) → the k texts of each whose vectors are nearest."""
Ranker = Callable[[Path, Sequence[Path], int, Mapping[str, float], Nearest], Ranking]


def dense(queries: Path, texts: Sequence[Path], k: int, weights: Mapping[str, float], nearest: Nearest) -> Ranking:
    return nearest(load(queries), k)


def sparse(queries: Path, texts: Sequence[Path], k: int, weights: Mapping[str, float], nearest: Nearest) -> Ranking:
    return headvectors.sparse_top_k(queries, texts, k)


def colbert(queries: Path, texts: Sequence[Path], k: int, weights: Mapping[str, float], nearest: Nearest) -> Ranking:
    _, ids = dense(queries, texts, k, weights, nearest)
    return _ranked(headvectors.colbert_pairs(queries, texts, *_pairs(ids)).reshape(ids.shape), ids, k)


def hybrid(queries: Path, texts: Sequence[Path], k: int, weights: Mapping[str, float], nearest: Nearest) -> Ranking:
    ids = np.concatenate([ranker(queries, texts, k, weights, nearest)[1] for ranker in _firsts(weights)], 1)  # [q, 2k]
    ids = np.sort(ids, 1)
    ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = -1  # in both
    rows, flat = _pairs(ids)
    total = np.zeros(len(flat), np.float64)
    for head, weight in weights.items():
        if weight:
            total += weight * PAIRS[head](queries, texts, rows, flat).astype(np.float64)
    total[flat < 0] = -np.inf
    return _ranked(total.reshape(ids.shape).astype(np.float32), ids, k)


def dense_sparse(
    queries: Path, texts: Sequence[Path], k: int, weights: Mapping[str, float], nearest: Nearest
) -> Ranking:
    return hybrid(queries, texts, k, {head: weight for head, weight in weights.items() if head != "colbert"}, nearest)


def _firsts(weights: Mapping[str, float]) -> list[Ranker]:
    """Who finds the candidates of the weighted sum."""
    found = [ranker for head, ranker in (("dense", dense), ("sparse", sparse)) if weights.get(head)]
    return found or [dense]


def _pairs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(query rows, text ids) of a matrix of ids [q, w], int64 [q * w] each."""
    return np.repeat(np.arange(len(ids)), ids.shape[1]), ids.ravel()


def _ranked(scores: np.ndarray, ids: np.ndarray, k: int) -> Ranking:
    """The k best of each row, score descending, then id."""
    order = np.lexsort((np.where(ids < 0, np.iinfo(np.int64).max, ids), -scores))[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


def _dense_pairs(queries: Path, texts: Sequence[Path], rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return pair_scores(load(queries), texts, rows, ids)


PAIRS = {"dense": _dense_pairs, "sparse": headvectors.sparse_pairs, "colbert": headvectors.colbert_pairs}
"""By head: (queries, texts, query rows, text ids) → scores of the pairs, float32 [n]."""
RANKERS: dict[str, Ranker] = {
    "dense": dense, "sparse": sparse, "colbert": colbert, "hybrid": hybrid, "dense+sparse": dense_sparse,
}  # fmt: skip
"""By name in `evaluate.heads`."""
