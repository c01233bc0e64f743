"""Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): one ranking out of several.

A text's score is the sum over rankings of 1 / (constant + rank), rank from 1; a ranking that does
not hold it adds nothing.  Scores of different retrievers need not be comparable, since only ranks
count.  Knows ids alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fuse(rankings: Sequence[np.ndarray], k: int, constant: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """The k best texts of each query over all rankings.

    Args:
        rankings: at least one, ids int64 [Q, Ki] each, the best first and no text twice; -1 is none.
        constant: the larger, the less the first ranks count.

    Returns:
        scores float32 [Q, k], ids int64 [Q, k]: score descending, ties by rising id; where there are fewer than k
        texts, the rest is -inf and -1.
    """
    n_queries, width = len(rankings[0]), sum(ranking.shape[1] for ranking in rankings)
    scores = np.full((n_queries, k), -np.inf, np.float32)
    found = np.full((n_queries, k), -1, np.int64)
    if not n_queries or not width:
        return scores, found
    ids = np.concatenate(rankings, axis=1)  # [Q, W], W = sum of Ki
    gains = np.concatenate([1.0 / (constant + np.arange(1, ranking.shape[1] + 1)) for ranking in rankings])  # [W]
    order = np.argsort(ids, axis=1, kind="stable")  # [Q, W]: the same text side by side
    ids, gains = np.take_along_axis(ids, order, 1), gains[order]  # [Q, W] each

    first = np.ones(ids.shape, bool)  # where a text begins
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    sums = np.full(ids.shape, -np.inf, np.float32)
    sums[first] = np.add.reduceat(gains.ravel(), np.flatnonzero(first))
    sums[ids < 0] = -np.inf
    best = np.argsort(-sums, axis=1, kind="stable")[:, :k]  # ids rise, so ties are in order
    kept = np.take_along_axis(sums, best, 1)
    scores[:, : best.shape[1]] = kept
    found[:, : best.shape[1]] = np.where(kept > -np.inf, np.take_along_axis(ids, best, 1), -1)
    return scores, found
