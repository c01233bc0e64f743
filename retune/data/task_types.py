"""What a row's `type` means to training: names that data made for FlagEmbedding carry.

    only_1neg               one negative of the group counts
    symmetric_class         as many negatives as the query has, at most: none is repeated to fill a group
    symmetric_sts           passages are read as queries are: with the query's instruction
    symmetric_clustering    likewise
    any other               no more than its name

None of them takes in-batch negatives away: there, as here, that is `in_batch_negatives: false`, or the
suffix `no_in_batch_neg` in the name of a file or folder.  Where classes or clusters keep them, a warning
says so.  Where batches are of one dataset, one with "symmetric" in its type gets half the batch, if it has
no size of its own.  Knows neither tokens nor models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retune.runtime import log

ONE_NEGATIVE, CLASSES = "only_1neg", "symmetric_class"
READ_AS_QUERIES = ("symmetric_sts", "symmetric_clustering")
SHARED_BY_MANY = ("symmetric_class", "symmetric_clustering")
"""Types whose queries have right answers among each other's passages."""


def group_sizes(types: Sequence[str | None], n_negatives: np.ndarray, group_size: int) -> np.ndarray:
    """Passages that count in each query's group: int64 [N], at most `group_size`.

    Args:
        types: each query's type, [N]. n_negatives: the negatives that it has, int64 [N].
    """
    names = np.array(types, dtype=object)
    sizes = np.full(len(names), group_size)
    sizes[names == ONE_NEGATIVE] = 2
    sizes = np.where(names == CLASSES, n_negatives + 1, sizes)
    return np.minimum(sizes, group_size).astype(np.int64)


def read_as_queries(types: Sequence[str | None]) -> np.ndarray:
    """Queries whose passages get the query's instruction: bool [N]."""
    return np.isin(np.array(types, dtype=object).astype(str), READ_AS_QUERIES)


def batch_sizes(types: Sequence[str | None], own: np.ndarray, batch_size: int) -> np.ndarray:
    """What each query's dataset asks for, float64 [N]: NaN for nothing, so that `batch_size` counts.

    Args:
        own: what is asked for by name, float64 [N]; NaN for nothing.
    """
    symmetric = np.array(["symmetric" in (name or "") for name in types], dtype=bool)
    return np.where(np.isnan(own) & symmetric, max(1, batch_size // 2), own)


def warn_of_shared_answers(types: Sequence[str | None], sources: Sequence[str], in_batch: np.ndarray) -> None:
    """Warn of classes and clusters that take in-batch negatives: some of those are right answers.

    Args:
        sources: `file:line` of each query. in_batch: whether other queries' passages are its negatives, bool [N].
    """
    rows = [row for row, kind in enumerate(types) if in_batch[row] and kind in SHARED_BY_MANY]
    if rows:
        files = dict.fromkeys(sources[row].rsplit(":", 1)[0] for row in rows)
        log.warning(
            "%d queries of type %s take in-batch negatives, some of them of their own class; set "
            "in_batch_negatives: false for the dataset of %s", len(rows), " or ".join(SHARED_BY_MANY), ", ".join(files),
        )  # fmt: skip


def warn_of_repeats(n_negatives: np.ndarray, sizes: np.ndarray) -> None:
    """Warn of groups that take more negatives than the query has: those are repeated."""
    few = n_negatives < sizes - 1
    if few.any():
        log.warning(
            "train.train_group_size: %d of %d queries have fewer negatives (%.1f on average) than their group takes "
            "(%d), so theirs are repeated; lower it, or mine more", few.sum(), len(few), n_negatives[few].mean(),
            sizes[few].max() - 1,
        )  # fmt: skip
