"""Vectors in files of their own: `.parquet`, `.npy`, or any other name for the bare numbers, row by row.

The bare numbers are what `numpy.memmap` takes and FlagEmbedding's eval_msmarco writes; such a file does not say
what it holds, so its size must fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from retune import tables
from retune.data.vectors import stored
from retune.runtime import UserError, atomic, progress

Put = Callable[[int, np.ndarray], object]  # takes the first row's number and vectors [n, dim]
DTYPES = ("float16", "float32")
BLOCK = 1 << 16  # rows


def write(shards: Sequence[Path], output: Path) -> tuple[tuple[int, int], str]:
    """Put the shards together in the form that the output's name asks for; returns shape and dtype."""
    rows = sum(tables.n_rows(path) for path in shards)
    blocks = (block for path in shards for block in stored(path))
    first = next(blocks)
    shape, dtype = (rows, first.shape[1]), str(first.dtype)
    if len(pq.read_schema(shards[0])) > 2:
        _all_columns(shards, output)
        return shape, dtype
    with WRITERS.get(output.suffix, _bare)(output, shape, dtype, shards[0]) as put:
        at = 0
        for block in itertools.chain([first], blocks):
            put(at, block)
            at += len(block)
    return shape, dtype


def _all_columns(shards: Sequence[Path], output: Path) -> None:
    """Put shards with the columns of several heads together."""
    with pq.ParquetFile(shards[0]) as first:
        schema = first.schema_arrow.remove_metadata()
    with tables.writer(output, schema, tables.metadata(shards[0])) as writer:
        for path in shards:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(1024):
                    writer.write(batch)


@contextmanager
def _array(output: Path, shape: tuple[int, int], dtype: str, shard: Path) -> Iterator[Put]:
    with atomic(output) as part:
        array = np.lib.format.open_memmap(part, "w+", dtype, shape)
        yield lambda at, block: array.__setitem__(slice(at, at + len(block)), block)
        array.flush()


@contextmanager
def _bare(output: Path, shape: tuple[int, int], dtype: str, shard: Path) -> Iterator[Put]:
    with atomic(output) as part, part.open("wb") as file:
        yield lambda at, block: file.write(np.ascontiguousarray(block).data)


@contextmanager
def _table(output: Path, shape: tuple[int, int], dtype: str, shard: Path) -> Iterator[Put]:
    with tables.writer(output, tables.embeddings_schema(shape[1], dtype), tables.metadata(shard)) as writer:
        yield lambda at, block: writer.write(
            {"id": np.arange(at, at + len(block)), "vector": tables.vector_array(block)}
        )


WRITERS = {".parquet": _table, ".npy": _array}


def read(path: Path, rows: int, dim: int, out: Path, meta: Mapping[str, str]) -> Path:
    """An embeddings table of the vectors in a file: the file itself, where it is one, else `out`.

    Args:
        rows, dim: how many there must be, and of how many dimensions.
        meta: what the table says of its model, where the file does not.

    Raises:
        UserError: for a file that is missing or holds other rows or dimensions.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of vectors; it is written with --save_embedding")
    if path.suffix == ".parquet":
        found = tables.n_rows(path)
        if "vector" not in (there := pq.read_schema(path).names):
            raise UserError(f"{path}: expected a table with the column `vector`, found {', '.join(there)}")
        _check(path, (found, next(stored(path)).shape[1] if found else dim), (rows, dim))
        return path
    array = _open(path, rows, dim)
    with (
        tables.writer(out, tables.embeddings_schema(dim, str(array.dtype)), meta) as writer,
        progress(rows, path.name, "vectors") as bar,
    ):
        for start in range(0, rows, BLOCK):
            block = np.asarray(array[start : start + BLOCK])
            if not np.isfinite(block).all():
                raise UserError(f"{path}: a vector of rows {start} to {start + len(block) - 1} is not finite")
            writer.write({"id": np.arange(start, start + len(block)), "vector": tables.vector_array(block)})
            bar.update(len(block))
    return out


def _open(path: Path, rows: int, dim: int) -> np.ndarray:
    """The array in a file [rows, dim], not read yet."""
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: not a whole .npy file ({error})") from None
        if str(array.dtype) not in DTYPES:
            raise UserError(f"{path}: expected {' or '.join(DTYPES)}, found {array.dtype}")
        _check(path, array.shape, (rows, dim))
        return array
    size = path.stat().st_size
    for dtype in DTYPES:
        if size == rows * dim * np.dtype(dtype).itemsize:
            return np.memmap(path, dtype, "r", shape=(rows, dim))
    wanted = " or ".join(f"{rows * dim * np.dtype(dtype).itemsize:,} ({dtype})" for dtype in DTYPES)
    raise UserError(f"{path}: {size:,} bytes, but {rows:,} passages of {dim} dimensions take {wanted}")


def _check(path: Path, found: tuple[int, ...], wanted: tuple[int, int]) -> None:
    if tuple(found) != wanted:
        raise UserError(f"{path}: vectors {list(found)}, expected [passages, dimensions] = {list(wanted)}")
