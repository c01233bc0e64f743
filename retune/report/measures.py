"""Sections on retrieval quality: what tuning gained, and all measures.

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
NO_BREAK = "\u00a0"
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
    """A table of metrics: its means by (benchmark, model, measure, cutoff), and the queries' values on demand.

    guards: the benchmarks that show what was lost elsewhere; they come after the others.
    """

    def __init__(self, path: Path, guards: Sequence[str] = ()) -> None:
        self._frame, self.guards = scan(path), frozenset(guards)
        rows = self._frame.filter(pl.col("query_id").is_null()).collect().to_dicts()
        self.means = {(r["benchmark"], r["model"], r["measure"], r["cutoff"]): r for r in rows}

    @cached_property
    def benchmarks(self) -> list[str]:
        return sorted(dict.fromkeys(key[0] for key in self.means), key=lambda name: name in self.guards)

    def title(self, benchmark: str) -> Html:
        """Its name, and that it is a guard set where it is one."""
        return join([benchmark, *([" ", tag("span", "guard set", css="badge")] if benchmark in self.guards else [])])

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
        if len(metrics.benchmarks) > 1 or metrics.guards:
            parts.append(tag("h3", metrics.title(benchmark)))
        means = {model: metrics.mean(benchmark, model, measure) for model in models}
        guard = benchmark in metrics.guards
        parts += [paragraph(said, css="" if guard or place else "lede") for place, said in
                  enumerate(verdicts(benchmark, label(measure), means, found))]  # fmt: skip
        parts.append(cards(_card(metrics, benchmark, model, measure) for model in models))
    same_head = " ranked by the same head" if any("-" in key[1] for key in metrics.means) else ""
    said = "In brackets: 95% bootstrap intervals over the queries. p: two-sided paired randomisation test against base"
    said += f"{same_head}."
    if metrics.guards:
        said += " A guard set is no aim of the training: it shows whether anything was lost elsewhere."
    parts.append(paragraph(said, css="note"))
    return Section("result", "Result", join(parts))


def verdicts(benchmark: str, measure: str, means: Mapping, found: Mapping[str, Difference | None]) -> list[Html]:
    """A sentence on each model that is compared with base, one whose value reads the same as base's included."""
    said = []
    names = {"tuned": "Tuning", "merged": "Merging the tuned model with base"}
    for model, gain in found.items():
        if gain is None:
            continue
        base, (name, _, head) = means[baseline(model)], model.partition("-")
        before, after = decimal(base["value"]), decimal(means[model]["value"])
        same = before == after and not gain.real
        verb = "left" if same else "raised" if gain.mean > 0 else "lowered"
        ends = f"at {after}" if same else f"from {before} to {after}"
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
    said = f"{label(measure)} {interval(row).replace(' ', NO_BREAK)}{tested}"
    return model, decimal(row["value"]), said, COLOURS.get(model, "")


def interval(row: Mapping) -> str:
    return f"[{decimal(row['low'])}, {decimal(row['high'])}]" if row["low"] is not None else ""


# ---- all measures -------------------------------------------------------------------------------


def metrics_section(metrics: Metrics, origins: Mapping[str, Html]) -> Section | None:
    """A plot of the main measures and a table of all, for each benchmark, below where that is from."""
    if not metrics.benchmarks:
        return None
    parts = []
    for benchmark in metrics.benchmarks:
        models, main = metrics.models(benchmark), metrics.main(benchmark)
        n = len(metrics.queries(benchmark, models[0], main[0])[0])
        parts.append(tag("h3", metrics.title(benchmark), f": {plural(n, 'judged query', 'judged queries')}"))
        parts.append(origins.get(benchmark, ""))
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
    rows = [[label(m), *(cell(metrics.mean(benchmark, model, m)) for model in models)] for m in measures]
    return table(["", *models], rows)


def cell(row: Mapping | None) -> Html:
    """A mean with its interval and, but for base, its p-value."""
    if row is None:
        return escape("–")
    tested = tag("small", probability(row["p_value"])) if row["p_value"] is not None else ""
    return join([decimal(row["value"]), tag("small", interval(row)), tested])
