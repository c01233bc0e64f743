"""Rows of a table of texts through the embedder, on one device or several.

Several devices get one process each, which runs this module on a job file, and the rows are dealt
to them a few at a time, so that long and short ones spread evenly.  Knows nothing of caches.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from retune import processes, tables
from retune.config import EmbedConfig, EmbedderConfig
from retune.data import headcolumns, vectors
from retune.model.device import named
from retune.model.embedder import Embedder
from retune.runtime import UserError, log

BLOCK = 32768  # texts tokenised and sorted by length at a time
HEADED = 1024  # texts whose tokens' vectors are held at a time
DEALT = 1024  # texts in a row that one of several devices gets
WORTH_A_DEVICE = 2048  # texts that take longer than starting a process


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a table of queries (`kind` "query") or of texts ("passage")."""

    table: Path
    kind: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, list[str], list | None]]:
        """(ids, texts, instructions or None) in blocks of `BLOCK` rows; of `wanted` rows only (bool [n])."""
        name, column = ("queries", "query_id") if self.kind == "query" else ("texts", "text_id")
        columns = [column, "text", "prompt"] if self.kind == "query" else [column, "text"]
        held = pa.Table.from_batches([], tables.TABLES[name]).select(columns)
        for batch in self._batches(name, columns, wanted):
            held = pa.concat_tables([held, pa.Table.from_batches([batch]).cast(held.schema)])
            while len(held) >= BLOCK:
                yield _columns(held.slice(0, BLOCK))
                held = held.slice(BLOCK)
        if len(held):
            yield _columns(held)

    def _batches(self, name: str, columns: list[str], wanted: np.ndarray | None) -> Iterator[pa.RecordBatch]:
        seen = 0
        for batch in tables.batches(self.table, name, columns, BLOCK):
            first, last = max(self.start - seen, 0), min(self.stop - seen, len(batch))
            if first < last:
                part = batch.slice(first, last - first)
                if wanted is not None:
                    at = seen + first - self.start
                    part = part.filter(pa.array(wanted[at : at + len(part)]))
                yield part
            seen += len(batch)
            if seen >= self.stop:
                break


def digests(model: Embedder, rows: Rows) -> np.ndarray:
    """Which text each row is, as the model reads it, instruction and all: uint64 [n, 2]."""
    parts = [np.empty((0, 2), np.uint64)]
    for _, texts, instructions in rows.blocks():
        parts.append(vectors.digests(model.read(texts, rows.kind, instructions)))
    return np.concatenate(parts)


def _columns(part: pa.Table) -> tuple[np.ndarray, list[str], list | None]:
    prompts = part["prompt"] if "prompt" in part.column_names else None
    own = prompts.to_pylist() if prompts is not None and prompts.null_count < len(part) else None
    return part[0].to_numpy(), part["text"].to_pylist(), own


def _encode(
    model: Embedder, rows: Rows, wanted: np.ndarray, settings: EmbedConfig, bar: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, vectors of `settings.dtype`) of the wanted rows, by the block."""
    for ids, texts, instructions in rows.blocks(wanted):
        block = model.encode_texts(texts, rows.kind, instructions, settings.max_tokens_per_batch, bar)
        yield ids, _stored(block, ids, rows, settings)


def headed(model: Embedder, rows: Rows, settings: EmbedConfig, bar: Any) -> Iterator[dict[str, Any]]:
    """The columns of an embeddings table with what several heads make of the rows, by the block."""
    for ids, texts, instructions in rows.blocks():
        for start in range(0, len(texts), HEADED):
            part = slice(start, start + HEADED)
            own = None if instructions is None else instructions[part]
            budget = settings.max_tokens_per_batch
            found = model.encode_heads(texts[part], rows.kind, settings.heads, own, budget, bar)
            columns = {"id": ids[part], "vector": tables.vector_array(_stored(found.dense, ids[part], rows, settings))}
            if found.tokens is not None:
                columns |= headcolumns.columns(found.tokens.values, found.weights.values, found.tokens.offsets)
            if found.colbert is not None:
                vectors = _stored(found.colbert.values, ids[part], rows, settings)
                columns["colbert"] = headcolumns.colbert_column(vectors, found.colbert.offsets)
            yield columns


def _stored(block: np.ndarray, ids: np.ndarray, rows: Rows, settings: EmbedConfig) -> np.ndarray:
    """Vectors in the dtype they are stored in.

    Raises:
        UserError: for one that is not finite, or that the dtype cannot hold.
    """
    with np.errstate(over="ignore"):  # the next lines tell of it
        block = block.astype(settings.dtype, copy=False)
    if not np.isfinite(block).all():
        single = len(block) == len(ids)
        where = f"row {ids[np.argmin(np.isfinite(block).all(1))]}" if single else f"rows {ids[0]} to {ids[-1]}"
        raise UserError(
            f"{rows.table}: {where}: its vector is not finite; set embedder.dtype and embed.dtype to float32, "
            "or the model is broken"
        )
    return block


class Stream:
    """Blocks of vectors, to be taken in pieces of any size."""

    def __init__(self, blocks: Iterable[np.ndarray]) -> None:
        self._blocks, self._rest = iter(blocks), np.empty((0, 0))

    def take(self, n: int) -> np.ndarray:
        """The next `n` vectors, [n, dim]; [0, 0] for none."""
        parts = []
        while n:
            if not len(self._rest):
                self._rest = next(self._blocks)
            parts.append(self._rest[:n])
            self._rest, n = self._rest[n:], n - len(parts[-1])
        return np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.empty((0, 0))


@contextmanager
def encoded(
    model: Embedder, rows: Rows, wanted: np.ndarray, settings: EmbedConfig, devices: Sequence[str], out: Path, bar: Any
) -> Iterator[Stream]:
    """The vectors of the wanted rows, in their order."""
    count = min(len(devices), -(-int(wanted.sum()) // WORTH_A_DEVICE))
    if count < 2:
        yield Stream(block for _, block in _encode(model, rows, wanted, settings, bar))
        return
    folder = out.with_name(f".{out.name}.parts")
    shutil.rmtree(folder, ignore_errors=True)  # of a job that was killed
    folder.mkdir(parents=True)
    try:
        parts = _on_devices(model, rows, wanted, settings, devices[:count], folder, bar)
        yield Stream(_in_turn([Stream(vectors.stored(part)) for part in parts], int(wanted.sum())))
    finally:
        shutil.rmtree(folder)


def _on_devices(
    model: Embedder, rows: Rows, wanted: np.ndarray, settings: EmbedConfig, devices: Sequence[str], folder: Path,
    bar: Any,
) -> list[Path]:  # fmt: skip
    """Embeddings tables, one a device, each of the wanted rows that are dealt to it; this process is the first's."""
    turn = np.cumsum(wanted) - 1  # [n], how many wanted ones come before a wanted row
    shares = [wanted & (turn // DEALT % len(devices) == number) for number in range(len(devices))]
    parts = [folder / f"part-{number}.parquet" for number in range(len(devices))]
    jobs = []
    for device, share, part in list(zip(devices, shares, parts, strict=True))[1:]:
        np.save(part.with_suffix(".npy"), share)
        jobs.append(
            {
                "table": str(rows.table), "kind": rows.kind, "start": rows.start, "stop": rows.stop, "part": str(part),
                "settings": settings.model_dump(mode="json"), "device": device,
                "embedder": model.settings.model_dump(mode="json"),
            }
        )  # fmt: skip
    threads = max(1, torch.get_num_threads() // len(devices))
    log.info("%d texts on %s", wanted.sum(), ", ".join(devices))
    with processes.working("retune.data.encode", jobs, folder, bar, threads) as others, _threads(threads):
        _write_part(model, rows, shares[0], settings, parts[0], others)
    return parts


def _in_turn(parts: Sequence[Stream], n: int) -> Iterator[np.ndarray]:
    """`n` vectors in the order of their rows, from parts that `_on_devices` dealt."""
    for start in range(0, n, DEALT):
        yield parts[start // DEALT % len(parts)].take(min(DEALT, n - start))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_part(
    model: Embedder, rows: Rows, wanted: np.ndarray, settings: EmbedConfig, part: Path, bar: Any
) -> None:  # fmt: skip
    with tables.writer(part, tables.embeddings_schema(model.dim, settings.dtype)) as writer:
        for ids, block in _encode(model, rows, wanted, settings, bar):
            writer.write({"id": ids, "vector": tables.vector_array(block)})


def all_gpus() -> list[str]:
    """The names of this process's GPUs, where there are several."""
    count = torch.cuda.device_count()
    return [f"cuda:{number}" for number in range(count)] if count > 1 else []


def main(job: dict[str, Any]) -> None:
    """One of several processes: embed its share of the rows."""
    model = Embedder.load(EmbedderConfig.model_validate(job["embedder"]), target=named(job["device"]))
    rows, part = Rows(Path(job["table"]), job["kind"], job["start"], job["stop"]), Path(job["part"])
    share = np.load(part.with_suffix(".npy"))
    _write_part(model, rows, share, EmbedConfig.model_validate(job["settings"]), part, processes.Told())


if __name__ == "__main__":
    sys.exit(processes.run_job(main, Path(sys.argv[1])))
