"""What M3's heads store beside vectors, searched: weighted tokens by a sparse product, tokens' vectors pair by pair.

Tables are streamed once whatever the number of queries; a score depends on its pair alone.  Knows arrays
and ids; nothing of models or texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_array, vstack

from retune.data.search import keep_best
from retune.runtime import UserError, log

QUERIES, TEXTS = 1024, 8192  # of a sparse product, whose scores are held
ROWS = 256  # texts whose tokens' vectors are read at a time


def _batches(table: Path, names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(table, pre_buffer=False, buffer_size=2**20) as file:
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{table}: it has no {missing[0]}; embed with the head that makes it (embed.heads)")
        yield from file.iter_batches(rows, columns=names)


# ---- sparse -------------------------------------------------------------------------------------


def _bags(batch: pa.RecordBatch, width: int) -> csr_array:
    """Tokens' weights as a sparse matrix [rows, width], float64."""
    tokens, weights = batch["tokens"], batch["weights"]
    offsets = tokens.offsets.to_numpy() - tokens.offsets[0].as_py()
    ids, values = tokens.flatten().to_numpy(), weights.flatten().to_numpy().astype(np.float64)
    return csr_array((values, ids, offsets), shape=(len(batch), width))


def _width(tables: Sequence[Path]) -> int:
    """One more than the largest token."""
    largest = 0
    for table in tables:
        for batch in _batches(table, ["tokens"], 1 << 16):
            largest = max(largest, int(batch["tokens"].flatten().to_numpy().max(initial=0)))
    return largest + 1


def _all_bags(table: Path, width: int) -> csr_array:
    """Of a whole table of queries."""
    parts = [_bags(batch, width) for batch in _batches(table, ["tokens", "weights"], 1 << 16)]
    found = vstack(parts, format="csr") if parts else csr_array((0, width))
    if not found.nnz:
        log.warning("%s: no token of any query weighs anything: the sparse head has collapsed", table)
    return found


def sparse_top_k(queries: Path, texts: Sequence[Path], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k texts of each query with the largest product of tokens' weights; texts without a common token never.

    Returns:
        scores float32 [q, k], ids int64 [q, k]: score descending, ties by rising id; where there are
        fewer than k texts, the rest is -inf and -1.
    """
    width = _width([queries, *texts])
    left = _all_bags(queries, width)  # [q, V]
    scores = np.full((left.shape[0], k), -np.inf, np.float32)
    found = np.full((left.shape[0], k), -1, np.int64)
    for table in texts:
        for batch in _batches(table, ["id", "tokens", "weights"], TEXTS):
            right, ids = _bags(batch, width).T.tocsc(), batch["id"].to_numpy()  # [V, t]
            for start in range(0, left.shape[0], QUERIES):
                part = slice(start, start + QUERIES)
                products = (left[part] @ right).toarray().astype(np.float32)  # [b, t]
                products[products <= 0] = -np.inf
                keep_best(scores[part], found[part], products, ids)
    found[scores == -np.inf] = -1
    order = np.lexsort((np.where(found < 0, np.iinfo(np.int64).max, found), -scores))
    return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)


def sparse_pairs(queries: Path, texts: Sequence[Path], rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Products of the tokens' weights of the pairs (query row, text id), float32 [n]."""
    width = _width([queries, *texts])
    left = _all_bags(queries, width)

    def score(batch: pa.RecordBatch, pairs: np.ndarray, places: np.ndarray) -> np.ndarray:
        right = _bags(batch, width)
        return (left[rows[pairs]] * right[places]).sum(1)

    return _streamed(texts, ["tokens", "weights"], TEXTS, ids, score)


# ---- colbert ------------------------------------------------------------------------------------


def _token_vectors(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """(vectors float32 [t, c], offsets int64 [rows + 1]) of the column colbert."""
    column = batch["colbert"]
    rows = column.flatten()
    vectors = rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), rows.type.list_size)
    return vectors.astype(np.float32), column.offsets.to_numpy().astype(np.int64) - column.offsets[0].as_py()


def colbert_pairs(queries: Path, texts: Sequence[Path], rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Late interaction of the pairs (query row, text id), float32 [n]: see `objective/heads.py`."""
    wanted: list[np.ndarray] = []  # of each query, [t, c]
    for batch in _batches(queries, ["colbert"], ROWS):
        vectors, offsets = _token_vectors(batch)
        wanted += np.split(vectors, offsets[1:-1])

    def score(batch: pa.RecordBatch, pairs: np.ndarray, places: np.ndarray) -> np.ndarray:
        vectors, offsets = _token_vectors(batch)
        found = np.zeros(len(pairs))
        for at, (pair, place) in enumerate(zip(pairs, places, strict=True)):
            left, right = wanted[rows[pair]], vectors[offsets[place] : offsets[place + 1]]
            if len(left) and len(right):
                found[at] = (left @ right.T).max(1).mean(dtype=np.float64)
        return found

    return _streamed(texts, ["colbert"], ROWS, ids, score)


def _streamed(
    texts: Sequence[Path], names: list[str], size: int, ids: np.ndarray,
    score: Callable[[pa.RecordBatch, np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:  # fmt: skip
    """Scores of pairs whose texts come by batches, float32 [n]; -inf where the id is -1.

    Args:
        score: (batch, pairs whose text is in it, the texts' rows there) → their scores.
    """
    scores = np.full(len(ids), -np.inf, np.float32)
    order = np.argsort(ids, kind="stable")
    for table in texts:
        for batch in _batches(table, ["id", *names], size):
            own = batch["id"].to_numpy()
            if not len(own):
                continue
            low, high = np.searchsorted(ids[order], [own[0], own[-1] + 1])
            pairs = order[low:high]
            if len(pairs):
                scores[pairs] = score(batch, pairs, ids[pairs] - own[0])
    return scores
