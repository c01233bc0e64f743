"""The nearest texts of a part of all texts, kept in a file, and put together as if all had been searched at once.

A part is searched exactly, and in the same order of queries as any other.  So the best k of all texts are the best k
of the parts' best k, with the same scores, and texts that tie come in the order of their ids: the same bytes.
Knows ids and scores; nothing of vectors, words or filters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retune import tables
from retune.runtime import UserError

ROWS = 1024  # queries decoded at a time
READ_BYTES = 2**16  # of each column of a part, read at a time

Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # query ids int64 [Q], scores float32 [Q, k], text ids int64 [Q, k]


def schema(k: int) -> pa.Schema:
    """Columns: query_id int64, score list<float32>[k], text_id list<int64>[k]; where there are fewer, -inf and -1."""

    def several(kind: pa.DataType) -> pa.DataType:
        return pa.list_(pa.field("element", kind, nullable=False), k)

    kinds = {"query_id": pa.int64(), "score": several(pa.float32()), "text_id": several(pa.int64())}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


def write(path: Path, k: int, found: Iterable[Found]) -> None:
    """Write what was found for one block of queries after the other."""
    with tables.writer(path, schema(k)) as out:
        for query_ids, scores, text_ids in found:
            columns = {"score": tables.vector_array(scores), "text_id": tables.vector_array(text_ids)}
            out.write({"query_id": query_ids} | columns)


class Parts:
    """The files of all parts, read once, from front to back.

    Memory: of each part no more than about `ROWS` queries between two calls, however many are taken at a time.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._rows = [_Rows(path) for path in self._paths]

    def take(self, query_ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best texts of the next queries over all parts: scores float32 [Q, k], ids int64 [Q, k].

        Raises:
            UserError: where a part holds other queries, or was searched for another k.
        """
        best = np.full((len(query_ids), k), -np.inf, np.float32)
        names = np.full((len(query_ids), k), -1, np.int64)
        for path, rows in zip(self._paths, self._rows, strict=True):
            found, scores, ids = rows.take(len(query_ids))
            if not np.array_equal(found, query_ids) or scores.shape[1] != k:
                raise UserError(f"{path}: found for other queries, or not {k} texts for each; delete it and run again")
            best, names = _best(np.concatenate([best, scores], 1), np.concatenate([names, ids], 1), k)
        return best, names


def _best(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of scores [Q, n] and ids [Q, n]: score descending, ties by rising id, none (-1) last."""
    order = np.lexsort((np.where(ids < 0, np.iinfo(np.int64).max, ids), -scores))[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


class _Rows:
    """The rows of a file, as many at a time as are asked for."""

    def __init__(self, path: Path) -> None:
        self._batches, self._left = _decoded(path), None

    def take(self, n: int) -> Found:
        parts = [self._left] if self._left is not None else []
        while sum(len(part[0]) for part in parts) < n and (batch := next(self._batches, None)) is not None:
            parts.append(batch)
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        self._left = tuple(column[n:].copy() for column in columns)  # a view would keep the whole block, in every part
        return tuple(column[:n] for column in columns)


def _decoded(path: Path) -> Iterator[Found]:
    try:
        # Nothing read ahead, and no row group as a whole: these are of all parts at once.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES) as file:
            k = file.schema_arrow.field("score").type.list_size
            yield np.empty(0, np.int64), np.empty((0, k), np.float32), np.empty((0, k), np.int64)
            for batch in file.iter_batches(ROWS):
                columns = (batch[name].flatten().to_numpy().reshape(len(batch), k) for name in ("score", "text_id"))
                yield batch["query_id"].to_numpy(), *columns
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"{path}: not a whole table of found texts ({error}); delete it and run again") from None
