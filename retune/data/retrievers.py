"""Who finds candidates for negatives: vectors (exact or through an index), words (BM25), or both fused.

A retriever ranks texts for queries and tells the similarity of any pair, on which all filters work:
an inner product of vectors, or the BM25 score where there are none.  Knows nothing of positives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from tqdm import tqdm

from retune import tables
from retune.config import MineConfig, bounds
from retune.data import search
from retune.data.found import Parts
from retune.runtime import UserError

if TYPE_CHECKING:
    from retune.data.index import Index
    from retune.data.lexical import Lexical

DEPTH = 2  # the fused rankings are so many times as long as what is asked for: a text may be low in one of them
PAIRS = 65536  # pairs whose queries' texts are in memory at a time

Ranking = tuple[np.ndarray, np.ndarray]


class Retriever(Protocol):
    def search(self, rows: np.ndarray, k: int, only: np.ndarray | None, bar: tqdm) -> Ranking:
        """The k best texts of the queries `rows` int64 [Q], the best first.

        Args:
            only: bool [T]: rank these texts alone.
            bar: moved on by Q.

        Returns:
            similarity float32 [Q, k], ids int64 [Q, k]; where there are fewer texts, the rest is -inf and -1.
        """

    def pair_scores(self, query_ids: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
        """The similarity of the pairs (query_ids[i], text_ids[i]), float32 [n]."""


class Dense:
    """By inner product of vectors."""

    def __init__(self, vectors: np.ndarray, shards: Sequence[Path], top_k: Callable[..., Ranking]) -> None:
        """`vectors` float32 [Q, D] of the queries; `top_k` (vectors [n, D], k, only=, bar=) → scores, ids [n, k]."""
        self._vectors, self._shards, self._top_k = vectors, shards, top_k

    def search(self, rows: np.ndarray, k: int, only: np.ndarray | None, bar: tqdm) -> Ranking:
        return self._top_k(self._vectors[rows], k, only=only, bar=bar)

    def pair_scores(self, query_ids: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
        return search.pair_scores(self._vectors, self._shards, query_ids, text_ids)


class Searched(Dense):
    """By inner product, searched before: part of the texts by part, in other jobs.

    Queries must be asked for in the order in which `mineset.Pools.batches` gives them, and once.
    """

    def __init__(self, vectors: np.ndarray, shards: Sequence[Path], parts: Parts) -> None:
        self._vectors, self._shards, self._parts = vectors, shards, parts

    def search(self, rows: np.ndarray, k: int, only: np.ndarray | None, bar: tqdm) -> Ranking:
        found = self._parts.take(rows, k)
        bar.update(len(rows))
        return found


class Words:
    """By BM25.  A text that shares no word with the query is no candidate, and scores 0."""

    def __init__(self, lexical: Lexical, queries: Path) -> None:
        """`queries` is the table whose texts are asked."""
        self._lexical, self._texts = lexical, tables.read(queries, "queries", ["text"])["text"]

    def search(self, rows: np.ndarray, k: int, only: np.ndarray | None, bar: tqdm) -> Ranking:
        scores, ids = self._lexical.search(self._texts.take(rows).to_pylist(), k, only)
        bar.update(len(rows))
        return scores, ids

    def pair_scores(self, query_ids: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
        scores = np.empty(len(query_ids), np.float32)
        for start in range(0, len(query_ids), PAIRS):
            part = slice(start, start + PAIRS)
            distinct, rows = np.unique(query_ids[part], return_inverse=True)
            scores[part] = self._lexical.pair_scores(self._texts.take(distinct).to_pylist(), rows, text_ids[part])
        return scores


class Hybrid:
    """Ranks by reciprocal rank fusion of both; the similarity is that of the vectors, so it need not fall."""

    def __init__(self, dense: Dense, words: Words, constant: int) -> None:
        self._dense, self._words, self._constant = dense, words, constant

    def search(self, rows: np.ndarray, k: int, only: np.ndarray | None, bar: tqdm) -> Ranking:
        from retune.data.fusion import fuse

        silent = tqdm(disable=True)
        rankings = [found.search(rows, DEPTH * k, only, silent)[1] for found in (self._dense, self._words)]
        _, ids = fuse(rankings, k, self._constant)  # [Q, K]
        similarity = self._dense.pair_scores(np.repeat(rows, k), ids.ravel()).reshape(ids.shape)
        bar.update(len(rows))
        return similarity, ids

    def pair_scores(self, query_ids: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
        return self._dense.pair_scores(query_ids, text_ids)


def load(
    settings: MineConfig, seed: int, *, texts: Path, queries: Path, query_vectors: Path | None = None,
    text_vectors: Sequence[Path] = (), found: Sequence[Path] = (),
) -> Retriever:  # fmt: skip
    """The retriever of `settings`.

    Args:
        query_vectors, text_vectors: embeddings tables, the texts' in shards of rising ids; bm25 needs none.
        found: what the stage search found in parts of the texts; where there is none, all are searched here.

    Raises:
        UserError: for vectors of other tables or of different models, an index that faiss cannot make, or a GPU that
            is asked for and not there.
    """
    if settings.retriever == "bm25":
        return _words(texts, queries)
    _check_vectors(texts, queries, query_vectors, text_vectors)
    if found:
        dense = Searched(search.load(query_vectors), text_vectors, Parts(found))
    else:
        dense = Dense(search.load(query_vectors), text_vectors, _top_k(settings, text_vectors, seed))
    return dense if settings.retriever == "dense" else Hybrid(dense, _words(texts, queries), settings.rrf_k)


def depth(settings: MineConfig) -> int:
    """How many texts of a query a search by vectors must find."""
    high = int(bounds(settings.range_for_sampling)[1])
    return DEPTH * high if settings.retriever == "hybrid" else high


def _words(texts: Path, queries: Path) -> Words:
    from retune.data import lexical

    return Words(lexical.build(texts), queries)


def _top_k(settings: MineConfig, shards: Sequence[Path], seed: int) -> Callable[..., Ranking]:
    nearest = backend(settings.use_gpu_for_searching)
    if settings.index_factory == "Flat":
        return lambda vectors, k, only, bar: search.top_k(
            vectors, shards, k, settings.search_batch_size, nearest, only, bar
        )
    from retune.data import index

    made = index.build(
        shards, settings.index_factory, nprobe=settings.nprobe, ef_search=settings.ef_search,
        train_size=settings.index_train_size, seed=seed, gpu=nearest == "torch",
    )  # fmt: skip
    return partial(_in_index, made)


def _in_index(made: Index, vectors: np.ndarray, k: int, only: np.ndarray | None, bar: tqdm) -> Ranking:
    found = made.search(vectors, k, only)
    bar.update(len(vectors))
    return found


def backend(gpu: bool | None) -> str:
    """A key of `search.NEAREST`: torch on a GPU where there is one, unless it is not wanted."""
    found = search.backend() if gpu is not False else "faiss"
    if gpu and found != "torch":
        raise UserError(
            "mine.use_gpu_for_searching: there is no GPU here that torch can use; leave the key out to search on one "
            "where there is one"
        )
    return found


def _check_vectors(texts: Path, queries: Path, query_vectors: Path, text_vectors: Sequence[Path]) -> None:
    search.same_model(query_vectors, text_vectors)
    for table, found in ((queries, [query_vectors]), (texts, text_vectors)):
        if search.count(found) != tables.n_rows(table):
            raise UserError(
                f"{found[0]}: {search.count(found)} vectors for {tables.n_rows(table)} rows of {table}; "
                "delete the vectors and run again"
            )
