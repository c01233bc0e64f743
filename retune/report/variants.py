"""Section on variants: the runs of an experiment side by side, on the benchmarks that they share.

What is called better rests on paired values of the same queries, as everywhere on the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retune.data.baseline import BASE
from retune.report.measures import Difference, Measure, Metrics, cell, difference, judged, label
from retune.report.page import Html, Section, count, join, paragraph, probability, signed, table, tag


def variants(run: str, metrics: Metrics, others: Mapping[str, Path]) -> Section | None:
    """This run beside the others on the benchmarks that they share; None without others."""
    tables = {run: metrics} | {name: Metrics(path, sorted(metrics.guards)) for name, path in others.items()}
    parts = []
    for benchmark in metrics.benchmarks:
        sharing = {name: table for name, table in tables.items() if benchmark in table.benchmarks}
        if len(sharing) > 1:
            parts += _side_by_side(run, benchmark, sharing)
    if not parts:
        return None
    note = (
        "In brackets 95% bootstrap intervals; p, below a value, against base, and in the last column against the same "
        f"model of {run}: differences paired by query, two-sided randomisation tests, each for itself."
    )
    return Section("variants", "Variants", join([*parts, paragraph(note, css="note")]))


def _side_by_side(run: str, benchmark: str, tables: Mapping[str, Metrics]) -> list[Html]:
    """A row for each model of each run; base, where it is the same for all, once."""
    mine = tables[run]
    main = mine.main(benchmark)
    shared = all(_same(metrics, mine, benchmark, BASE, main[0]) for metrics in tables.values())
    rows, said = [], []
    for name, metrics in tables.items():
        for model in metrics.models(benchmark):
            if model == BASE and shared and name != run:
                continue
            title = tag("b", BASE) if model == BASE and shared else join([name, tag("small", model)])
            compared = _compared(metrics, mine, benchmark, model, main[0]) if name != run else ""
            if name != run and model == "tuned":
                said += _said(metrics, mine, benchmark, main[0], name, run)
            cells = [cell(metrics.mean(benchmark, model, measure)) for measure in main]
            rows.append([title, *cells, compared])
    shown = table(["", *map(label, main), f"{label(main[0])} against {run}"], rows)
    return [tag("h3", mine.title(benchmark)), *map(paragraph, said), shown]


def _paired(metrics: Metrics, mine: Metrics, benchmark: str, model: str, measure: Measure) -> Difference | None:
    if model not in mine.models(benchmark):
        return None
    return difference(*(each.queries(benchmark, model, measure) for each in (metrics, mine)))


def _same(metrics: Metrics, mine: Metrics, benchmark: str, model: str, measure: Measure) -> bool:
    """Whether every query has the same value."""
    ours, theirs = (each.queries(benchmark, model, measure) for each in (mine, metrics))
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)) and len(ours[0]) > 0


def _compared(metrics: Metrics, mine: Metrics, benchmark: str, model: str, measure: Measure) -> Html | str:
    gain = _paired(metrics, mine, benchmark, model, measure)
    if gain is None:
        return "other queries" if model in mine.models(benchmark) else ""
    if _same(metrics, mine, benchmark, model, measure):
        return "the same values"
    verdict, css = judged(gain)
    tested = tag("small", f"[{signed(gain.low)}, {signed(gain.high)}] {probability(gain.p)}")
    return join([signed(gain.mean), tested, tag("small", verdict.split(" with ")[0], css=css)])


def _said(metrics: Metrics, mine: Metrics, benchmark: str, measure: Measure, name: str, run: str) -> list[Html]:
    """How a variant's tuned model compares, in a sentence; none where it cannot be compared."""
    gain = _paired(metrics, mine, benchmark, "tuned", measure)
    if gain is None:
        return []
    start = join([tag("b", name), " against ", tag("b", run), f", tuned, {label(measure)} on {benchmark}: "])
    if _same(metrics, mine, benchmark, "tuned", measure):
        return [join([start, "every query has the same value."])]
    if gain.real:
        return [join([start, f"{'better' if gain.mean > 0 else 'worse'} ({gain})."])]
    return [join([start, f"no difference that {count(gain.n)} queries can tell ({gain})."])]
