"""What benchmarks and training data share: queries and relevant passages that read the same.

In memory are 16 bytes for each query and each relevant passage of the benchmarks, never a text of the
training data.  Knows the tables of benchmarks and training rows as they come.
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

    def __init__(self, benchmarks: Mapping[str, Mapping[str, Path | str]]) -> None:
        """`benchmarks` are {name: {texts, queries, pairs: path of the table}}."""
        self.queries: dict[bytes, list[Item]] = {}
        self.passages: dict[bytes, list[Item]] = {}
        self.totals: dict[str, tuple[int, int]] = {}
        for name, files in benchmarks.items():
            n_queries = n_passages = 0
            for id, text in _texts(files["queries"], "queries", "query_id"):
                self.queries.setdefault(reading(text), []).append(Item(name, id))
                n_queries += 1
            for id, text in _texts(files["texts"], "texts", "text_id", _relevant(files["pairs"])):
                self.passages.setdefault(reading(text), []).append(Item(name, id))
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
            if items := self.passages.get(reading(text)):
                return f"pos: also a relevant passage of the benchmark {items[0].benchmark}"
        return None


class Excluded:
    """Training rows that give a benchmark away: put among the rejected ones and counted, where that is wanted."""

    def __init__(self, exclude: bool | str, benchmarks: Mapping[str, Mapping[str, Path | str]], rejected: Rows) -> None:
        """`exclude` is `ingest.exclude_benchmarks`: False, True, or "queries" for the query's sake alone."""
        self._known = Known(benchmarks) if exclude else None
        self._passages, self._rejected = exclude is True, rejected
        self._reasons: Counter[str] = Counter()

    def takes(self, row: Row, dataset: str, path: Path, raw: Raw) -> bool:
        """Whether the row is left out."""
        reason = self._known.reason(row.query, row.pos, self._passages) if self._known else None
        if reason:
            self._reasons[reason] += 1
            text = raw.text()
            self._rejected.add((dataset, f"{path}:{raw.line}", reason, text), len(text))
        return reason is not None

    def tell(self) -> None:
        """Log how many rows were left out, by reason."""
        for reason, count in self._reasons.most_common():
            log.info("ingest.exclude_benchmarks: %s rows are left out: %s", f"{count:,}", reason)


def reading(text: str) -> bytes:
    """16 bytes that stand for what a text reads, whatever its case and white space."""
    return digest(normalise(text))


def _relevant(pairs: Path | str) -> np.ndarray:
    """Ids of the passages with a positive judgment, rising."""
    table = tables.read(pairs, "pairs", ["text_id", "label"])
    return np.unique(table["text_id"].to_numpy()[table["label"].to_numpy() > 0])


def _texts(path: Path | str, name: str, column: str, wanted: np.ndarray | None = None) -> Iterator[tuple[int, str]]:
    """(id, text) of a table's rows, in order; of `wanted` ids only."""
    for batch in tables.batches(path, name, [column, "text"]):
        if wanted is not None:
            batch = batch.filter(np.isin(batch[column].to_numpy(), wanted))
        yield from zip(batch[column].to_pylist(), batch["text"].to_pylist(), strict=True)
