"""What benchmarks and training data share: queries and relevant passages that read the same.

A passage with a title is known with it and without.  In memory are 16 bytes for each query and each reading of a
relevant passage, never a text of the training data.  Knows the tables of benchmarks and training rows as they come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retune import tables
from retune.data.rows import Row
from retune.data.sources import Raw
from retune.data.store import Rows
from retune.data.text import digest, normalise
from retune.runtime import log


class Item(NamedTuple):
    """A query or passage of a benchmark, by its id there."""

    benchmark: str
    id: int


class Known:
    """Queries and relevant passages of benchmarks, by the digest of what they read.

    Attributes:
        queries, passages: {digest: the items that read so}. totals: {benchmark: (queries, relevant passages)}.
    """

    def __init__(
        self, benchmarks: Mapping[str, Mapping[str, Path | str]], levels: Mapping[str, int] | None = None
    ) -> None:
        """Read the benchmarks.

        Args:
            benchmarks: {name: {texts, queries, pairs: path of the table}}.
            levels: lowest grade of a relevant passage, by benchmark; 1 where not given.
        """
        self.queries: dict[bytes, list[Item]] = {}
        self.passages: dict[bytes, list[Item]] = {}
        self.totals: dict[str, tuple[int, int]] = {}
        for name, files in benchmarks.items():
            n_queries = n_passages = 0
            for id, text in _queries(files["queries"]):
                self.queries.setdefault(reading(text), []).append(Item(name, id))
                n_queries += 1
            for id, texts in _passages(files["texts"], _relevant(files["pairs"], (levels or {}).get(name, 1))):
                for key in dict.fromkeys(map(reading, texts)):
                    self.passages.setdefault(key, []).append(Item(name, id))
                n_passages += 1
            self.totals[name] = n_queries, n_passages

    def reason(self, query: str, pos: Sequence[str], passages: bool) -> str | None:
        """Why a training row gives a benchmark away; None where it does not.

        Args:
            passages: whether positives count, or the query alone.
        """
        if items := self.queries.get(reading(query)):
            return f"query: also a query of the benchmark {items[0].benchmark}"
        for text in pos if passages else ():
            if owner := self.owner(text):
                return f"pos: also a relevant passage of the benchmark {owner}"
        return None

    def owner(self, passage: str) -> str | None:
        """The first benchmark that a passage is relevant in; None where it is in none."""
        items = self.passages.get(reading(passage))
        return items[0].benchmark if items else None


class Excluded:
    """What gives a benchmark away is kept out of the training data and counted, where that is wanted.

    A row whose query or positive does is put among the rejected ones.  A negative, and a passage of the candidate
    pool, that is relevant in a benchmark is left out by itself: learnt as a negative it would count against the model.
    """

    def __init__(
        self, exclude: bool | str, benchmarks: Mapping[str, Mapping[str, Path | str]], rejected: Rows,
        levels: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        """`exclude` is `ingest.exclude_benchmarks`: False, True, or "queries" for the query's sake alone."""
        self._known = Known(benchmarks, levels) if exclude else None
        self._passages, self._rejected = exclude is True, rejected
        self._reasons: Counter[str] = Counter()
        self._alone: Counter[tuple[str, str]] = Counter()  # (what it is, benchmark)

    def takes(self, row: Row, dataset: str, path: Path, raw: Raw) -> bool:
        """Whether the row is left out."""
        reason = self._known.reason(row.query, row.pos, self._passages) if self._known else None
        if reason:
            self._reasons[reason] += 1
            text = raw.text()
            self._rejected.add((dataset, f"{path}:{raw.line}", reason, text), len(text))
        return reason is not None

    def drop_negatives(self, row: Row) -> bool:
        """Take the negatives that are relevant in a benchmark out of the row, with their scores; whether there are."""
        kept = [place for place, text in enumerate(row.neg) if not self.holds(text, "negatives of rows")]
        if len(kept) == len(row.neg):
            return False
        row.neg = [row.neg[place] for place in kept]
        if row.neg_scores is not None:
            row.neg_scores = [row.neg_scores[place] for place in kept]
        return True

    def holds(self, passage: str, what: str = "passages of ingest.corpus") -> bool:
        """Whether a passage is left out, as it is relevant in a benchmark; `what` it is says how it is counted."""
        owner = self._known.owner(passage) if self._known and self._passages else None
        if owner:
            self._alone[what, owner] += 1
        return owner is not None

    def tell(self) -> None:
        """Log how many rows, negatives and passages of the pool were left out, by reason."""
        for reason, count in self._reasons.most_common():
            log.info("ingest.exclude_benchmarks: %s rows are left out: %s", f"{count:,}", reason)
        for (what, owner), count in self._alone.items():
            log.info(
                "ingest.exclude_benchmarks: %s %s are left out: also relevant passages of the benchmark %s",
                f"{count:,}", what, owner,
            )  # fmt: skip


def reading(text: str) -> bytes:
    """16 bytes that stand for what a text reads, whatever its case and white space."""
    return digest(normalise(text))


def _relevant(pairs: Path | str, level: int) -> np.ndarray:
    """Ids of the passages with a judgment of `level` or above, rising."""
    table = tables.read(pairs, "pairs", ["text_id", "label"])
    return np.unique(table["text_id"].to_numpy()[table["label"].to_numpy() >= level])


def _queries(path: Path | str) -> Iterator[tuple[int, str]]:
    """(id, text) of a table's queries, in order."""
    for batch in tables.batches(path, "queries", ["query_id", "text"]):
        yield from zip(batch["query_id"].to_pylist(), batch["text"].to_pylist(), strict=True)


def _passages(path: Path | str, wanted: np.ndarray) -> Iterator[tuple[int, list[str]]]:
    """(id, texts) of the wanted passages, in order: a passage as it is, and without its title where it has one."""
    for batch in tables.batches(path, "texts", ["text_id", "text", "body"]):
        batch = batch.filter(np.isin(batch["text_id"].to_numpy(), wanted))
        starts = batch["body"].to_pylist() if "body" in batch.schema.names else [None] * len(batch)
        for id, text, start in zip(batch["text_id"].to_pylist(), batch["text"].to_pylist(), starts, strict=True):
            yield id, [text] if start is None else [text, text[start:]]
