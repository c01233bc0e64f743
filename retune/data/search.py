"""Exact top-k by inner product over sharded embeddings, in blocks, with bounded memory.

A matrix product finds the candidates; their scores are then computed one pair at a time, in a
fixed order, so that the result does not depend on how the texts are cut into shards and blocks.
Knows vectors and ids; nothing of texts, queries' positives or filters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from retune import tables
from retune.runtime import UserError, progress

SPARE = 16  # candidates beyond k: those which rounding may have put on the wrong side of the cut
BLOCK = 65536  # texts in memory at a time


def blocks(shards: Sequence[Path | str], rows: int = BLOCK) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids int64 [n], vectors float32 [n, dim]) of every shard in turn."""
    for shard in shards:
        with pq.ParquetFile(shard, memory_map=True) as file:
            for batch in file.iter_batches(rows):
                yield batch["id"].to_numpy(), tables.vectors(batch).astype(np.float32, copy=False)


def load(path: Path | str) -> np.ndarray:
    """All vectors of an embeddings table, float32 [n, dim], in row order."""
    found = [vectors for _, vectors in blocks([path])]
    return np.concatenate(found) if found else np.empty((0, 0), np.float32)


def count(shards: Sequence[Path | str]) -> int:
    return sum(tables.n_rows(shard) for shard in shards)


def same_model(queries: Path | str, shards: Sequence[Path | str]) -> None:
    """Raise a UserError if queries and texts were not embedded by the same model."""
    wanted = tables.metadata(queries).get("model")
    for shard in shards:
        if (found := tables.metadata(shard).get("model")) != wanted:
            raise UserError(
                f"{shard}: embedded by model {found}, but {queries} by {wanted}; delete the older and run again"
            )


def pair_scores(
    queries: np.ndarray, shards: Sequence[Path | str], query_rows: np.ndarray, text_ids: np.ndarray
) -> np.ndarray:
    """Inner products of the pairs (query_rows[i], text_ids[i]), float32 [n], each computed by itself.

    Args:
        queries: float32 [n_queries, dim].
        query_rows, text_ids: int64 [n]; a text id below 0 stands for none and scores -inf.
    """
    order = np.argsort(text_ids, kind="stable")
    wanted = text_ids[order]
    scores = np.full(len(text_ids), -np.inf, np.float32)
    for ids, vectors in blocks(shards):
        low, high = np.searchsorted(wanted, [ids[0], ids[-1] + 1])
        for start in range(low, high, 16384):
            rows = order[start : min(start + 16384, high)]
            left, right = queries[query_rows[rows]], vectors[text_ids[rows] - ids[0]]
            scores[rows] = np.einsum("nd,nd->n", left, right)
    return scores


def _nearest_faiss(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    return faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)


def _nearest_torch(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    right = torch.from_numpy(np.ascontiguousarray(vectors)).to(device)
    parts = []
    for start in range(0, len(queries), 4096):
        left = torch.from_numpy(np.ascontiguousarray(queries[start : start + 4096])).to(device)
        scores, rows = torch.topk(left @ right.T, k)  # [4096, k]
        parts.append((scores.cpu().numpy(), rows.cpu().numpy()))
    return np.concatenate([s for s, _ in parts]), np.concatenate([r for _, r in parts])


NEAREST = {"faiss": _nearest_faiss, "torch": _nearest_torch}


def backend() -> str:
    """torch where there is a GPU, faiss elsewhere; without a driver torch need not be asked."""
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
        return "faiss"
    import torch

    return "torch" if torch.cuda.is_available() else "faiss"


def top_k(
    queries: np.ndarray, shards: Sequence[Path | str], k: int, batch: int = 8192, nearest: str = "faiss"
) -> tuple[np.ndarray, np.ndarray]:
    """The k best texts of each query by inner product.

    Args:
        queries: float32 [n, dim].
        shards: embeddings tables whose ids rise from shard to shard.
        batch: queries searched in one pass over the texts.
        nearest: a key of `NEAREST`.

    Returns:
        scores float32 [n, k], ids int64 [n, k]: score descending, ties by rising id; where there
        are fewer than k texts, the rest is -inf and -1.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    with progress(len(queries), "search", "queries") as bar:
        for start in range(0, len(queries), batch):
            part = slice(start, min(start + batch, len(queries)))
            scores[part], ids[part] = _top_k_once(queries[part], shards, k, NEAREST[nearest])
            bar.update(part.stop - part.start)
    return scores, ids


def _top_k_once(queries: np.ndarray, shards: Sequence[Path | str], k: int, nearest) -> tuple[np.ndarray, np.ndarray]:
    wide = k + SPARE
    best = np.full((len(queries), wide), -np.inf, np.float32)  # [Q, K+]
    found = np.full((len(queries), wide), -1, np.int64)  # [Q, K+]
    for ids, vectors in blocks(shards):
        scores, rows = nearest(queries, vectors, min(wide, len(vectors)))
        both = np.concatenate([best, scores], 1)
        names = np.concatenate([found, ids[rows]], 1)
        if both.shape[1] > wide:
            keep = np.argpartition(-both, wide - 1, axis=1)[:, :wide]
            best, found = np.take_along_axis(both, keep, 1), np.take_along_axis(names, keep, 1)
        else:
            best, found = both, names
    rows = np.repeat(np.arange(len(queries)), found.shape[1])
    exact = pair_scores(queries, shards, rows, found.ravel()).reshape(found.shape)
    names = np.where(found < 0, np.iinfo(np.int64).max, found)
    order = np.lexsort((names, -exact))[:, :k]  # score descending, then id
    return np.take_along_axis(exact, order, 1), np.take_along_axis(found, order, 1)
