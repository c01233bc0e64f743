"""Which queries make a batch: an order that is a function of seed and epoch alone.

Nothing here has a state to be saved, so a resumed run sees the batches of an uninterrupted one.
Batches may be homogeneous (of one dataset, one length bin, or both), each kind with a batch size
of its own, and free of duplicates.  Knows query numbers and labels; nothing of texts or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retune.runtime import log


@dataclass(frozen=True)
class Kind:
    """Queries that may share a batch: their rows int64 [n], and the batch size of one process."""

    rows: np.ndarray
    batch_size: int


@dataclass(frozen=True)
class Order:
    """What may share a batch.

    kinds: each batch is of one. marks: where given, no two queries of a global batch share a mark, as far as that can
    be: numbers int64 [n] for each query, see `marks`.
    """

    kinds: Sequence[Kind]
    marks: Sequence[np.ndarray] | None = None


def kinds(
    n_queries: int, batch_size: int, labels: Sequence[np.ndarray] = (), batch_sizes: np.ndarray | None = None,
    names: Sequence[str] = (), small_threshold: int = 0, drop_threshold: int = 0,
) -> list[Kind]:  # fmt: skip
    """The kinds of N queries, in the order of their first query.

    Args:
        batch_size: of a process, for kinds that have none of their own.
        labels: int64 [N] each, such as the number of a query's dataset; queries that agree in all are one kind.
        batch_sizes: a query's own, float [N], NaN for none; the smallest of a kind counts.
        names: for the log, by number of the first label.
        small_threshold: kinds with fewer queries are merged into one, which is
        drop_threshold: left out if it has still fewer.
    """
    own = np.full(n_queries, np.nan) if batch_sizes is None else batch_sizes
    if not labels:
        labels = [np.zeros(n_queries, np.int64)]
    _, first, number = np.unique(np.stack(labels, 1), axis=0, return_index=True, return_inverse=True)
    number = number.ravel()
    groups = [np.flatnonzero(number == kind) for kind in np.argsort(first, kind="stable")]
    small = [rows for rows in groups if len(rows) < small_threshold]
    if small:
        groups = [rows for rows in groups if len(rows) >= small_threshold]
        merged = np.sort(np.concatenate(small))
        if len(merged) < drop_threshold:
            log.warning(
                "train.drop_threshold: %d queries of %d small datasets are left out%s", len(merged), len(small),
                f" ({', '.join(dict.fromkeys(names[i] for i in labels[0][merged]))})" if len(names) else "",
            )  # fmt: skip
        else:
            groups.append(merged)
    return [Kind(rows, _size(own[rows], batch_size)) for rows in groups]


def marks(same_text: np.ndarray, n_positives: np.ndarray, starts: np.ndarray, text_ids: np.ndarray) -> list[np.ndarray]:
    """What each query must not share with another of its batch: its text, and its positives.

    Args:
        same_text: number of each query's text, int64 [N].
        n_positives, starts: int64 [N], of the candidates' `text_ids`, int64 [M], where positives come first.
    """
    after = int(same_text.max(initial=-1)) + 1
    return [
        np.append(after + np.unique(text_ids[start : start + number]), text)
        for text, number, start in zip(same_text, n_positives, starts, strict=True)
    ]


def _size(own: np.ndarray, otherwise: int) -> int:
    return otherwise if np.isnan(own).all() else int(np.nanmin(own))


class GroupSampler:
    """Batches of keys (epoch, query row) for one process out of `world`: a global batch is cut into slices, one each.

    A kind's last, incomplete global batch is shared out evenly (leaving out fewer queries than there
    are processes), or dropped with `drop_last`.
    """

    def __init__(self, order: Order, seed: int, drop_last: bool = False, rank: int = 0, world: int = 1) -> None:
        self.kinds, self.marks = order.kinds, order.marks
        self.seed, self.drop_last = seed, drop_last
        self.rank, self.world, self.epoch = rank, world, 0

    def __len__(self) -> int:
        return sum(len(self._sizes(len(kind.rows), kind.batch_size)) for kind in self.kinds)

    def _sizes(self, n_queries: int, batch_size: int) -> list[int]:
        """Sizes of one process's batches."""
        whole, rest = divmod(n_queries, batch_size * self.world)
        last = [rest // self.world] if rest >= self.world and not self.drop_last else []
        return [batch_size] * whole + last

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = []
        for number, kind in enumerate(self.kinds):
            rng = np.random.default_rng([self.seed, self.epoch, *([number] if len(self.kinds) > 1 else [])])
            order, start = kind.rows[rng.permutation(len(kind.rows))], 0
            sizes = self._sizes(len(order), kind.batch_size)
            if self.marks is not None:
                order = self._apart(order, [size * self.world for size in sizes])
            for size in sizes:
                batches.append(order[start : start + self.world * size])
                start += self.world * size
        if len(self.kinds) > 1:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(batches))
            batches = [batches[i] for i in order]
        for batch in batches:
            size = len(batch) // self.world
            yield [(self.epoch, int(query)) for query in batch[self.rank * size : (self.rank + 1) * size]]

    def _apart(self, order: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        """`order`, changed as little as it takes for batches of these sizes to be free of duplicates.

        A query that shares a mark with its batch waits for the next one.  Where those that wait at the end fit
        nowhere, they stand in the last batches all the same: an epoch keeps its number of steps.
        """
        coming, waiting, result = iter(order.tolist()), [], []
        for size in sizes:
            batch = _Batch(size, self.marks)
            still = [query for query in waiting if not batch.takes(query)]
            while not batch.full and (query := next(coming, None)) is not None:
                if not batch.takes(query):
                    still.append(query)
            missing = size - len(batch.queries)
            result += batch.queries + still[:missing]
            waiting = still[missing:]
        return np.array(result, np.int64)


class _Batch:
    """A batch that takes queries as long as there is room and nothing occurs twice."""

    def __init__(self, size: int, marks: Sequence[np.ndarray]) -> None:
        self.size, self.marks = size, marks
        self.queries: list[int] = []
        self.seen: set[int] = set()

    @property
    def full(self) -> bool:
        return len(self.queries) == self.size

    def takes(self, query: int) -> bool:
        own = self.marks[query].tolist()
        if self.full or not self.seen.isdisjoint(own):
            return False
        self.queries.append(query)
        self.seen.update(own)
        return True
