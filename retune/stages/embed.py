"""embed: texts or queries → vectors, one shard of them, streamed to Parquet.

Vectors of texts that were embedded before come from the cache; only the others are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retune import tables
from retune.config import EmbedConfig, EmbedderConfig
from retune.data import encode, vectors
from retune.data.contents import folder_hash
from retune.fingerprint import fingerprint as code_fingerprint
from retune.model import embedder as model_code
from retune.model import multihead, parts
from retune.model.device import named
from retune.model.embedder import Embedder
from retune.model.usage import looks_both_ways
from retune.runtime import log, progress


def shard_rows(n: int, index: int, count: int) -> tuple[int, int]:
    """The first and last row (excluded) of shard `index` of `count`, for a table of `n` rows."""
    return n * index // count, n * (index + 1) // count


def embed(
    *, table: Path, kind: str, settings: EmbedConfig, embedder: EmbedderConfig, out: Path,
    shard: tuple[int, int] = (0, 1), cache: Path | None = None, devices: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write vectors of the rows of a `texts` or `queries` table.

    Args:
        kind: "query" reads a table of queries, "passage" one of texts.
        shard: (index, count): embed only that part of the rows.
        out: embeddings table: id int64, vector of `settings.dtype`.
        cache: folder of the vectors of earlier runs, which gets these too.
        devices: such as "cuda:0" and "cuda:1": a process each; the best one alone where not given.

    Raises:
        UserError: for a vector that is not finite, or that `settings.dtype` cannot hold, and for a device
            that is not there.
    """
    model = Embedder.load(embedder, target=named(devices[0]) if devices else None)
    multihead.check(model, settings.heads)
    rows = encode.Rows(Path(table), kind, *shard_rows(tables.n_rows(table), *shard))
    log.info("%s: rows %d to %d, %s on %s", rows.table.name, rows.start, rows.stop, model.dtype, model.device)
    if settings.heads != ["dense"]:
        log.info("%s: the vector cache has dense alone, so all is computed", ", ".join(settings.heads))
        _write_heads(model, rows, settings, out)
        return
    if cache is None:
        _write(model, rows, settings, devices, out, vectors.Found.nothing(len(rows)))
        return
    known = vectors.Cache(cache, identity(model, kind, settings, cache))
    digests = encode.digests(model, rows)
    found = known.find(digests)
    log.info("%s of %s vectors taken from the cache", f"{found.mask.sum():,}", f"{len(rows):,}")
    _write(model, rows, settings, devices, out, found)
    known.add(out, digests, found)


def _write(
    model: Embedder, rows: encode.Rows, settings: EmbedConfig, devices: Sequence[str], out: Path, found: vectors.Found
) -> None:
    """Write the found vectors and the computed others, in the order of their rows."""
    missing = ~found.mask
    schema = tables.embeddings_schema(model.dim, settings.dtype)
    with (
        tables.writer(out, schema, fingerprint(model, rows.kind)) as writer,
        progress(int(missing.sum()), "embed", "texts") as bar,
        encode.encoded(model, rows, missing, settings, devices, Path(out), bar) as computed,
    ):
        for start in range(0, len(rows), encode.BLOCK):
            new = missing[start : start + encode.BLOCK]
            block = computed.take(int(new.sum()))
            if not new.all():
                whole = np.empty((len(new), model.dim), settings.dtype)
                whole[~new] = found.take(start, start + len(new))
                if new.any():
                    whole[new] = block
                block = whole
            ids = np.arange(len(new)) + rows.start + start
            writer.write({"id": ids, "vector": tables.vector_array(block)})


def _write_heads(model: Embedder, rows: encode.Rows, settings: EmbedConfig, out: Path) -> None:
    """Write what several heads make of the rows, on one device; nothing of it goes through the cache."""
    width = model.heads.colbert_dim if "colbert" in settings.heads else None
    schema = tables.embeddings_schema(model.dim, settings.dtype, "sparse" in settings.heads, width)
    with (
        tables.writer(out, schema, fingerprint(model, rows.kind)) as writer,
        progress(len(rows), "embed", "texts") as bar,
    ):
        for columns in encode.headed(model, rows, settings, bar):
            writer.write(columns)


def fingerprint(model: Embedder, kind: str) -> Mapping[str, str]:
    """What tells vectors of one model from another's: model, pooling, prompt, length."""
    prompt = model.prompts[kind]
    return {
        "model": model.settings.model, "revision": str(model.settings.revision), "kind": kind, **_parts(model),
        "pooling": model.card.pooling, "normalize": str(model.card.normalize), "dtype": str(model.dtype),
        "prompt": prompt.apply(["{text}"])[0],
        "max_length": str(model.max_lengths[kind]), "truncate_dim": str(model.card.truncate_dim),
    }  # fmt: skip


def _parts(model: Embedder) -> Mapping[str, str]:
    """What else than the checkpoint the model is read from."""
    found = {key: getattr(model.settings, key) for key in ("peft_path", "config_name", "tokenizer_name")}
    return {key: value for key, value in found.items() if value}


def identity(model: Embedder, kind: str, settings: EmbedConfig, cache: Path) -> dict[str, Any]:
    """All that decides a stored vector but its text: the checkpoint by its content, the code by its meaning.

    Prompts are not in it, since they are part of the text that the model reads, nor are devices and
    sizes of batches, which move a vector by rounding alone.
    """
    made_of = parts.locate(model.settings)
    hashes = [folder_hash(folder, cache / ".checkpoints") for folder in made_of.folders]
    return {
        "checkpoint": hashes[0] if len(hashes) == 1 else hashes, "code": code_fingerprint(model_code.__file__),
        "remote_code": model.settings.trust_remote_code, "family": model.card.family,
        "both_ways": looks_both_ways(model.settings, made_of), "pooling": model.card.pooling,
        "normalize": model.card.normalize, "max_length": model.max_lengths[kind],
        "truncate_dim": model.card.truncate_dim, "dim": model.dim, "dtype": str(model.dtype),
        "stored": settings.dtype,
    }  # fmt: skip
