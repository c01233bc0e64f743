"""What mining did, in exact counts: the table `mining`.

Every candidate in a query's rank window is counted once: as removed by the first filter that
refuses it, or as chosen.  So `removed` of all filters and `chosen` add up to `seen`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from retune import tables

# measure, name: what the value counts
QUERIES = "queries"  # mined_for; short: with fewer candidates than asked for; still_short: also after the fill; dropped
CANDIDATES = "candidates"  # seen: in the windows; chosen: in the table of pairs
REMOVED = "removed"  # by filter, in the order in which they are applied
RANDOM = "random"  # filled: random texts, where candidates were too few
SUSPECTED = "suspected"  # compared: chosen whose query has a positive; similar: of these, within SUSPECT_MARGIN of it
TEACHER = "teacher"  # scored: distinct pairs; compared, above: chosen, and those scored above the lowest positive

NOT_DRAWN, REFUSED, QUERY_DROPPED = "not_drawn", "teacher", "query_dropped"  # filters that no similarity decides


class Funnel:
    """Counts, by measure and name, in the order in which they were first met.

    Args:
        filters: names, in the order in which they are applied.
    """

    def __init__(self, filters: Sequence[str] = ()) -> None:
        names = [(CANDIDATES, "seen"), *((REMOVED, name) for name in filters), (CANDIDATES, "chosen")]
        self._counts: dict[tuple[str, str], int] = dict.fromkeys(names, 0)

    def add(self, measure: str, name: str, count: int) -> None:
        key = measure, name
        self._counts[key] = self._counts.get(key, 0) + int(count)

    def get(self, measure: str, name: str) -> int:
        return self._counts.get((measure, name), 0)

    def filter(self, left: np.ndarray, name: str, passes: np.ndarray) -> np.ndarray:
        """What a filter leaves of the candidates `left`, bool [Q, W], which `passes` lets pass; it is counted."""
        kept = left & passes
        self.add(REMOVED, name, left.sum() - kept.sum())
        return kept

    def said(self) -> str:
        """One line for the log."""
        removed = ", ".join(f"{n:,} {name}" for (measure, name), n in self._counts.items() if measure == REMOVED and n)
        seen, chosen = self.get(CANDIDATES, "seen"), self.get(CANDIDATES, "chosen")
        return f"{seen:,} candidates, {chosen:,} chosen" + (f"; removed: {removed}" if removed else "")

    def write(self, path: Path, meta: Mapping[str, str]) -> None:
        keys = list(self._counts)
        columns = {
            "measure": [measure for measure, _ in keys], "name": [name for _, name in keys],
            "value": [float(self._counts[key]) for key in keys],
        }  # fmt: skip
        tables.write(path, "mining", columns, meta)
