"""leakage: training tables and benchmarks → what they share, counted and named.

Texts are compared as they read, without case and white space.  Both sides stream: in memory are digests of
the benchmarks' queries and relevant passages, and what was found.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from retune import tables
from retune.data.leakage import Item, Known, reading
from retune.data.text import shown
from retune.runtime import log

SHOWN = 3
TOTALS = "totals"  # in the table's metadata: {benchmark: [queries, relevant passages]}
KINDS = {
    "query": "queries stand in the training data",
    "positive": "relevant passages as positives stand in the training data",
    "negative": "relevant passages as negatives stand in the training data",
    "pool": "relevant passages stand in the candidate pool alone",
}


def leakage(
    *, train: Mapping[str, Path], benchmarks: Mapping[str, Mapping[str, Path]], out: Path,
    levels: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """Write the table `leakage`: a row for each query and passage of a benchmark that the training data hold.

    Args:
        train: the tables texts, queries and pairs of the training data.
        benchmarks: {name: the same tables}.
        levels: lowest grade of a relevant passage, by benchmark; 1 where not given.
    """
    known = Known(benchmarks, levels)
    found = [*_queries(train["queries"], known), *_passages(train, known)]
    totals = json.dumps({name: list(counts) for name, counts in known.totals.items()})
    rows = {name: [row[name] for row in found] for name in tables.TABLES["leakage"].names}
    tables.write(out, "leakage", rows, {TOTALS: totals})
    for benchmark, (n_queries, n_passages) in known.totals.items():
        for kind, what in KINDS.items():
            mine = [row for row in found if (row["benchmark"], row["kind"]) == (benchmark, kind)]
            if mine:
                log.log(
                    logging.INFO if kind == "pool" else logging.WARNING, "%s: %s of %s %s, for example %s", benchmark,
                    f"{len({row['id'] for row in mine}):,}", f"{n_queries if kind == 'query' else n_passages:,}", what,
                    ", ".join(map(_named, mine[:SHOWN])),
                )  # fmt: skip
    if not found:
        log.info("nothing of %s stands in the training data", ", ".join(known.totals))


def _named(row: Mapping[str, object]) -> str:
    return shown(row["text"]) + (f" ({row['source']})" if row["source"] else "")


def _row(item: Item, kind: str, text: str, n_rows: int, source: str | None) -> dict[str, object]:
    return {
        "benchmark": item.benchmark, "kind": kind, "id": item.id, "text": text, "n_rows": n_rows, "source": source
    }  # fmt: skip


def _queries(table: Path, known: Known) -> Iterator[dict[str, object]]:
    """Queries of benchmarks that are queries of training rows, in the order in which training has them."""
    found: dict[bytes, tuple[str, str, int]] = {}  # text, first source, rows
    for batch in tables.batches(table, "queries", ["text", "source"]):
        for text, source in zip(batch["text"].to_pylist(), batch["source"].to_pylist(), strict=True):
            key = reading(text)
            if key in known.queries:
                first_text, first, count = found.get(key, (text, source, 0))
                found[key] = first_text, first, count + 1
    for key, (text, source, count) in found.items():
        for item in known.queries[key]:
            yield _row(item, "query", text, count, source)


def _passages(train: Mapping[str, Path], known: Known) -> Iterator[dict[str, object]]:
    """Relevant passages of benchmarks that are positives or negatives of training rows, or in the pool alone.

    Kind by kind, each by the texts' order.
    """
    held: dict[int, tuple[bytes, str]] = {}  # training text's id → digest, text
    for batch in tables.batches(train["texts"], "texts", ["text_id", "text"]):
        for id, text in zip(batch["text_id"].to_pylist(), batch["text"].to_pylist(), strict=True):
            key = reading(text)
            if key in known.passages:
                held[id] = key, text
    if not held:
        return
    uses: dict[tuple[int, bool], list[int]] = {}  # (text, positive?) → [first query, rows]
    ids = np.fromiter(held, np.int64)
    for batch in tables.batches(train["pairs"], "pairs", ["query_id", "text_id", "label"]):
        part = batch.filter(np.isin(batch["text_id"].to_numpy(), ids))
        for query, text, label in zip(*(part[name].to_pylist() for name in part.schema.names), strict=True):
            uses.setdefault((text, label > 0), [query, 0])[1] += 1
    sources = _sources(train["queries"], {first for first, _ in uses.values()})
    for kind, positive in (("positive", True), ("negative", False)):
        for id, (key, text) in held.items():
            if (id, positive) in uses:
                first, count = uses[id, positive]
                for item in known.passages[key]:
                    yield _row(item, kind, text, count, sources[first])
    given = {id for id, _ in uses}
    for id, (key, text) in held.items():
        if id not in given:
            for item in known.passages[key]:
                yield _row(item, "pool", text, 0, None)


def _sources(table: Path, wanted: set[int]) -> dict[int, str]:
    """{query: `file:line`}."""
    found: dict[int, str] = {}
    ids = np.fromiter(sorted(wanted), np.int64)
    for batch in tables.batches(table, "queries", ["query_id", "source"]):
        part = batch.filter(np.isin(batch["query_id"].to_numpy(), ids))
        found |= zip(part["query_id"].to_pylist(), part["source"].to_pylist(), strict=True)
    return found
