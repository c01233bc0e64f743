"""Bad rows: collected and counted, then either raised as one error or set aside.

Knows nothing of what makes a row bad.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from retune.data.rows import Mistake
from retune.data.sources import Raw
from retune.data.store import Rows
from retune.runtime import UserError, log

SHOWN = 10


class BadRows:
    """Counts mistakes by kind and keeps the first ten, and the first of each kind, to show."""

    def __init__(self, action: Literal["error", "skip"] = "error", rejected: Rows | None = None) -> None:
        self._action, self._rejected = action, rejected
        self._kinds: Counter[str] = Counter()
        self._lines: list[str] = []
        self.count = 0

    def add(self, dataset: str, path: Path, raw: Raw, mistakes: Sequence[Mistake]) -> None:
        """Take note of a row with all its mistakes; with `skip` it goes to the table `rejected`."""
        self.count += 1
        source = f"{path}:{raw.line}"
        for mistake in mistakes:
            if len(self._lines) < SHOWN or mistake.kind not in self._kinds:
                self._lines.append(f"{source}: {mistake}")
            self._kinds[mistake.kind] += 1
        if self._action == "skip" and self._rejected is not None:
            row = raw.text()
            self._rejected.add((dataset, source, "; ".join(map(str, mistakes)), row), len(row))

    def summary(self) -> str:
        """How many of each kind, the most frequent first."""
        kinds = "; ".join(f"{count:,} × {kind}" for kind, count in self._kinds.most_common())
        total = sum(self._kinds.values())
        return f"in all {total:,} mistakes in {self.count:,} rows: {kinds}"

    def raise_or_log(self, hint: str = "") -> None:
        """With `skip`, log what was set aside.

        Raises:
            UserError: with `error`, where there was any bad row.
        """
        if not self.count:
            return
        shown = list(self._lines)
        if sum(self._kinds.values()) > 1:
            shown.append(self.summary())
        if self._action == "error":
            raise UserError("\n".join([*shown, *([hint] if hint else [])]))
        for line in shown:
            log.info("rejected: %s", line)
