"""Which candidates become negatives: who may be taken, how similar, and who is drawn.

Pure functions of arrays.  A draw depends on the seed, the query and the text alone, never on
batches, shards or threads.  Knows nothing of tables, files or search.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from retune.config import MineConfig, bounds


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

    def allowed(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Which candidates `ids` int64 [Q, W] the queries `rows` int64 [Q] may take; -1 is none: bool [Q, W]."""
        codes = self.group[rows][:, None] * len(self.reads_as) + ids
        at = np.searchsorted(self.taken, codes)
        hit = np.append(self.taken, -1)[at] == codes
        return (ids >= 0) & (self.reads_as[ids] == ids) & ~self.closed[ids] & ~hit


def ceilings(lowest_positive: np.ndarray, settings: MineConfig) -> np.ndarray:
    """The similarity above which a candidate is too likely a positive: float32 [Q], inf where there is no limit.

    Args:
        lowest_positive: float32 [Q]; the similarity of the query's least similar positive, inf where it has none.
    """
    ceiling = np.full(len(lowest_positive), np.inf, np.float32)
    if settings.relative_margin is not None:
        known = np.isfinite(lowest_positive)
        ceiling[known] = lowest_positive[known] - settings.relative_margin * np.abs(lowest_positive[known])
    if settings.absolute_margin is not None:
        ceiling = np.minimum(ceiling, lowest_positive - settings.absolute_margin)
    if settings.similarity_range:
        ceiling = np.minimum(ceiling, bounds(settings.similarity_range)[1])
    return ceiling


def within(scores: np.ndarray, ceiling: np.ndarray, settings: MineConfig) -> np.ndarray:
    """Which scores float32 [Q, W] lie between `similarity_range` and the ceilings [Q], both included: bool [Q, W]."""
    floor = bounds(settings.similarity_range)[0] if settings.similarity_range else -np.inf
    return (scores >= np.float32(floor)) & (scores <= ceiling[:, None])


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


def choose(rows: np.ndarray, ids: np.ndarray, allowed: np.ndarray, settings: MineConfig, seed: int) -> np.ndarray:
    """The `negative_number` allowed candidates of lowest priority, fewer where there are fewer: bool [Q, W]."""
    priority = np.where(allowed, SAMPLING[settings.sampling](rows, ids, seed), np.inf)
    best = np.argsort(priority, axis=1, kind="stable")[:, : settings.negative_number]
    chosen = np.zeros(ids.shape, bool)
    np.put_along_axis(chosen, best, True, 1)
    return chosen & allowed


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
