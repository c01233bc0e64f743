"""Queries with their positives and mined negatives, to look at: the most suspicious, and some drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from retune.data.negatives import SUSPECT_MARGIN, below
from retune.report.page import Html, cut, decimal, details, join, paragraph, plural, signed, tag
from retune.report.pairs import lowest_positives
from retune.report.spread import scan

POSITIVES, NEGATIVES = 2, 6  # passages shown of a query
CHARACTERS = 240  # shown of a passage


@dataclass(frozen=True)
class Shown:
    """What the shown queries' texts and pairs are.

    rows: of each query, {"text_id", "label", "origin", "similarity", "rank", "score", "became"} of its pairs.
    """

    queries: Mapping[int, str]
    texts: Mapping[int, str]
    rows: Mapping[int, Sequence[Mapping[str, object]]]
    unit: str


def examples(inputs: Mapping[str, Path], path: Path, n: int, unit: str) -> Html:
    """`n` queries of the table `mined` at `path`: half of them those with the most suspicious negatives.

    A negative is the more suspicious, the more it exceeds its query's lowest positive: in the teacher's score where
    there is one, else in similarity (called `unit`).
    """
    found = pl.DataFrame()
    if "pairs" in inputs:
        found, by = _excess(inputs["pairs"], "score"), "the teacher's score"
    if not found.height:
        found, by = _excess(path, "similarity"), unit
    excess = dict(found.iter_rows())
    worst = list(excess)[: n - n // 2]
    others = np.array(sorted(set(excess) - set(worst)), np.int64)
    drawn = np.random.default_rng(0).choice(others, min(n - len(worst), len(others)), replace=False)
    drawn = sorted(int(query) for query in drawn)
    shown = _load([*worst, *drawn], inputs, path, unit)
    note = f"The number before a query: how much higher its highest negative is than its lowest positive, by {by}."
    parts = [tag("h3", "Negatives to look at"), paragraph(note, css="soft")]
    for title, chosen in (("The most suspicious", worst), ("Drawn at random", drawn)):
        boxes = [_example(shown, query, excess[query]) for query in chosen]
        parts += [tag("h4", title), *boxes] if boxes else []
    return join(parts) if worst or drawn else Html("")


def _excess(path: Path, column: str) -> pl.DataFrame:
    """query_id and by how much its highest mined negative exceeds its lowest positive in `column`, falling."""
    frame = scan(path).filter(pl.col(column).is_not_null())
    negatives = frame.filter((pl.col("label") == 0) & (pl.col("origin") == "mined"))
    highest = negatives.group_by("query_id").agg(pl.col(column).max().alias("highest"))
    both = highest.join(lowest_positives(frame, column), on="query_id")
    both = both.select("query_id", (pl.col("highest") - pl.col("lowest")).alias("excess"))
    return both.sort(-pl.col("excess"), "query_id").collect(engine="streaming")


def _load(ids: Sequence[int], inputs: Mapping[str, Path], path: Path, unit: str) -> Shown:
    """Only what the page shows is read."""
    wanted = pl.col("query_id").is_in(list(ids))
    frame = scan(path).filter(wanted)
    if "rank" not in frame.collect_schema():
        frame = frame.with_columns(rank=pl.lit(None, pl.Int32))
    pairs = frame.select("query_id", "text_id", "label", "origin", "similarity", "rank", "score").collect()
    final: dict[tuple[int, int], tuple] = {}
    if "pairs" in inputs:
        later = scan(inputs["pairs"]).filter(wanted).select("query_id", "text_id", "label", "score").collect()
        final = {(query, text): (label, score) for query, text, label, score in later.iter_rows()}
    rows: dict[int, list[dict]] = {}
    for row in pairs.iter_rows(named=True):
        label, score = final.get((row["query_id"], row["text_id"]), (None, row["score"]))
        became = "" if not final or label == row["label"] else "made a positive" if label else "left out"
        rows.setdefault(row["query_id"], []).append(row | {"score": score, "became": became})
    read = sorted({row["text_id"] for each in rows.values() for row in _first(each)})
    texts = scan(inputs["texts"]).filter(pl.col("text_id").is_in(read)).select("text_id", "text").collect()
    queries = scan(inputs["queries"]).filter(wanted).select("query_id", "text").collect()
    return Shown(dict(queries.iter_rows()), dict(texts.iter_rows()), rows, unit)


def _first(rows: Sequence[Mapping]) -> list[Mapping]:
    """The pairs that are shown: the least similar positives, which decide, then the most similar mined negatives."""
    positives = sorted((row for row in rows if row["label"] > 0), key=lambda row: (row["similarity"], row["text_id"]))
    mined = [row for row in rows if row["label"] == 0 and row["origin"] == "mined"]
    mined.sort(key=lambda row: (-row["similarity"] if row["score"] is None else -row["score"], row["text_id"]))
    return [*positives[:POSITIVES], *mined[:NEGATIVES]]


def _example(shown: Shown, query: int, excess: float) -> Html:
    rows = shown.rows[query]
    positive = [row for row in rows if row["label"] > 0]
    line = below(min((row["similarity"] for row in positive), default=float("inf")), SUSPECT_MARGIN)
    scores = [row["score"] for row in positive if row["score"] is not None]
    wanted, items = [], []
    for row in _first(rows):
        facts = [f"{shown.unit} {decimal(row['similarity'])}"]
        facts += [f"rank {row['rank']}"] if row["rank"] is not None else []
        facts += [f"teacher {decimal(row['score'], 2)}"] if row["score"] is not None else []
        facts += [f"{row['became']} by the teacher"] if row["became"] else []
        said, text = ", ".join(facts), cut(shown.texts.get(row["text_id"], ""), CHARACTERS)
        if row["label"] > 0:
            wanted.append(tag("p", tag("b", f"Positive, {said}: "), text, css="wanted"))
        else:
            above = row["score"] is not None and scores and row["score"] > min(scores)
            css = "suspected" if above or row["similarity"] >= line else ""
            items.append(tag("li", tag("b", f"{said}: "), text, css=css))
    more = len(positive) - len(wanted), sum(row["origin"] == "mined" and row["label"] == 0 for row in rows) - len(items)
    notes = [plural(n, f"more {what}") for n, what in zip(more, ("positive", "negative"), strict=True) if n > 0]
    note = paragraph("… and " + ", ".join(notes), css="note") if notes else ""
    change = tag("span", signed(excess), css=f"change {'bad' if excess > 0 else 'good'}")
    title = join([change, cut(shown.queries.get(query, f"query {query}"), CHARACTERS)])
    return details(title, *wanted, tag("ol", *items, css="passages"), note, css="example")
