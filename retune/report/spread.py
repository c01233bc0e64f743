"""How a column of a large table is spread: counts, quantiles and histograms, without reading it into Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from retune import tables

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BARS = 40


def scan(path: str | Path) -> pl.LazyFrame:
    """The table at `path`, lazily.

    Raises:
        UserError: if there is none, or it is not whole.
    """
    tables.n_rows(path)
    return pl.scan_parquet(path)


def quantiles(frame: pl.LazyFrame, column: str) -> dict[str, dict[str, float]]:
    """For each `kind`: rows with a value (`n`), `min`, `max` and the quantiles by their names (`0.05` …)."""
    value = pl.col(column)
    found = (
        frame.filter(value.is_not_null())
        .group_by("kind")
        .agg(
            value.len().alias("n"),
            value.min().alias("min"),
            value.max().alias("max"),
            *(value.quantile(q, "linear").alias(str(q)) for q in QUANTILES),
        )
        .sort("kind")
        .collect(engine="streaming")
    )
    return {row.pop("kind"): row for row in found.to_dicts()}


def bars(frame: pl.LazyFrame, column: str, low: float, high: float, kinds: Sequence[str]) -> list[dict[str, object]]:
    """Some `BARS` bins {"kind", "low", "high", "value"} from `low` to `high`, empty ones too.

    `value` is the share of the kind's rows that lie within.
    """
    step = nice_step((high - low) / BARS)
    start, stop = (math.floor(end / step + 1e-9) for end in (low, high))
    place = (pl.col(column) / step + 1e-9).floor().cast(pl.Int64).clip(start, stop).alias("bin")
    filled = frame.filter(pl.col(column).is_not_null())
    found = {(kind, bin_): n for kind, bin_, n in filled.group_by("kind", place).len().collect().iter_rows()}
    totals = {kind: sum(n for (other, _), n in found.items() if other == kind) for kind in kinds}
    return [
        {"kind": kind, "low": round(i * step, 9), "high": round((i + 1) * step, 9),
         "value": found.get((kind, i), 0) / max(totals[kind], 1)}
        for kind in kinds
        for i in range(start, stop + 1)
    ]  # fmt: skip


def nice_step(width: float) -> float:
    """1, 2, 2.5 or 5 × a power of ten: the smallest that is at least `width`."""
    if not width > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= width * (1 - 1e-9))
