"""Tables written one row at a time, in bounded memory: texts (each stored once), queries, pairs."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from retune.data.text import digest
from retune.tables import Writer

ROWS = 65536  # of a batch
CHARACTERS = 1 << 25  # of a batch's texts


class Rows:
    """Collects rows and hands them on to a table's writer in batches."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._rows: list[tuple] = []
        self._characters = 0
        self.count = 0

    def add(self, row: tuple, characters: int = 0) -> int:
        """Append a row, its values in the order of the table's columns; returns its row number.

        `characters` is the length of its texts: a batch of long ones is written earlier.
        """
        self._rows.append(row)
        self._characters += characters
        self.count += 1
        if len(self._rows) >= ROWS or self._characters >= CHARACTERS:
            self.flush()
        return self.count - 1

    def flush(self) -> None:
        """Write what is collected; call it at the end."""
        if self._rows:
            columns = list(map(list, zip(*self._rows, strict=True)))
            self._writer.write(dict(zip(self._writer.schema.names[: len(columns)], columns, strict=True)))
            self._rows, self._characters = [], 0


class Texts:
    """The table of texts, each distinct one stored once, in first-seen order; 16 bytes a text are kept.

    Args:
        keyed: whether a text's id is also its `key`.
    """

    def __init__(self, writer: Writer, keyed: bool = False) -> None:
        self._writer, self._keyed = writer, keyed
        self._ids: dict[bytes, int] = {}
        self._new: list[str] = []
        self._characters = 0

    @property
    def count(self) -> int:
        return len(self._ids)

    def ids_of(self, texts: Iterable[str], digests: Sequence[bytes] | None = None) -> list[int]:
        """The ids of `texts`; new ones are stored.  `digests` are theirs, where they are known already."""
        ids, found = self._ids, []
        for text, key in zip(texts, digests or map(digest, texts), strict=True):
            number = ids.get(key)
            if number is None:
                number = ids[key] = len(ids)
                self._new.append(text)
                self._characters += len(text)
            found.append(number)
        if len(self._new) >= ROWS or self._characters >= CHARACTERS:
            self.flush()
        return found

    def flush(self) -> None:
        """Write what is collected; call it at the end."""
        if self._new:
            ids = pa.array(np.arange(self.count - len(self._new), self.count))
            keys = ids.cast(pa.large_string()) if self._keyed else pa.nulls(len(ids), pa.large_string())
            self._writer.write({"text_id": ids, "text": self._new, "key": keys})
            self._new, self._characters = [], 0


class Pairs:
    """The table of pairs, given a query at a time: its positives, then its negatives."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.count = 0
        self._start()

    def _start(self) -> None:
        self._queries, self._n_pos, self._n_neg, self._text_ids = array("q"), array("q"), array("q"), array("q")
        self._scores: list[float | None] = []

    def add(self, query: int, pos: Sequence[int], neg: Sequence[int], scores: Sequence[float] | None = None) -> None:
        """Append a query's pairs: ids of its texts, and scores of all of them, in that order, if there are any."""
        self._queries.append(query)
        self._n_pos.append(len(pos))
        self._n_neg.append(len(neg))
        self._text_ids.extend(pos)
        self._text_ids.extend(neg)
        self._scores.extend(scores or [None] * (len(pos) + len(neg)))
        self.count += len(pos) + len(neg)
        if len(self._text_ids) >= ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is collected; call it at the end."""
        if not self._text_ids:
            return
        n_pos, n_neg = np.array(self._n_pos), np.array(self._n_neg)
        per_query = np.stack([n_pos, n_neg], axis=1).reshape(-1)  # positives, negatives, positives, …
        labels = np.repeat(np.tile(np.array([1, 0], dtype=np.int8), len(n_pos)), per_query)
        rows = len(self._text_ids)
        self._writer.write(
            {
                "query_id": np.repeat(np.array(self._queries), n_pos + n_neg),
                "text_id": np.array(self._text_ids),
                "label": labels,
                "origin": pa.repeat(pa.scalar("given", pa.large_string()), rows),
                "similarity": pa.nulls(rows, pa.float32()),
                "score": pa.array(self._scores, pa.float32()),
            }
        )
        self._start()
