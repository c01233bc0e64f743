"""Section on mining: what each filter removed, which queries came short, and how hard the negatives are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from retune import tables
from retune.data import funnel
from retune.data.negatives import SUSPECT_MARGIN, below
from retune.report.mined import examples
from retune.report.page import Html, Section, count, join, paragraph, percent, plural, table, tag
from retune.report.pairs import by_kind, lowest_positives, spread_of
from retune.report.spread import quantiles, scan

FILTERS = {
    "own": "the query's positives, and the query itself",
    "copies": "the same text in another writing",
    "set_aside": "positives of queries that were set aside",
    "similarity_range": "similarity outside",
    "relative_margin": "too near to the positive:",
    "absolute_margin": "too near to the positive:",
    funnel.REFUSED: "scored too high by the teacher:",
    funnel.NOT_DRAWN: "not drawn: more than",
    funnel.QUERY_DROPPED: "of queries that were left out",
}
KEYS = {funnel.REFUSED: "max_score_of_teacher", funnel.NOT_DRAWN: "negative_number"}  # others: the filter's name


@dataclass(frozen=True)
class Counts:
    """The table `mining` and the settings it was made with."""

    values: Mapping[tuple[str, str], int]
    settings: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> Counts:
        rows = tables.read(path, "mining").to_pylist()
        values = {(row["measure"], row["name"]): int(row["value"]) for row in rows}
        return cls(values, json.loads(tables.metadata(path).get("settings", "{}")))

    def get(self, measure: str, name: str) -> int:
        return self.values.get((measure, name), 0)


def mining(inputs: Mapping[str, Path], n_examples: int) -> Section | None:
    """What mining did; None where nothing was mined.

    Args:
        inputs: `mined` (the table of mined pairs) and `mining` (its counts), either of which may be missing; `pairs`
            (the most complete), `texts` and `queries`.
        n_examples: queries shown.
    """
    path = inputs.get("mined") or inputs.get("pairs")
    if path is None:
        return None
    counts = Counts.load(inputs["mining"]) if "mining" in inputs else None
    frame = by_kind(path, "query_id", "similarity")
    spread = quantiles(frame, "similarity")
    if counts is None and not {"mined negatives", "random negatives"} & spread.keys():
        return None
    words = counts is not None and counts.settings.get("retriever") == "bm25"
    unit = "BM25 score" if words else "similarity"
    parts = [paragraph(_said(spread, counts))]
    if counts:
        parts.append(_funnel(counts))
    parts.append(_suspected(inputs, path, unit))
    if spread:
        parts.append(spread_of(frame, spread, "similarity", f"{unit} to the query", "Positives and negatives"))
    if n_examples and {"texts", "queries"} <= inputs.keys():
        parts.append(examples(inputs, path, n_examples, unit))
    return Section("mining", "Mining", join(parts))


def _said(spread: Mapping[str, Mapping[str, float]], counts: Counts | None) -> str:
    """Who was mined for, what was found, and what became of queries with too few candidates."""
    n = {kind: int(row["n"]) for kind, row in spread.items()}
    said = f"{plural(n.get('mined negatives', 0), 'hard negative')} mined"
    if counts is None:
        random = n.get("random negatives")
        more = f", and {count(random)} drawn at random where too few candidates were left" if random else ""
        return f"{said}{more}."
    total, short = (counts.get(funnel.QUERIES, name) for name in ("mined_for", "short"))
    said += f" for {plural(total, 'query', 'queries')}"
    if not short:
        return f"{said}; every query had as many candidates as were asked for."
    said += f". {count(short)} of the queries ({percent(short, total)}) had fewer candidates than were asked for"
    if counts.get(funnel.QUERIES, "dropped"):
        return f"{said}, and were left out."
    filled, still = counts.get(funnel.RANDOM, "filled"), counts.get(funnel.QUERIES, "still_short")
    said += f", and got {plural(filled, 'random passage')} instead."
    return said + (f" {count(still)} still have fewer: there are no more passages they may have." if still else "")


def _funnel(counts: Counts) -> Html:
    """A row a filter: what it removed of the candidates in the rank window, and what it left."""
    left = seen = counts.get(funnel.CANDIDATES, "seen")
    window = counts.settings.get("range_for_sampling")
    rows = [[f"candidates of rank {window}" if window else "candidates", "", count(seen), percent(seen, seen)]]
    for (measure, name), removed in counts.values.items():
        if measure == funnel.REMOVED:
            left -= removed
            key = KEYS.get(name, name)
            setting = [" ", tag("code", f"{key} {counts.settings[key]}")] if key in counts.settings else []
            rows.append([join([FILTERS.get(name, name), *setting]), count(removed), count(left), percent(left, seen)])
    rows.append([tag("b", "chosen"), "", tag("b", count(left)), percent(left, seen)])
    return table(["", "removed", "left", "of all"], rows, [1, 2, 3])


def _suspected(inputs: Mapping[str, Path], path: Path, unit: str) -> Html:
    """The share of mined negatives that look like positives, by similarity and by the teacher."""
    near, total = share_above(path, "similarity", SUSPECT_MARGIN)
    if not total:
        return Html("")
    said = (
        f"{percent(near, total)} of the mined negatives ({count(near)}) are suspected of being positives that nobody "
        f"marked: their {unit} is at least {1 - SUSPECT_MARGIN:.0%} of that of their query's lowest positive."
    )
    above, scored = share_above(inputs["pairs"], "score", 0.0, strict=True) if "pairs" in inputs else (0, 0)
    if scored:
        said += f" The teacher scores {percent(above, scored)} of those that it has scored above the lowest positive."
    if near or above:
        said += " Some are shown below; relative_margin, absolute_margin and max_score_of_teacher remove such ones."
    return paragraph(said, css="soft")


def share_above(path: Path, column: str, margin: float, strict: bool = False) -> tuple[int, int]:
    """Mined negatives within the relative `margin` of their query's lowest positive, and those that can be compared.

    `strict`: those that lie above it.
    """
    frame = scan(path).filter(pl.col(column).is_not_null())
    negatives = frame.filter((pl.col("label") == 0) & (pl.col("origin") == "mined"))
    line = below(pl.col("lowest"), margin).cast(pl.Float32)
    above = pl.col(column) > line if strict else pl.col(column) >= line
    both = negatives.join(lowest_positives(frame, column), on="query_id")
    n, total = both.select(above.sum().alias("n"), pl.len().alias("all")).collect(engine="streaming").row(0)
    return n or 0, total
