"""Which candidates become negatives: who may be taken, how similar, and who is drawn.

Pure functions of arrays.  A draw depends on the seed, the query and the text alone, never on
batches, shards or threads.  Knows nothing of tables, files, search or rerankers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from retune.config import MineConfig, bounds

EXCLUSIONS = ("own", "copies", "set_aside")  # filters that decide by who a text is, in order
SUSPECT_MARGIN = 0.05  # a negative within this relative margin of its query's lowest positive may be a positive

# {filter: (lowest, highest similarity that it lets pass)}, float32 [Q] each, both included
Limits = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Exclusions:
    """What may never be a negative.

    Attributes:
        group: int64 [Q]; queries that read the same (normalised) share a number.
        reads_as: int64 [T]; the first text that reads the same, which alone may be taken for all of them.
        taken: int64, sorted; codes `group * T + text` of positives and of the queries' own texts.
        closed: bool [T]; texts that belong to set-aside queries only.
    """

    group: np.ndarray
    reads_as: np.ndarray
    taken: np.ndarray
    closed: np.ndarray

    def filters(self, rows: np.ndarray, ids: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(name, which candidates `ids` int64 [Q, W] the queries `rows` int64 [Q] may take: bool [Q, W]), in order.

        An id of -1 is no candidate; what is said of it means nothing.
        """
        reading = self.reads_as[ids]  # [Q, W]
        codes = self.group[rows][:, None] * len(self.reads_as) + reading
        at = np.searchsorted(self.taken, codes)
        passes = np.append(self.taken, -1)[at] != codes, reading == ids, ~self.closed[reading]
        yield from zip(EXCLUSIONS, passes, strict=True)

    def allowed(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Which candidates all the filters let pass; -1 is none: bool [Q, W]."""
        found = ids >= 0
        for _, passes in self.filters(rows, ids):
            found &= passes
        return found


def lowest(query_ids: np.ndarray, values: np.ndarray, n_queries: int) -> np.ndarray:
    """The lowest value of each query's pairs, inf where it has none: float32 [n_queries]."""
    found = np.full(n_queries, np.inf, np.float32)
    np.minimum.at(found, query_ids, values)
    return found


def below(positive, margin: float):
    """The similarity that lies by the relative `margin` below a positive's, also where that is negative.

    Of numpy arrays or polars expressions; (1 - margin) × positive for the similarities above 0 that NV-Retriever
    (arXiv:2407.15831) writes it for.
    """
    return positive - margin * abs(positive)


def limits(lowest_positive: np.ndarray, settings: MineConfig) -> Limits:
    """What the filters on similarity let pass, in the order in which they are applied.

    Args:
        lowest_positive: float32 [Q]; the similarity of the query's least similar positive, inf where it has none,
            which leaves it without a limit.
    """
    no_floor = np.full(len(lowest_positive), -np.inf, np.float32)
    found = {}
    if settings.similarity_range:
        floor, ceiling = bounds(settings.similarity_range)
        found["similarity_range"] = np.full_like(no_floor, floor), np.full_like(no_floor, ceiling)
    if settings.relative_margin is not None:
        ceiling = lowest_positive.copy()
        known = np.isfinite(lowest_positive)
        ceiling[known] = below(lowest_positive[known], settings.relative_margin)
        found["relative_margin"] = no_floor, ceiling
    if settings.absolute_margin is not None:
        found["absolute_margin"] = no_floor, lowest_positive - np.float32(settings.absolute_margin)
    return found


def inside(found: Limits, rows: np.ndarray, similarity: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(filter, which of `similarity` float32 [n, W] of the queries `rows` int64 [n] it lets pass: bool [n, W])."""
    for name, (floor, ceiling) in found.items():
        yield name, (similarity >= floor[rows][:, None]) & (similarity <= ceiling[rows][:, None])


def ceilings(found: Limits, n: int) -> np.ndarray:
    """The similarity above which a candidate is too likely a positive: float32 [n], inf where there is no limit."""
    return np.minimum.reduce([np.full(n, np.inf, np.float32), *(ceiling for _, ceiling in found.values())])


def _mix(*parts: np.ndarray | int) -> np.ndarray:
    """A well-mixed uint64 of integers (splitmix64 after each): random, yet a function of its arguments alone."""
    mixed = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            mixed = (mixed ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def _by_chance(rows: np.ndarray, ids: np.ndarray, seed: int) -> np.ndarray:
    return _mix(seed, rows[:, None], ids).astype(np.float64)


def _by_rank(rows: np.ndarray, ids: np.ndarray, seed: int) -> np.ndarray:
    return np.broadcast_to(np.arange(ids.shape[1], dtype=np.float64), ids.shape)


# (rows [Q], ids [Q, W], seed) → priorities [Q, W], the lowest first
SAMPLING: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {"random": _by_chance, "top": _by_rank}


def choose(
    allowed: np.ndarray, priority: np.ndarray, number: int,
    judge: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """For each query the `number` allowed candidates of lowest priority that the judge lets pass.

    The judge is asked lazily: each round brings it, of every query that still lacks some, as many of the next
    candidates as it lacks.  So it judges about number × (1 + share refused) a query.

    Args:
        allowed: bool [Q, W].
        priority: float64 [Q, W].
        judge: positions in `allowed` (rows int64 [n], columns int64 [n]) → which pass, bool [n]; None: all do.

    Returns:
        chosen bool [Q, W], fewer than `number` a query where there are no more; refused bool [Q, W].
    """
    chosen, refused = np.zeros(allowed.shape, bool), np.zeros(allowed.shape, bool)
    order = np.argsort(np.where(allowed, priority, np.inf), axis=1, kind="stable")  # [Q, W], the allowed first
    available, looked_at = allowed.sum(1), np.zeros(len(allowed), np.int64)  # [Q] each
    while True:
        wanted = np.minimum(number - chosen.sum(1), available - looked_at)  # [Q]
        at = np.repeat(np.arange(len(allowed)), wanted)
        if not len(at):
            return chosen, refused
        place = np.arange(len(at)) - np.repeat(np.cumsum(wanted) - wanted, wanted) + looked_at[at]
        column = order[at, place]
        passed = np.ones(len(at), bool) if judge is None else judge(at, column)
        chosen[at[passed], column[passed]] = True
        refused[at[~passed], column[~passed]] = True
        looked_at += wanted


def draw(
    rng: np.random.Generator, pool: np.ndarray, number: int, allowed: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """`number` distinct ids of `pool` at random, of those which `allowed` (ids → bool) lets pass.

    Fewer only where there are no more: if a handful of draws does not do, all of the pool is tried.
    """
    if not len(pool):
        return pool
    tries = pool[rng.integers(0, len(pool), 4 * number + 16)]
    tries = tries[np.sort(np.unique(tries, return_index=True)[1])]  # distinct, in the order drawn
    tries = tries[allowed(tries)]
    if len(tries) < number:
        tries = rng.permutation(pool)
        tries = tries[allowed(tries)]
    return tries[:number]
