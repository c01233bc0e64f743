"""The tables in which stages meet: their columns, checked at every read and write.

A table is a Parquet file.  Writes are atomic; row order is part of the contract.  `id` columns
count from 0 in row order, so that an id is a row number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retune.runtime import UserError, atomic


def _schema(**columns: pa.DataType) -> pa.Schema:
    """Columns in order; a name that ends in `_` may hold nulls (the `_` is dropped)."""
    return pa.schema([pa.field(name.rstrip("_"), kind, nullable=name.endswith("_")) for name, kind in columns.items()])


i8, i32, i64, f32, f64, text = pa.int8(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.large_string()

TABLES: dict[str, pa.Schema] = {
    # key: the passage's or query's own id in its source (a benchmark's `_id`)
    # body: place in the text, in characters, where a passage of a benchmark begins behind its title; null without one
    "texts": _schema(text_id=i64, text=text, key_=text, body_=i32),
    # split is "train" or "dev", a benchmark's its own ("test"); source is `file:line` of the query's row
    "queries": _schema(
        query_id=i64, dataset=text, text=text, key_=text, prompt_=text, type_=text, in_batch_negatives=pa.bool_(),
        batch_size_=i32, split=text, source=text,
        category_=text,  # what the query's class or cluster is called
    ),
    # label 1 positive, 0 negative (a benchmark's grade may exceed 1); origin "given", "mined" or "random"
    "pairs": _schema(query_id=i64, text_id=i64, label=i8, origin=text, similarity_=f32, score_=f32),
    # pairs as mine writes them; rank: the place in the retriever's ranking, from 0, of a mined negative
    "mined": _schema(query_id=i64, text_id=i64, label=i8, origin=text, similarity_=f32, score_=f32, rank_=i32),
    # what mining did, in counts: retune/data/funnel.py says which
    "mining": _schema(measure=text, name=text, value=f64),
    # row: the whole rejected row as JSON where it could be read, else the raw line
    "rejected": _schema(dataset=text, source=text, reason=text, row=text),
    # one row a distinct (query text, passage): query_id is the first query of its text
    "scores": _schema(query_id=i64, text_id=i64, score=f32),
    # what a benchmark shares with the training data: its queries (kind "query") and relevant passages that are a
    # positive ("positive") or a given negative ("negative") of training rows, or only in the candidate pool ("pool");
    # id: of the query or passage in the benchmark; n_rows: training rows that have it; source: `file:line` of the first
    "leakage": _schema(benchmark=text, kind=text, id=i64, text=text, n_rows=i64, source_=text),
    "lengths": _schema(text_id=i64, n_tokens=i32),
    # n_tokens: the longest of the query, its positives and its negatives
    "bins": _schema(query_id=i64, n_tokens=i32, length_bin=text),
    "run": _schema(query_id=i64, text_id=i64, rank=i32, score=f32),
    # query_id null: the mean, with its 95% bootstrap interval and the p-value against base
    "metrics": _schema(
        model=text, benchmark=text, measure=text, cutoff=i32, query_id_=i64, value=f64, low_=f64, high_=f64,
        p_value_=f64,
    ),
    # merging weights that were tried, one for each model, in the order that the file's metadata has under `models`;
    # value: of a measure (null: none was taken) of that mixture on a collection ("examples", "dev", a guard set)
    "weights": _schema(
        mixture=i32, weights=pa.list_(f64), collection_=text, measure_=text, value_=f64, chosen=pa.bool_()
    ),
    # one row a logged step of training
    # grad_norm (before it is clipped) and learning_rate: the step's own; all else: means since the row before,
    # over all processes: similarity of the positives and of the negatives, share of queries whose positive scores
    # best, tokens a second, share of padding
    "history": _schema(
        step=i64, epoch=f64, loss_=f64, learning_rate_=f64, grad_norm_=f64, positive_similarity_=f64,
        negative_similarity_=f64, accuracy_=f64, tokens_per_second_=f64, padding_=f64,
        sparse_nonzero_=f64,  # share of tokens that M3's sparse head weighs at all
        dev_=f64,  # what the queries that were set aside say: nDCG@10 of an embedder, MRR of a reranker
    ),
}  # fmt: skip


LATER = ("category", "body")  # columns that a table need not have: then they are null


def embeddings_schema(dim: int, dtype: str, sparse: bool = False, colbert_dim: int | None = None) -> pa.Schema:
    """Columns of an embeddings table: id int64, vector fixed_size_list<dtype>[dim].

    With `sparse`, also the tokens that weigh something, rising, and their weights: tokens list<int32>, weights
    list<float>.  With `colbert_dim`, a vector for each token but the first: colbert list<fixed_size_list<dtype>>.
    """
    kind = {"float16": pa.float16(), "float32": pa.float32()}[dtype]

    def vector(width: int) -> pa.DataType:
        return pa.list_(pa.field("element", kind, nullable=False), width)

    columns = {"id": i64, "vector": vector(dim)}
    if sparse:
        columns |= {"tokens": pa.list_(i32), "weights": pa.list_(f32)}
    if colbert_dim:
        columns["colbert"] = pa.list_(vector(colbert_dim))
    return pa.schema([pa.field(name, of, nullable=False) for name, of in columns.items()])


def _check(found: pa.Schema, name: str, path: str | Path) -> None:
    wanted = TABLES[name]
    wanted = [field for field in wanted if field.name in found.names or field.name not in LATER]
    missing = [field.name for field in wanted if field.name not in found.names]
    if missing:
        raise UserError(f"{path}: not a table of {name}: column {missing[0]} is missing; delete the file and run again")
    for field in wanted:
        kind = found.field(field.name).type
        if kind != field.type and not (pa.types.is_string(kind) and pa.types.is_large_string(field.type)):
            raise UserError(f"{path}: column {field.name}: expected {field.type}, found {kind}")


def _open(path: str | Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such table") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file ({error}); delete it and run again") from None


def read(path: str | Path, name: str, columns: list[str] | None = None) -> pa.Table:
    """The table at `path`, one of `TABLES`, with its columns checked.

    Raises:
        UserError: if the file is missing, truncated or has other columns.
    """
    with _open(path) as file:
        _check(file.schema_arrow, name, path)
        table = file.read(columns=columns or TABLES[name].names)
    for column in columns or TABLES[name].names:
        if column in LATER and column not in table.column_names:
            table = table.append_column(
                TABLES[name].field(column), pa.nulls(len(table), TABLES[name].field(column).type)
            )
    wanted = pa.schema([TABLES[name].field(column) for column in table.column_names])
    return table.cast(wanted)


def batches(
    path: str | Path, name: str, columns: list[str] | None = None, rows: int = 65536
) -> Iterator[pa.RecordBatch]:
    """The table at `path` in record batches of at most `rows` rows."""
    with _open(path) as file:
        _check(file.schema_arrow, name, path)
        yield from file.iter_batches(rows, columns=columns or TABLES[name].names)


def n_rows(path: str | Path) -> int:
    with _open(path) as file:
        return file.metadata.num_rows


def metadata(path: str | Path) -> dict[str, str]:
    """The file's own key-value metadata."""
    with _open(path) as file:
        found = file.schema_arrow.metadata or {}
    return {key.decode(): value.decode() for key, value in found.items()}


@contextmanager
def writer(path: str | Path, schema: str | pa.Schema, meta: Mapping[str, str] | None = None) -> Iterator[Writer]:
    """A writer of rows by the batch; the table appears at `path`, whole, when the block ends well."""
    wanted = TABLES[schema] if isinstance(schema, str) else schema
    if meta:
        wanted = wanted.with_metadata(dict(meta))
    vectors = any(pa.types.is_fixed_size_list(field.type) for field in wanted)
    with atomic(path) as part:
        options = {"compression": "none" if vectors else "zstd", "use_dictionary": not vectors}
        with pq.ParquetWriter(part, wanted, **options) as file:
            yield Writer(file, wanted)


class Writer:
    """Appends batches of rows to a table that is being written."""

    def __init__(self, file: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._file, self.schema = file, schema

    def write(self, rows: pa.Table | pa.RecordBatch | Mapping[str, object]) -> None:
        """Append rows: an Arrow table, or columns by name (lists, numpy or Arrow arrays).

        Raises:
            ValueError: for a column that is missing, unknown, of another type, or null where it may not be.
        """
        if isinstance(rows, pa.RecordBatch):
            rows = pa.Table.from_batches([rows])
        columns = {n: rows[n] for n in rows.column_names} if isinstance(rows, pa.Table) else dict(rows)
        n_rows = len(next(iter(columns.values()))) if columns else 0
        columns |= {n: pa.nulls(n_rows) for n in self.schema.names if n in LATER and n not in columns}
        if set(columns) != set(self.schema.names):
            raise ValueError(f"expected columns {self.schema.names}, found {list(columns)}")
        arrays = []
        for field in self.schema:
            column = columns[field.name]
            if not isinstance(column, (pa.Array, pa.ChunkedArray)):
                column = pa.array(column, field.type)
            column = column if column.type == field.type else column.cast(field.type)
            if column.null_count and not field.nullable:
                raise ValueError(f"column {field.name}: {column.null_count} nulls where none may be")
            arrays.append(column)
        self._file.write_table(pa.table(arrays, schema=self.schema))


def write(
    path: str | Path, name: str, rows: pa.Table | Mapping[str, object], meta: Mapping[str, str] | None = None
) -> None:
    """Write a whole table at once."""
    with writer(path, name, meta) as out:
        out.write(rows)


def vectors(batch: pa.RecordBatch | pa.Table) -> np.ndarray:
    """The `vector` column as an array [rows, dim] without a copy where it is one chunk."""
    column = batch["vector"]
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), column.type.list_size)


def vector_array(values: np.ndarray) -> pa.Array:
    """An array [rows, dim] as a `vector` column."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    kind = pa.list_(pa.field("element", flat.type, nullable=False), values.shape[1])
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)
