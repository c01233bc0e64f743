"""Exact top-k by inner product over sharded embeddings, in blocks, with bounded memory.

A float32 matrix product finds the candidates; their scores are then summed in float64, one pair at
a time, so that the result depends neither on shards and blocks nor on the machine.  Where rounding
may have hidden a better text, or more texts tie than there are spare candidates, the query is
searched again in float64.  Knows vectors and ids; nothing of texts, positives or filters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from retune import tables
from retune.runtime import UserError, progress

SPARE = 16  # candidates beyond k: those which rounding may have put on the wrong side of the cut
BLOCK = 65536  # texts in memory at a time
PAIRS = 512  # pairs multiplied at a time: their vectors fit a core's cache
ROUNDING = 2.0**-24  # relative error of one float32 operation
IDENTITY = ("model", "revision", "pooling", "normalize")  # metadata that decides whether vectors compare


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
    """Raise a UserError if queries and texts were not embedded by the same model in the same way."""
    wanted = tables.metadata(queries)
    for shard in shards:
        found = tables.metadata(shard)
        for key in IDENTITY:
            if found.get(key) != wanted.get(key):
                raise UserError(
                    f"{shard}: embedded by {key} {found.get(key)}, but {queries} by {wanted.get(key)}; "
                    "delete the older and run again"
                )


def pair_scores(
    queries: np.ndarray, shards: Sequence[Path | str], query_rows: np.ndarray, text_ids: np.ndarray
) -> np.ndarray:
    """Inner products of the pairs (query_rows[i], text_ids[i]), float32 [n], summed in float64.

    Args:
        queries: float32 [n_queries, dim].
        query_rows, text_ids: int64 [n]; a text id below 0 stands for none and scores -inf.
    """
    scores = np.full(len(text_ids), -np.inf, np.float32)
    order = np.argsort(text_ids, kind="stable")
    order = order[np.searchsorted(text_ids[order], 0) :]
    if not len(order):
        return scores
    wanted = text_ids[order]
    for ids, vectors in blocks(shards):
        low, high = np.searchsorted(wanted, [ids[0], ids[-1] + 1])
        for start in range(low, high, PAIRS):
            rows = order[start : min(start + PAIRS, high)]
            left, right = queries[query_rows[rows]], vectors[text_ids[rows] - ids[0]]  # [P, D] each
            scores[rows] = np.einsum("pd,pd->p", left.astype(np.float64), right.astype(np.float64))
    return scores


def _nearest_faiss(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    return faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)


def _nearest_torch(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    right = torch.from_numpy(np.require(vectors, requirements="CW")).to(device)  # [T, D]
    parts = []
    for start in range(0, len(queries), 4096):
        left = torch.from_numpy(queries[start : start + 4096]).to(device)  # [4096, D]
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
    queries: np.ndarray, shards: Sequence[Path | str], k: int, batch: int = 8192, nearest: str = "faiss",
    only: np.ndarray | None = None, bar: tqdm | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The k best texts of each query by inner product.

    Args:
        queries: float32 [n, dim].
        shards: embeddings tables whose ids rise from shard to shard.
        batch: queries searched in one pass over the texts.
        nearest: a key of `NEAREST`.
        only: bool [n_texts]: search these texts alone.
        bar: the progress bar of a longer search, of which this is a part.

    Returns:
        scores float32 [n, k], ids int64 [n, k]: score descending, ties by rising id; where there
        are fewer than k texts, the rest is -inf and -1.
    """
    queries = np.require(queries, np.float32, "CW")
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    with contextlib.nullcontext(bar) if bar is not None else progress(len(queries), "search", "queries") as shown:
        for start in range(0, len(queries), batch):
            part = slice(start, min(start + batch, len(queries)))
            scores[part], ids[part] = _top_k_once(queries[part], shards, k, NEAREST[nearest], only)
            shown.update(part.stop - part.start)
    return scores, ids


def _chosen_blocks(shards: Sequence[Path | str], only: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for ids, vectors in blocks(shards):
        keep = slice(None) if only is None else only[ids]
        if len(ids[keep]):
            yield ids[keep], vectors[keep]


def _top_k_once(
    queries: np.ndarray, shards: Sequence[Path | str], k: int, nearest: Callable, only: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    wide = k + SPARE
    best = np.full((len(queries), wide), -np.inf, np.float32)  # [Q, K+]
    found = np.full((len(queries), wide), -1, np.int64)  # [Q, K+]
    longest = 0.0
    for ids, vectors in _chosen_blocks(shards, only):
        scores, rows = nearest(queries, vectors, min(wide, len(vectors)))
        longest = max(longest, float(np.einsum("td,td->t", vectors, vectors).max()) ** 0.5)
        both = np.concatenate([best, scores], 1)
        names = np.concatenate([found, ids[rows]], 1)
        keep = np.argpartition(-both, wide - 1, axis=1)[:, :wide]
        best, found = np.take_along_axis(both, keep, 1), np.take_along_axis(names, keep, 1)
    rows = np.repeat(np.arange(len(queries)), wide)
    exact = pair_scores(queries, shards, rows, found.ravel()).reshape(found.shape)
    names = np.where(found < 0, np.iinfo(np.int64).max, found)
    order = np.lexsort((names, -exact))[:, :k]  # score descending, then id
    exact, found = np.take_along_axis(exact, order, 1), np.take_along_axis(found, order, 1)
    # A text that was left out has a float32 score of at most `cut`, so a true one of at most `cut + error`.
    cut = best.min(1)  # [Q]; -inf where no text was left out
    error = queries.shape[1] * ROUNDING * longest * np.linalg.norm(queries, axis=1)  # [Q]
    unsure = np.flatnonzero((exact[:, -1] <= cut + error) & (cut > -np.inf))
    if len(unsure):
        exact[unsure], found[unsure] = _top_k_float64(queries[unsure], shards, k, only)
    return exact, found


def _top_k_float64(
    queries: np.ndarray, shards: Sequence[Path | str], k: int, only: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """What `top_k` returns, from the scores of all texts: slow, but sure."""
    best = np.full((len(queries), k), -np.inf, np.float32)  # [Q, K]
    found = np.full((len(queries), k), -1, np.int64)  # [Q, K]
    for ids, vectors in _chosen_blocks(shards, only):
        wide = vectors.astype(np.float64)
        for row, query in enumerate(queries.astype(np.float64)):
            both = np.concatenate([best[row], (wide @ query).astype(np.float32)])
            names = np.concatenate([found[row], ids])
            order = np.argsort(-both, kind="stable")[:k]  # ids rise from block to block, so ties are in order
            best[row], found[row] = both[order], names[order]
    return best, found
