"""Sections on the data: what came in, how long it is, what the teacher says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from retune.report import plots
from retune.report.leaks import leaks
from retune.report.page import Html, Section, cards, count, cut, figure, join, paragraph, percent, plural, table, tag
from retune.report.pairs import KINDS, by_kind, spread_of
from retune.report.spread import bars, quantiles, scan

REASONS = 10  # shown


def data(inputs: Mapping[str, Path]) -> Section:
    """Counts by dataset, what was rejected and why, what is shared with the benchmarks, and lengths."""
    parts = [_datasets(inputs)]
    if "rejected" in inputs:
        parts.append(_rejected(inputs["rejected"]))
    if "leakage" in inputs:
        parts.append(leaks(inputs["leakage"]))
    if "lengths" in inputs:
        parts.append(_lengths(inputs["lengths"], inputs.get("bins")))
    return Section("data", "Data", join(parts))


def _datasets(inputs: Mapping[str, Path]) -> Html:
    queries = scan(inputs["queries"])
    found = (
        queries.group_by("dataset")
        .agg(pl.col("query_id").min().alias("first"), pl.len().alias("queries"), (pl.col("split") == "dev").sum())
        .sort("first")
        .collect()
    )
    n_queries, n_dev = found["queries"].sum(), found["split"].sum()
    n_texts = scan(inputs["texts"]).select(pl.len()).collect().item()
    boxes = [("queries", count(n_queries), f"{count(n_dev)} of them set aside (dev)" if n_dev else "", "")]
    boxes.append(("passages", count(n_texts), "each distinct text once", ""))
    rows = [[row["dataset"], count(row["queries"])] for row in found.iter_rows(named=True)]
    head = ["dataset", "queries"]
    if n_dev:
        head.append("dev")
        rows = [[*row, count(dev)] for row, dev in zip(rows, found["split"], strict=True)]
    if "pairs" in inputs:
        pairs = by_kind(inputs["pairs"], "query_id")
        counts = (
            pairs.join(queries.select("query_id", "dataset"), on="query_id")
            .group_by("dataset", "kind").len().collect(engine="streaming")
        )  # fmt: skip
        by = {(dataset, kind): n for dataset, kind, n in counts.iter_rows()}
        kinds = [kind for kind in KINDS if any(kind == other for _, other in by)]
        totals = {kind: sum(n for (_, other), n in by.items() if other == kind) for kind in kinds}
        n_positives = totals.get("positives", 0)
        boxes.append(("positive pairs", count(n_positives), f"{n_positives / max(n_queries, 1):.2f} a query", ""))
        negatives = sum(totals.values()) - n_positives
        boxes.append(("negative pairs", count(negatives), f"{negatives / max(n_queries, 1):.1f} a query", ""))
        head += kinds
        rows = [[*row, *(count(by.get((row[0], kind), 0)) for kind in kinds)] for row in rows]
    return join([cards(boxes), table(head, rows, range(1, len(head)))])


def _rejected(path: Path) -> Html:
    found = (
        scan(path).group_by("reason", maintain_order=True)
        .agg(pl.len().alias("n"), pl.col("source").first()).sort("n", descending=True, maintain_order=True).collect()
    )  # fmt: skip
    total = found["n"].sum()
    if not total:
        return paragraph("No row was rejected.", css="soft")
    rows = [
        [cut(row["reason"], 160), count(row["n"]), tag("code", row["source"])] for row in found.iter_rows(named=True)
    ]
    more = len(rows) - REASONS
    note = paragraph(f"{plural(more, 'more reason')} in the table `rejected`.", css="note") if more > 0 else ""
    shown = table(["reason", "rows", "for example"], rows[:REASONS], [1])
    return join([tag("h3", f"Rejected: {plural(total, 'row')}"), shown, note])


def _lengths(path: Path, bins: Path | None) -> Html:
    frame = scan(path).with_columns(pl.lit("texts").alias("kind"))
    spread = quantiles(frame, "n_tokens").get("texts")
    if not spread:
        return Html("")
    end = scan(path).select(pl.col("n_tokens").quantile(0.995, "nearest")).collect().item()
    shown = frame.filter(pl.col("n_tokens") <= end)
    drawn = plots.histogram(
        bars(shown, "n_tokens", 0, max(end, 40), ["texts"]), x_title="tokens of a passage", y_title="passages",
        y_format="%",
    )  # fmt: skip
    said = (
        f"Half of the passages have at most {count(spread['0.5'])} tokens, 95% at most {count(spread['0.95'])}; "
        f"the longest has {count(spread['max'])}."
    )
    if spread["max"] > end:
        said += " The longest half percent is not drawn."
    parts = [figure("Length of the passages", drawn, said)]
    if bins:
        parts.append(_bins(bins))
    return join([tag("h3", "Lengths"), tag("div", *parts, css="plots")])


def _bins(path: Path) -> Html:
    found = (
        scan(path).group_by("length_bin").agg(pl.len().alias("n"), pl.col("n_tokens").min()).sort("n_tokens").collect()
    )
    total = found["n"].sum()
    rows = [[tag("code", r["length_bin"]), count(r["n"]), percent(r["n"], total)] for r in found.iter_rows(named=True)]
    caption = "A query's bin is that of the longest among itself, its positives and its negatives."
    return figure("Length bins", table(["bin", "queries", "share"], rows, [1, 2]), caption)


TREATED = {"drop": "left out", "relabel": "made positives", "keep": "kept"}
"""What became of false negatives, by `score.false_negatives`."""


def teacher(path: Path, history: Html | None, scoring: Path | None = None) -> Section | None:
    """Scores of positives and negatives; None where there are none."""
    frame = by_kind(path, "query_id", "score")
    spread = quantiles(frame, "score")
    if not spread:
        return None
    above, total = _above_positive(path, "score")
    scored = sum(int(row["n"]) for row in spread.values())
    parts = [paragraph(f"{plural(scored, 'pair')} scored by the teacher.")]
    if total:
        said = f"It scores {percent(above, total)} of the negatives above the best positive of their query."
        parts.append(paragraph(said, css="soft"))
    if scoring:
        parts += _false_negatives(scoring)
    parts.append(spread_of(frame, spread, "score", "teacher's score", "Scores of positives and negatives"))
    if history:
        parts += [tag("h3", "Its own training"), history]
    return Section("teacher", "Teacher", join(parts))


def _false_negatives(path: Path) -> list[Html]:
    """What the stage score made of negatives that the teacher takes for positives; nothing where it was not asked."""
    found = scan(path).collect()
    numbers = dict(zip(found["name"], found["value"], strict=True))
    if "false negatives" not in numbers:
        return []
    said = (
        f"{plural(int(numbers['false negatives']), 'negative')} of {count(numbers['negatives'])} scored above the "
        f"lowest of their query's positives by more than mine.max_score_of_teacher: {TREATED[found['measure'][0]]}. "
        f"{plural(int(numbers['queries without another negative']), 'query', 'queries')} had no other negative."
    )
    return [paragraph(said)]


def _above_positive(path: Path, column: str) -> tuple[int, int]:
    """Negatives above the best positive of their query, and negatives that can be compared."""
    frame = scan(path).filter(pl.col(column).is_not_null())
    best = frame.filter(pl.col("label") > 0).group_by("query_id").agg(pl.col(column).max().alias("best"))
    both = frame.filter(pl.col("label") == 0).join(best, on="query_id")
    above, total = both.select((pl.col(column) > pl.col("best")).sum(), pl.len().alias("n")).collect().row(0)
    return above or 0, total
