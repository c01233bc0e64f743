"""A plot of all queries: what a query was worth with the base model, and what it is worth now.

Queries with nearly the same two values are one bubble, so that a plot of ten thousand queries stays small and
shows how many lie where; what lies under the reader's pointer says which queries they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from retune.data.baseline import BASE
from retune.report import plots
from retune.report.measures import Measure, Metrics, label
from retune.report.page import Html, count, cut, decimal, figure, plural
from retune.report.spread import scan

STEPS = (0.01, 0.02, 0.05)  # of the grid: the finest that makes no more than
BUBBLES = 400
NAMED = 2  # queries that a bubble names
CHARACTERS = 90  # of a query
KINDS = {1: ("better", "good"), -1: ("worse", "bad"), 0: ("the same", "base")}


@dataclass(frozen=True)
class Bubble:
    """Queries with nearly the same values, by their places; all better, all worse, or all as they were."""

    sign: int
    before: float
    after: float
    members: np.ndarray


def bubbles(before: np.ndarray, after: np.ndarray) -> list[Bubble]:
    """The queries' two values, float64 [q] each, put together on the finest grid that is not too many; largest first.

    A bubble lies at the mean of its queries.
    """
    sign = np.sign(after - before).astype(int)
    for step in STEPS:
        cells = np.stack([sign, np.rint(before / step), np.rint(after / step)], axis=1)  # [q, 3]
        found, place, sizes = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
        if len(found) <= BUBBLES:
            break
    members = np.split(np.argsort(place.ravel(), kind="stable"), np.cumsum(sizes)[:-1])
    made = [Bubble(int(sign[each[0]]), float(before[each].mean()), float(after[each].mean()), each) for each in members]
    return sorted(made, key=lambda bubble: -len(bubble.members))


def scatter(metrics: Metrics, benchmark: str, model: str, measure: Measure, queries: Path | None) -> Html | None:
    """`model` against base, a bubble for the queries at a place; None where their queries are not the same.

    Args:
        queries: the benchmark's table of queries, for their texts; None: none are shown.
    """
    ids, before = metrics.queries(benchmark, BASE, measure)
    others, after = metrics.queries(benchmark, model, measure)
    if not len(ids) or not np.array_equal(ids, others):
        return None
    found = bubbles(before, after)
    texts = _texts(queries, ids[np.concatenate([one.members[:NAMED] for one in found])]) if queries else {}
    sizes = {sign: sum(len(one.members) for one in found if one.sign == sign) for sign in KINDS}
    names = {sign: f"{name}: {count(sizes[sign])}" for sign, (name, _) in KINDS.items() if sizes[sign]}
    rows = [
        {"x": one.before, "y": one.after, "n": len(one.members), "kind": names[one.sign],
         "said": _said(one, [texts.get(int(ids[i]), "") for i in one.members[:NAMED]])}
        for one in found
    ]  # fmt: skip
    colours = {name: KINDS[sign][1] for sign, name in names.items()}
    name = label(measure)
    drawn = plots.scatter(rows, colours=colours, x_title=f"{name}, {BASE}", y_title=f"{name}, {model}")
    caption = f"Above the line: better with {model}. The larger a bubble, the more queries lie there"
    caption += "; under the pointer: which." if texts else "."
    return figure(f"{plural(len(ids), 'query', 'queries')}, {model} against {BASE}", drawn, caption)


def _texts(path: Path, ids: np.ndarray) -> Mapping[int, str]:
    found = scan(path).filter(pl.col("query_id").is_in(ids.tolist())).select("query_id", "text").collect()
    return dict(found.iter_rows())


def _said(bubble: Bubble, texts: list[str]) -> str:
    n = len(bubble.members)
    values = f"{decimal(bubble.before)} → {decimal(bubble.after)}"
    named = [cut(text, CHARACTERS) for text in texts if text]
    if n == 1:
        return ": ".join([values, *named])
    shown = "".join(f"\n· {text}" for text in named) + ("\n· …" if named and n > len(named) else "")
    return f"{plural(n, 'query', 'queries')}, {values}{shown}"
