"""gate: metrics → a table of gains and losses against base, and a failure where one is too small or too large.

A stage of its own, so that the metrics stay where it fails.  Knows means; nothing of runs or judgments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from retune import tables
from retune.config import MinDeltaConfig
from retune.runtime import UserError, atomic, log

BASE = "base"
HEAD = ("benchmark", "kind", "model", "base", "then", "difference", "at least", "")
ROUNDING = 1e-9  # means of the same numbers in another order are the same


def gate(*, metrics: Path, settings: MinDeltaConfig, guards: Sequence[str], out: Path) -> None:
    """Write the table to `out`.

    Args:
        metrics: the table `metrics`.
        settings: the measure, the models and what they must reach.
        guards: names of the benchmarks that are guard sets.

    Raises:
        UserError: with the table, where a model misses what it must reach on any benchmark.
    """
    name, cutoff = settings.measure.split("@")
    table = tables.read(metrics, "metrics")
    wanted = pc.and_(pc.equal(table["measure"], name), pc.equal(table["cutoff"], int(cutoff)))
    rows = table.filter(pc.and_(wanted, pc.is_null(table["query_id"]))).to_pylist()
    means = {(row["benchmark"], row["model"]): row for row in rows}
    lines, failed = [], 0
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        guard = benchmark in guards
        for model in settings.models or ():
            least = settings.guard if guard else settings.target
            line, passed = _line(benchmark, guard, means[benchmark, model], means[benchmark, BASE], least)
            lines.append(line)
            failed += not passed
    text = f"{settings.measure} against {BASE}\n" + _aligned([HEAD, *lines])
    if failed:
        what = "benchmark" if len(settings.models or ()) == 1 else "comparison"
        raise UserError(f"evaluate.min_delta: not reached on {failed} {what}{'s' * (failed > 1)}\n{text}")
    with atomic(out) as part:
        part.write_text(text + "\n")
    log.info("%s", text)


def _line(
    benchmark: str, guard: bool, row: Mapping[str, Any], base: Mapping[str, Any], least: float
) -> tuple[tuple[str, ...], bool]:
    """The cells of a row, and whether it passes."""
    delta = row["value"] - base["value"]
    passed = delta >= least - ROUNDING
    p = row["p_value"]
    numbers = (f"{base['value']:.4f}", f"{row['value']:.4f}", f"{delta:+.4f} (p = {p:.3f})", f"{least:+.4f}")
    return (benchmark, "guard" if guard else "target", row["model"], *numbers, "passed" if passed else "FAILED"), passed


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
