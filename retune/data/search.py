"""Exact top-k by inner product over sharded embeddings, in blocks, with bounded memory.

A float32 matrix product finds the candidates; their scores are then summed in float64, one pair at
a time, so that the result depends on neither shards, blocks nor threads.  Where rounding may have
hidden a better text, or more texts tie than there are spare candidates, the query is searched again
in float64.  Knows vectors and ids; nothing of texts, positives or filters.

Memory: two blocks of vectors (each at most `BLOCK_BYTES`) and about 100 bytes for each of the k + 16
candidates of each query of a batch, whatever the number of texts and however the files are laid out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from retune import tables
from retune.runtime import UserError, progress

SPARE = 16  # candidates beyond k: those which rounding may have put on the wrong side of the cut
BLOCK = 65536  # texts in memory at a time
BLOCK_BYTES = 2**27  # and their vectors' bytes
READ_BYTES = 2**22  # bytes of vectors decoded at a time
PAIRS = 128  # pairs multiplied at a time: their vectors fit a core's cache
TILE = 4096, 512  # texts and queries multiplied at a time in float64
ROUNDING, ROUNDING64 = 2.0**-24, 2.0**-53  # relative error of one operation, float32 and float64
IDENTITY = (
    "model",
    "revision",
    "pooling",
    "normalize",
    "truncate_dim",
)  # metadata that decides whether vectors compare


def blocks(shards: Sequence[Path | str], rows: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids int64 [n], vectors float32 [n, dim]), the same blocks however the rows are spread over shards.

    A thread reads one block ahead.  The arrays are written over when the next block is asked for: copy what is to stay.

    Args:
        rows: n of all blocks but the last; at most `BLOCK` and `BLOCK_BYTES` where not given.
    """
    found = _filled(shards, rows)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, found, None)
        while (block := coming.result()) is not None:
            coming = pool.submit(next, found, None)
            yield block


def _filled(shards: Sequence[Path | str], rows: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`blocks`, into two buffers by turns: one can be used while the other is filled."""
    buffers: list[tuple[np.ndarray, np.ndarray]] = []
    filled = 0
    for part in _batches(shards):
        part_ids, part_vectors = part["id"].to_numpy(), tables.vectors(part)
        if not buffers:
            dim = part_vectors.shape[1]
            rows = rows or max(1, min(BLOCK, BLOCK_BYTES // (4 * dim)))
            buffers = [(np.empty(rows, np.int64), np.empty((rows, dim), np.float32)) for _ in range(2)]
        start = 0
        while start < len(part_ids):
            ids, vectors = buffers[0]
            n = min(len(part_ids) - start, rows - filled)
            ids[filled : filled + n] = part_ids[start : start + n]
            vectors[filled : filled + n] = part_vectors[start : start + n]
            start, filled = start + n, filled + n
            if filled == rows:
                yield ids, vectors
                buffers.reverse()
                filled = 0
    if filled:
        yield buffers[0][0][:filled], buffers[0][1][:filled]


def _batches(shards: Sequence[Path | str]) -> Iterator[pa.RecordBatch]:
    """Every shard's rows by the `READ_BYTES`.

    Read through a small buffer: a mapped file counts as resident memory, and without a buffer a whole row group does.
    """
    for shard in shards:
        with pq.ParquetFile(shard, pre_buffer=False, buffer_size=2**20) as file:
            dim = file.schema_arrow.field("vector").type.list_size
            yield from file.iter_batches(max(1, READ_BYTES // (4 * dim)), columns=["id", "vector"])


def load(path: Path | str) -> np.ndarray:
    """All vectors of an embeddings table, float32 [n, dim], in row order."""
    found = [vectors.copy() for _, vectors in blocks([path])]
    return np.concatenate(found) if found else np.empty((0, 0), np.float32)


def dimension(shards: Sequence[Path | str]) -> int:
    return pq.read_schema(shards[0]).field("vector").type.list_size


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
    wanted, threads = text_ids[order], _threads()
    with ThreadPoolExecutor(threads) as pool:
        for ids, vectors in blocks(shards):
            low, high = np.searchsorted(wanted, [ids[0], ids[-1] + 1])

            def work(start: int, stop: int, ids: np.ndarray = ids, vectors: np.ndarray = vectors) -> None:
                pairs = order[start:stop]
                scores[pairs] = _inner(queries, query_rows[pairs], vectors, text_ids[pairs] - ids[0])

            cuts = [low + (high - low) * i // threads for i in range(threads + 1)]
            for _ in pool.map(work, cuts[:-1], cuts[1:]):
                pass
    return scores


def _inner(queries: np.ndarray, query_rows: np.ndarray, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Inner products of `queries[query_rows]` and `vectors[rows]`, float32 [n], each summed in float64 by itself."""
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), PAIRS):
        part = slice(start, start + PAIRS)
        left, right = queries[query_rows[part]], vectors[rows[part]]  # [P, D] each
        scores[part] = np.einsum("pd,pd->p", left.astype(np.float64), right.astype(np.float64))
    return scores


def _threads() -> int:
    """How many threads faiss uses: what the job was given."""
    import faiss

    return faiss.omp_get_max_threads()


def _nearest_faiss(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    return faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)


def _nearest_torch(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would err by more than `_top_k_once` reckons with
    try:
        right = torch.from_numpy(np.require(vectors, requirements="CW")).to(device)  # [T, D]
        parts = []
        for start in range(0, len(queries), 4096):
            left = torch.from_numpy(queries[start : start + 4096]).to(device)  # [4096, D]
            scores, rows = torch.topk(left @ right.T, k)  # [4096, k]
            parts.append((scores.cpu().numpy(), rows.cpu().numpy()))
    finally:
        torch.set_float32_matmul_precision(precision)
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


def chosen_blocks(shards: Sequence[Path | str], only: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`blocks` with the texts of the mask `only` bool [n_texts] alone; empty ones are left out."""
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
    for ids, vectors in chosen_blocks(shards, only):
        scores, rows = nearest(queries, vectors, min(wide, len(vectors)))
        longest = max(longest, float(np.einsum("td,td->t", vectors, vectors).max()) ** 0.5)
        both = np.concatenate([best, scores], 1)
        names = np.concatenate([found, ids[rows]], 1)
        keep = np.argpartition(-both, wide - 1, axis=1)[:, :wide]
        best, found = np.take_along_axis(both, keep, 1), np.take_along_axis(names, keep, 1)
    exact, names = rescored(queries, shards, found, k)
    # A text that was left out has a float32 score of at most `cut`, so a true one of at most `cut + error`; the
    # exact scores are themselves rounded to float32, hence the 2.
    cut = best.min(1).astype(np.float64)  # [Q]; -inf where no text was left out
    error = (queries.shape[1] + 2) * ROUNDING * longest * np.linalg.norm(queries.astype(np.float64), axis=1)  # [Q]
    unsure = np.flatnonzero((exact[:, -1] <= cut + error) & (cut > -np.inf))
    if len(unsure):
        exact[unsure], names[unsure] = _top_k_float64(queries[unsure], shards, k, only)
    return exact, names


def rescored(
    queries: np.ndarray, shards: Sequence[Path | str], found: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the texts `found` int64 [Q, W >= k] by their exact scores, as `top_k` returns them."""
    rows = np.repeat(np.arange(len(queries)), found.shape[1])
    exact = pair_scores(queries, shards, rows, found.ravel()).reshape(found.shape)
    names = np.where(found < 0, np.iinfo(np.int64).max, found)
    order = np.lexsort((names, -exact))[:, :k]  # score descending, then id
    return np.take_along_axis(exact, order, 1), np.take_along_axis(found, order, 1)


def _top_k_float64(
    queries: np.ndarray, shards: Sequence[Path | str], k: int, only: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """What `top_k` returns, from the scores of all texts: slower, but sure."""
    best = np.full((len(queries), k), -np.inf, np.float32)  # [Q, K], by rising id until the end
    found = np.full((len(queries), k), -1, np.int64)  # [Q, K]
    for ids, vectors in chosen_blocks(shards, only):
        for first in range(0, len(ids), TILE[0]):
            texts = vectors[first : first + TILE[0]].astype(np.float64)
            for start in range(0, len(queries), TILE[1]):
                part = slice(start, start + TILE[1])
                scores = _exact(queries[part].astype(np.float64), texts, best[part].min(1))  # [q, t]
                keep_best(best[part], found[part], scores, ids[first : first + TILE[0]])
    order = np.argsort(-best, axis=1, kind="stable")
    return np.take_along_axis(best, order, 1), np.take_along_axis(found, order, 1)


def _exact(queries: np.ndarray, texts: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Inner products of float64 [q, D] and [t, D] as `_inner` has them, where they exceed `least` [q]: float32 [q, t].

    BLAS sums in an order of its own.  Where that may matter to the rounded score, the pair is summed again.
    """
    near = queries @ texts.T  # [q, t]
    length = np.linalg.norm(queries, axis=1) * np.linalg.norm(texts, axis=1).max()  # [q]
    error = (2 * texts.shape[1] * ROUNDING64 * length)[:, None]
    scores, upper = (near - error).astype(np.float32), (near + error).astype(np.float32)
    rows, columns = np.nonzero((scores != upper) & (upper > least[:, None]))
    scores[rows, columns] = _inner(queries, rows, texts, columns)
    return scores


def keep_best(best: np.ndarray, found: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> None:
    """Merge scores float32 [q, t] of the texts `ids` [t] into the k best [q, k], in place, all by rising id."""
    rows = np.flatnonzero((scores > best.min(1)[:, None]).any(1))
    if not len(rows):
        return
    k = best.shape[1]
    both = np.concatenate([best[rows], scores[rows]], 1)  # [r, k + t]
    names = np.concatenate([found[rows], np.broadcast_to(ids, (len(rows), len(ids)))], 1)
    cut = np.partition(both, -k, axis=1)[:, [-k]]  # [r, 1]: the k-th best score
    above, tie = both > cut, both == cut
    keep = above | (tie & (np.cumsum(tie, 1) <= k - above.sum(1, keepdims=True)))  # of those that tie, the first
    at = np.nonzero(keep)[1].reshape(-1, k)
    best[rows], found[rows] = np.take_along_axis(both, at, 1), np.take_along_axis(names, at, 1)
