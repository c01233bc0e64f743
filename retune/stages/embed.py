"""embed: texts or queries → vectors, one shard of them, streamed to Parquet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retune import tables
from retune.config import EmbedConfig, EmbedderConfig
from retune.model.embedder import Embedder
from retune.runtime import UserError, log, progress

BLOCK = 32768  # texts tokenised and sorted by length at a time


def shard_rows(n: int, index: int, count: int) -> tuple[int, int]:
    """The first and last row (excluded) of shard `index` of `count`, for a table of `n` rows."""
    return n * index // count, n * (index + 1) // count


def embed(
    *, table: Path, kind: str, settings: EmbedConfig, embedder: EmbedderConfig, out: Path,
    shard: tuple[int, int] = (0, 1),
) -> None:  # fmt: skip
    """Write vectors of the rows of a `texts` or `queries` table.

    Args:
        kind: "query" reads a table of queries, "passage" one of texts.
        shard: (index, count): embed only that part of the rows.
        out: embeddings table: id int64, vector of `settings.dtype`.

    Raises:
        UserError: for a vector that is not finite, or that `settings.dtype` cannot hold.
    """
    model = Embedder.load(embedder)
    start, stop = shard_rows(tables.n_rows(table), *shard)
    log.info("%s: rows %d to %d, %s on %s", Path(table).name, start, stop, model.dtype, model.device)
    schema = tables.embeddings_schema(model.dim, settings.dtype)
    with (
        tables.writer(out, schema, fingerprint(model, kind)) as writer,
        progress(stop - start, "embed", "texts") as bar,
    ):
        for ids, texts, instructions in _rows(table, kind, start, stop):
            tokens = model.tokenize(texts, kind, instructions)
            vectors = model.encode(tokens, settings.max_tokens_per_batch, bar)
            with np.errstate(over="ignore"):  # the next lines tell of it
                vectors = vectors.astype(settings.dtype)
            if not np.isfinite(vectors).all():
                bad = int(ids[np.argmin(np.isfinite(vectors).all(1))])
                raise UserError(
                    f"{table}: row {bad}: its vector is not finite; set embedder.dtype and embed.dtype to float32, "
                    "or the model is broken"
                )
            writer.write({"id": ids, "vector": tables.vector_array(vectors)})


def _rows(table: Path, kind: str, start: int, stop: int):
    """(ids, texts, instructions or None) of rows start to stop, in blocks."""
    name, column = ("queries", "query_id") if kind == "query" else ("texts", "text_id")
    wanted = [column, "text", "prompt"] if kind == "query" else [column, "text"]
    seen = 0
    for batch in tables.batches(table, name, wanted, BLOCK):
        first, last = max(start - seen, 0), min(stop - seen, len(batch))
        seen += len(batch)
        if first < last:
            part: pa.RecordBatch = batch.slice(first, last - first)
            prompts = part["prompt"].to_pylist() if kind == "query" and part["prompt"].null_count < len(part) else None
            yield part[column].to_numpy(), part["text"].to_pylist(), prompts
        if seen >= stop:
            break


def fingerprint(model: Embedder, kind: str) -> Mapping[str, Any]:
    """What tells vectors of one model from another's: model, pooling, prompt, length."""
    prompt = model.prompts[kind]
    return {
        "model": model.settings.model, "revision": str(model.settings.revision), "kind": kind,
        "pooling": model.card.pooling, "normalize": str(model.card.normalize), "dtype": str(model.dtype),
        "prompt": prompt.template.format(prompt.instruction or "", "{text}"),
        "max_length": str(model.max_lengths[kind]),
    }  # fmt: skip
