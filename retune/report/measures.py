"""Sections on retrieval quality: what tuning gained, all measures, and other variants beside this run.

What is called a gain rests on paired values of the same queries, never on two intervals that overlap or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from retune.data.baseline import baseline
from retune.data.significance import bootstrap_interval, randomisation_test
from retune.report import plots
from retune.report.page import (
    Html,
    Section,
    cards,
    count,
    decimal,
    details,
    escape,
    figure,
    join,
    paragraph,
    plural,
    probability,
    signed,
    table,
    tag,
)  # fmt: skip
from retune.report.spread import scan

COLOURS = {"base": "base", "tuned": "tuned", "merged": "merged"}
LEVEL = 0.05  # of significance
SEED = 0  # of the intervals of differences

Measure = tuple[str, int]  # name, cutoff


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its 95% interval and the p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float
    n: int

    @property
    def real(self) -> bool:
        return self.p < LEVEL

    def __str__(self) -> str:
        return f"{signed(self.mean)}, 95% interval {signed(self.low)} to {signed(self.high)}, {probability(self.p)}"


class Metrics:
    """A table of metrics: its means by (benchmark, model, measure, cutoff), and the queries' values on demand."""

    def __init__(self, path: Path) -> None:
        self._frame = scan(path)
        rows = self._frame.filter(pl.col("query_id").is_null()).collect().to_dicts()
        self.means = {(r["benchmark"], r["model"], r["measure"], r["cutoff"]): r for r in rows}

    @cached_property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(key[0] for key in self.means))

    def models(self, benchmark: str) -> list[str]:
        return list(dict.fromkeys(key[1] for key in self.means if key[0] == benchmark))

    def measures(self, benchmark: str) -> list[Measure]:
        return list(dict.fromkeys(key[2:] for key in self.means if key[0] == benchmark))

    def main(self, benchmark: str) -> list[Measure]:
        """nDCG and MRR at 10 and Recall at the deepest cutoff, or what is nearest to that."""
        cutoffs = sorted({cutoff for _, cutoff in self.measures(benchmark)})
        near = min(cutoffs, key=lambda cutoff: abs(cutoff - 10))
        wanted = [("nDCG", near), ("MRR", near), ("Recall", cutoffs[-1])]
        return [measure for measure in wanted if measure in self.measures(benchmark)] or self.measures(benchmark)[:3]

    def mean(self, benchmark: str, model: str, measure: Measure) -> dict | None:
        return self.means.get((benchmark, model, *measure))

    def queries(self, benchmark: str, model: str, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
        """Query ids, rising, and the queries' values."""
        name, cutoff = measure
        wanted = {"benchmark": benchmark, "model": model, "measure": name, "cutoff": cutoff}
        found = self._frame.filter(*(pl.col(key) == value for key, value in wanted.items()))
        found = found.filter(pl.col("query_id").is_not_null()).select("query_id", "value").collect().sort("query_id")
        return found["query_id"].to_numpy(), found["value"].to_numpy()

    def against_base(self, benchmark: str, model: str, measure: Measure) -> Difference | None:
        """`model` less base by the same head; the p-value is the one of the table, where it has one."""
        other = baseline(model)
        if model == other or other not in self.models(benchmark):
            return None
        mine, base = (self.queries(benchmark, label, measure) for label in (model, other))
        return difference(mine, base, self.mean(benchmark, model, measure)["p_value"])


def difference(
    mine: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], p: float | None = None
) -> Difference | None:
    """Paired difference of (query ids, values); None where the queries are not the same."""
    if len(mine[0]) == 0 or not np.array_equal(mine[0], other[0]):
        return None
    each = (mine[1] - other[1])[:, None]  # [q, 1]
    low, high = bootstrap_interval(each, SEED)
    p = float(randomisation_test(each, SEED)[0]) if p is None else p
    return Difference(float(each.mean()), float(low[0]), float(high[0]), p, len(each))


def label(measure: Measure) -> str:
    return f"{measure[0]}@{measure[1]}"


# ---- headline -----------------------------------------------------------------------------------


def headline(metrics: Metrics) -> Section | None:
    """For each benchmark a sentence that says whether tuning helped, and the numbers that say so."""
    if not metrics.benchmarks:
        return None
    parts = []
    for benchmark in metrics.benchmarks:
        measure, models = metrics.main(benchmark)[0], metrics.models(benchmark)
        found = {model: metrics.against_base(benchmark, model, measure) for model in models}
        if len(metrics.benchmarks) > 1:
            parts.append(tag("h3", benchmark))
        means = {model: metrics.mean(benchmark, model, measure) for model in models}
        parts += [paragraph(said, css="lede" if place == 0 else "") for place, said in
                  enumerate(_verdicts(benchmark, label(measure), means, found))]  # fmt: skip
        for other in metrics.main(benchmark)[:2]:
            parts.append(cards(_card(metrics, benchmark, model, other) for model in models))
    parts.append(paragraph(
        "In brackets: 95% bootstrap intervals over the queries. p: two-sided paired randomisation test against base"
        f"{' ranked by the same head' if any('-' in key[1] for key in metrics.means) else ''}.",
        css="note",
    ))  # fmt: skip
    return Section("result", "Result", join(parts))


def _verdicts(benchmark: str, measure: str, means: Mapping, found: Mapping[str, Difference | None]) -> list[Html]:
    said = []
    names = {"tuned": "Tuning", "merged": "Merging the tuned model with base"}
    for model, gain in found.items():
        if gain is None:
            continue
        base, (name, _, head) = means[baseline(model)], model.partition("-")
        verb = "raised" if gain.mean > 0 else "lowered" if gain.mean < 0 else "left"
        ends = f"from {decimal(base['value'])} to {decimal(means[model]['value'])}" if gain.mean else "as it was"
        verdict, css = judged(gain)
        said.append(join([
            f"{names.get(name, name)} {verb} {measure}{head and f' of {head}'} on {benchmark} {ends} ({gain}): ",
            tag("b", verdict, css=css), ".",
        ]))  # fmt: skip
    return said


def judged(gain: Difference) -> tuple[str, str]:
    """In words whether a difference is one, and its CSS class."""
    if not gain.real:
        return f"not a significant difference with {plural(gain.n, 'query', 'queries')}", "soft"
    return ("a significant gain", "good") if gain.mean > 0 else ("a significant loss", "bad")


def _card(metrics: Metrics, benchmark: str, model: str, measure: Measure) -> tuple[str, str, str, str]:
    row = metrics.mean(benchmark, model, measure)
    tested = f" {probability(row['p_value'])}" if row["p_value"] is not None else ""
    return f"{model} · {label(measure)}", decimal(row["value"]), f"{interval(row)}{tested}", COLOURS.get(model, "")


def interval(row: Mapping) -> str:
    return f"[{decimal(row['low'])}, {decimal(row['high'])}]" if row["low"] is not None else ""


# ---- all measures -------------------------------------------------------------------------------


def metrics_section(metrics: Metrics) -> Section | None:
    """A plot of the main measures and a table of all, for each benchmark."""
    if not metrics.benchmarks:
        return None
    parts = []
    for benchmark in metrics.benchmarks:
        models, main = metrics.models(benchmark), metrics.main(benchmark)
        n = len(metrics.queries(benchmark, models[0], main[0])[0])
        parts.append(tag("h3", f"{benchmark}: {plural(n, 'judged query', 'judged queries')}"))
        rows = [
            {"group": label(measure), "kind": model, **{key: row[key] for key in ("value", "low", "high")}}
            for measure in main
            for model in models
            if (row := metrics.mean(benchmark, model, measure))
        ]
        colours = {model: COLOURS.get(model, "other") for model in models}
        drawn = plots.intervals(rows, colours=colours, x_title="value", groups=list(map(label, main)))
        dots = figure(
            f"Main measures on {benchmark}", drawn, "Dots are means, lines 95% intervals of each model alone."
        )
        short = figure("The same as numbers", _table(metrics, benchmark, main))
        parts.append(tag("div", dots, short, css="plots"))
        every = metrics.measures(benchmark)
        if len(every) > len(main):
            parts.append(details(f"All {len(every)} measures on {benchmark}", _table(metrics, benchmark, every)))
    return Section("metrics", "Metrics", join(parts))


def _table(metrics: Metrics, benchmark: str, measures: Sequence[Measure]) -> Html:
    models = metrics.models(benchmark)
    rows = [[label(m), *(_cell(metrics.mean(benchmark, model, m)) for model in models)] for m in measures]
    return table(["", *models], rows)


def _cell(row: Mapping | None) -> Html:
    if row is None:
        return escape("–")
    tested = tag("small", probability(row["p_value"])) if row["p_value"] is not None else ""
    return join([decimal(row["value"]), tag("small", interval(row)), tested])


# ---- variants -----------------------------------------------------------------------------------


def variants(run: str, metrics: Metrics, others: Mapping[str, Path]) -> Section | None:
    """This run beside the others on the benchmarks that they share; None without others."""
    tables = {run: metrics} | {name: Metrics(path) for name, path in others.items()}
    parts = []
    for benchmark in metrics.benchmarks:
        sharing = {name: table for name, table in tables.items() if benchmark in table.benchmarks}
        if len(sharing) > 1:
            parts += _side_by_side(run, benchmark, sharing)
    if not parts:
        return None
    note = "Differences are paired by query, with 95% bootstrap intervals and two-sided randomisation tests; "
    return Section("variants", "Variants", join([*parts, paragraph(note + "each is tested for itself.", css="note")]))


def _side_by_side(run: str, benchmark: str, tables: Mapping[str, Metrics]) -> list[Html]:
    main = tables[run].main(benchmark)
    rows, said = [], []
    for name, metrics in tables.items():
        for model in metrics.models(benchmark):
            cells = [metrics.mean(benchmark, model, measure) for measure in main]
            compared = ""
            if name != run and model in tables[run].models(benchmark):
                mine, this = (t.queries(benchmark, model, main[0]) for t in (metrics, tables[run]))
                gain = difference(mine, this)
                same = gain is not None and np.array_equal(mine[1], this[1])
                compared = "the same values" if same else _short(gain) if gain else "other queries"
                if model == "tuned" and gain:
                    said.append(_compared(name, run, label(main[0]), benchmark, None if same else gain))
            rows.append([name, model, *(_cell_short(row) for row in cells), compared])
    head = ["run", "model", *map(label, main), f"{label(main[0])} against {run}"]
    return [tag("h3", benchmark), *map(paragraph, said), table(head, rows, range(2, 2 + len(main)))]


def _cell_short(row: Mapping | None) -> Html:
    return escape("–") if row is None else join([decimal(row["value"]), tag("small", interval(row))])


def _short(gain: Difference) -> Html:
    verdict, css = judged(gain)
    return join([signed(gain.mean), tag("small", f"[{signed(gain.low)}, {signed(gain.high)}] {probability(gain.p)}"),
                 tag("small", verdict.split(" with ")[0], css=css)])  # fmt: skip


def _compared(name: str, run: str, measure: str, benchmark: str, gain: Difference | None) -> Html:
    start = join([tag("b", name), " against ", tag("b", run), f", tuned, {measure} on {benchmark}: "])
    if gain is None:
        return join([start, "every query has the same value."])
    if gain.real:
        return join([start, f"{'better' if gain.mean > 0 else 'worse'} ({gain})."])
    return join([start, f"no difference that {count(gain.n)} queries can tell ({gain})."])
