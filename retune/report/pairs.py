"""Pairs by their kind: how similarities and scores of positives and negatives are spread."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from retune.report import plots
from retune.report.page import Html, count, decimal, figure, table, tag
from retune.report.spread import QUANTILES, bars, scan

# Kinds of pairs, as the page calls them, with their colours, in order.
KINDS = {"positives": "good", "given negatives": "other", "mined negatives": "tuned", "random negatives": "base"}


def by_kind(path: Path, *columns: str) -> pl.LazyFrame:
    """Columns of the pairs with their `kind`."""
    kind = pl.when(pl.col("label") > 0).then(pl.lit("positives"))
    kind = kind.otherwise(pl.col("origin").cast(pl.String) + " negatives").alias("kind")
    return scan(path).select(*columns, kind)


def spread_of(
    frame: pl.LazyFrame, spread: Mapping[str, Mapping[str, float]], column: str, x_title: str, title: str
) -> Html:
    """A histogram and a table of quantiles of `column`, by kind."""
    kinds = [kind for kind in KINDS if kind in spread]
    low, high = min(row["min"] for row in spread.values()), max(row["max"] for row in spread.values())
    rows = bars(frame, column, low, high, kinds)
    colours = {kind: KINDS[kind] for kind in kinds}
    drawn = plots.histogram(
        rows, x_title=x_title, y_title="share of its kind", colours=colours, y_format="%", height=250
    )
    head = ["", "pairs", *(f"{100 * q:.0f}%" for q in QUANTILES)]
    cells = [[kind, count(spread[kind]["n"]), *(decimal(spread[kind][str(q)]) for q in QUANTILES)] for kind in kinds]
    quantile_table = figure(
        "Quantiles", table(head, cells, range(1, len(head))), "Read: 95% of the pairs lie below the last column."
    )
    return tag("div", figure(title, drawn), quantile_table, css="plots")


def lowest_positives(frame: pl.LazyFrame, column: str) -> pl.LazyFrame:
    """query_id and `lowest`, the lowest `column` of its positives; queries without any are left out."""
    positive = frame.filter((pl.col("label") > 0) & pl.col(column).is_not_null())
    return positive.group_by("query_id").agg(pl.col(column).min().alias("lowest"))
