"""What test and training data share, as a part of the section on data."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from retune import tables
from retune.report.page import Html, count, cut, details, join, paragraph, percent, plural, table, tag
from retune.report.spread import scan

SHOWN = 10
KINDS = {
    "query": ("test queries", "are training queries"),
    "positive": ("relevant passages", "are positives of training rows"),
    "negative": ("relevant passages", "are given negatives of training rows"),
    "pool": ("relevant passages", "are in the candidate pool alone"),
}
SAID = {
    "query": "What a model was trained on it may have learnt by heart; ingest.exclude_benchmarks leaves out rows with "
    "a test query, and where it is true those with a relevant passage as positive.",
    "negative": "As a negative a model learns to rank a right answer low; ingest.exclude_benchmarks: true takes it out "
    "of the row.",
    "pool": "From the candidate pool a right answer may be mined as a negative; ingest.exclude_benchmarks: true keeps "
    "it out of the pool.",
}
SAID["positive"] = SAID["query"]


def leaks(path: Path) -> Html:
    """A row for each benchmark and kind of leak, and examples; a sentence where there is none."""
    totals = json.loads(tables.metadata(path)["totals"])
    found = scan(path).group_by("benchmark", "kind").agg(pl.col("id").n_unique()).collect()
    counts = {(benchmark, kind): n for benchmark, kind, n in found.iter_rows()}
    title = tag("h3", "Shared with the benchmarks")
    if not counts:
        names = ", ".join(totals)
        return join([title, paragraph(f"No query or relevant passage of {names} stands in the training data.")])
    rows = []
    for benchmark, (n_queries, n_passages) in totals.items():
        for kind, (what, where) in KINDS.items():
            if n := counts.get((benchmark, kind), 0):
                total = n_queries if kind == "query" else n_passages
                rows.append([benchmark, f"{what} that {where}", count(n), percent(n, total)])
    held = [kind for kind in KINDS if any(kind == other for _, other in counts)]
    same = "Texts that read the same but for case and white space; passages with their title or without."
    said = " ".join([same, *dict.fromkeys(SAID[kind] for kind in held)])
    shown = table(["benchmark", "what", "how many", "share"], rows, [2, 3])
    return join([title, paragraph(said, css="soft"), shown, _examples(path)])


def _examples(path: Path) -> Html:
    found = scan(path).select("benchmark", "kind", "text", "source", "n_rows").head(SHOWN).collect()
    rows = [
        [row["benchmark"], row["kind"], cut(row["text"], 120), tag("code", row["source"]) if row["source"] else "–",
         count(row["n_rows"])]
        for row in found.with_columns(pl.col("n_rows").cast(pl.Int64)).iter_rows(named=True)
    ]  # fmt: skip
    shown = table(["benchmark", "kind", "text", "first training row", "rows"], rows, [4])
    return details(f"The first {len(rows)} of {plural(tables.n_rows(path), 'text')}", shown)
