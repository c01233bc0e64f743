"""Section on single queries: all as a plot, and those that got better and worse most, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from retune.data.baseline import BASE
from retune.report.measures import Measure, Metrics, label
from retune.report.page import (
    Html,
    Section,
    count,
    cut,
    decimal,
    details,
    escape,
    join,
    paragraph,
    percent,
    signed,
    tag,
)  # fmt: skip
from retune.report.scatter import scatter
from retune.report.spread import scan

DRAWN = ("tuned", "merged")  # models that are set against base, where there are any
TOP = 3  # passages shown of a ranking
CHARACTERS = 320  # shown of a passage


@dataclass(frozen=True)
class Rankings:
    """What the shown queries' rankings, judgments and texts are."""

    queries: Mapping[int, str]
    texts: Mapping[int, str]
    relevant: Mapping[int, list[int]]
    """Relevant passages of a query, the best grade first."""
    ranks: Mapping[tuple[str, int], Mapping[int, int]]
    """(model, query) → {passage: rank}, for the top and the relevant."""


def examples(
    metrics: Metrics, runs: Mapping[str, Mapping[str, Path]], benchmarks: Mapping[str, Mapping[str, Path]], n: int
) -> Section | None:
    """All queries of each benchmark, the `n` that gained most and the `n` that lost most; None where there are none.

    With `n` 0 no query is named.
    """
    parts: list[Html] = []
    for benchmark in metrics.benchmarks:
        models = [model for model in metrics.models(benchmark) if model in runs.get(benchmark, {})]
        others = [model for model in models if model != BASE]
        if BASE in models and others and benchmark in benchmarks:
            after = [model for model in DRAWN if model in others] or others[:1]
            parts += _of_benchmark(metrics, benchmark, after, runs[benchmark], benchmarks[benchmark], n)
    return Section("queries", "Queries", join(parts)) if parts else None


def _of_benchmark(
    metrics: Metrics, benchmark: str, models: Sequence[str], runs: Mapping[str, Path], files: Mapping[str, Path], n: int
) -> list[Html]:
    """A plot for each of `models`; of the first also the extreme queries, folded away for a guard set."""
    measure = next((m for m in metrics.main(benchmark) if m[0] == "nDCG"), metrics.main(benchmark)[0])
    texts = files["queries"] if n else None
    drawn = [found for model in models if (found := scatter(metrics, benchmark, model, measure, texts))]
    if not drawn:
        return []
    title, plots = tag("h3", metrics.title(benchmark)), tag("div", *drawn, css="plots")
    said, boxes = _extremes(metrics, benchmark, models[0], measure, runs, files, n)
    if benchmark in metrics.guards and boxes:
        boxes = [details(f"Queries of {benchmark} that changed most", *boxes)]
    return [title, said, plots, *boxes]


def _extremes(
    metrics: Metrics, benchmark: str, after: str, measure: Measure, runs: Mapping[str, Path], files: Mapping[str, Path],
    n: int,
) -> tuple[Html, list[Html]]:  # fmt: skip
    """How many queries got better and worse, and the `n` that did so most."""
    ids, before_values = metrics.queries(benchmark, BASE, measure)
    _, after_values = metrics.queries(benchmark, after, measure)
    change = after_values - before_values
    order = np.lexsort((ids, -change))
    better = [i for i in order[:n] if change[i] > 0]
    worse = [i for i in order[::-1][:n] if change[i] < 0]
    up, down, total = int((change > 0).sum()), int((change < 0).sum()), len(ids)
    said = (
        f"{label(measure)} of {after} against {BASE} on {benchmark}: better for {count(up)} queries "
        f"({percent(up, total)}), worse for {count(down)} ({percent(down, total)}), "
        f"the same for {count(total - up - down)}."
    )
    if not n:
        return paragraph(said), []
    shown = _load([int(ids[i]) for i in [*better, *worse]], (BASE, after), runs, files)
    parts: list[Html] = []
    for title, chosen in ((f"Better with {after}", better), (f"Worse with {after}", worse)):
        boxes = [
            _example(shown, int(ids[i]), after, measure, float(before_values[i]), float(after_values[i]), place == 0)
            for place, i in enumerate(chosen)
        ]
        parts += [tag("h4", title), *boxes] if boxes else []
    return paragraph(said), parts


def _load(ids: Sequence[int], models: Sequence[str], runs: Mapping[str, Path], files: Mapping[str, Path]) -> Rankings:
    """Only what the page shows is read."""
    judged = scan(files["pairs"]).filter(pl.col("query_id").is_in(ids), pl.col("label") > 0)
    judged = judged.sort("label", descending=True, maintain_order=True).select("query_id", "text_id").collect()
    relevant: dict[int, list[int]] = {}
    for query, passage in judged.iter_rows():
        relevant.setdefault(query, []).append(passage)
    ranks: dict[tuple[str, int], dict[int, int]] = {}
    wanted = {passage for passages in relevant.values() for passage in passages[:TOP]}
    for model in models:
        found = scan(runs[model]).filter(pl.col("query_id").is_in(ids)).select("query_id", "text_id", "rank").collect()
        for query, passage, rank in found.sort("query_id", "rank").iter_rows():
            if rank <= TOP or passage in relevant.get(query, ()):
                ranks.setdefault((model, query), {})[passage] = rank
                wanted |= {passage} if rank <= TOP else set()
    texts = scan(files["texts"]).filter(pl.col("text_id").is_in(sorted(wanted))).select("text_id", "text").collect()
    queries = scan(files["queries"]).filter(pl.col("query_id").is_in(ids)).select("query_id", "text").collect()
    return Rankings(dict(queries.iter_rows()), dict(texts.iter_rows()), relevant, ranks)


def _example(shown: Rankings, query: int, after: str, measure: Measure, old: float, new: float, opened: bool) -> Html:
    css = "good" if new > old else "bad"
    title = join([
        tag("span", signed(new - old), css=f"change {css}"), shown.queries.get(query, f"query {query}"),
    ])  # fmt: skip
    wanted = [_wanted(shown, query, passage, after) for passage in shown.relevant.get(query, [])[:TOP]]
    more = len(shown.relevant.get(query, [])) - TOP
    if more > 0:
        wanted.append(paragraph(f"… and {count(more)} more relevant passages", css="note"))
    columns = [
        tag(
            "div",
            Html(f"<h4>{escape(model)}: {escape(label(measure))} {decimal(value)}</h4>"),
            _top(shown, query, model),
        )
        for model, value in ((BASE, old), (after, new))
    ]
    return details(title, *wanted, tag("div", *columns, css="pair"), css="example", opened=opened)


def _wanted(shown: Rankings, query: int, passage: int, after: str) -> Html:
    ranks = [shown.ranks.get((model, query), {}).get(passage) for model in (BASE, after)]
    places = " → ".join(f"rank {rank}" if rank else "not found" for rank in ranks)
    text = cut(shown.texts.get(passage, ""), CHARACTERS)
    return tag("p", tag("b", f"Relevant, {places}: "), text, css="wanted")


def _top(shown: Rankings, query: int, model: str) -> Html:
    ranks = shown.ranks.get((model, query), {})
    top = sorted((rank, passage) for passage, rank in ranks.items() if rank <= TOP)
    relevant = set(shown.relevant.get(query, ()))
    items = [
        tag("li", cut(shown.texts.get(passage, ""), CHARACTERS), css="relevant" if passage in relevant else "")
        for _, passage in top
    ]
    return tag("ol", *items, css="passages") if items else paragraph("Nothing was retrieved.", css="soft")
