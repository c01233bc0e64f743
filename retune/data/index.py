"""Approximate top-k by inner product: any index of faiss' `index_factory` over sharded embeddings.

An index trades exactness for speed: it proposes candidates, whose scores are then computed exactly
and ordered as `search.top_k` orders them.  It is trained on a sample of the global ids and filled in
their order, in blocks that do not depend on shards, so that 1, 2 or 5 shards give the same index.
Knows vectors and ids; nothing of texts, positives or filters.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np

from retune.data import search
from retune.runtime import UserError, log, progress, timed

PER_CELL = 64  # training vectors of a cell of an inverted file; faiss warns below 39 and leaves out those above 256
FEWEST, MOST = 10_000, 100_000  # and of an index: with few cells, and with none
BATCH = 65536  # queries searched at a time, at most: mining asks for `mine.search_batch_size`, so that it bounds memory
WIDER = 2  # lossy codes: candidates for each one asked for, of which exact scores keep the better part


def build(
    shards: Sequence[Path | str], factory: str, *, nprobe: int | None = None, ef_search: int | None = None,
    train_size: int | None = None, seed: int = 0, gpu: bool = False, section: str = "mine",
) -> Index:  # fmt: skip
    """An index of all texts of the embeddings tables `shards`.

    Args:
        factory: faiss' description, such as `IVF1024,Flat`, `OPQ32,IVF4096,PQ32`, `HNSW32` or `SQ8`.
        nprobe: cells that a query looks into, of an index with IVF.
        ef_search: candidates that a search keeps, of an index with HNSW.
        train_size: vectors to train on, drawn with the seed: as float32 they must fit in memory.  Where not given, 64
            a cell and at least 10,000 for IVF, otherwise 100,000; all of them where there are fewer.
        gpu: search on the GPUs, where this build of faiss can; otherwise the log says that it cannot.
        section: of the config, whose keys these are: what messages name.

    Raises:
        UserError: where faiss cannot make the index, has no such parameter, or needs more training vectors.
    """
    made = _parse(factory, search.dimension(shards), section)
    if not made.is_trained:
        _train(made, shards, factory, train_size, seed, section)
    for name, value in (("nprobe", nprobe), ("efSearch", ef_search)):
        if value is not None:
            _set(made, name, value, factory, section)
    return Index(made, shards, factory, gpu, section)


class Index:
    """A trained index.  It is filled when it is first searched, and for `only` some texts where need be."""

    def __init__(
        self, trained: faiss.Index, shards: Sequence[Path | str], factory: str, gpu: bool = False, section: str = "mine"
    ) -> None:
        """`trained` holds no vectors yet."""
        self._shards, self._factory, self._gpu, self._section = shards, factory, gpu, section
        self._empty = faiss.serialize_index(trained)
        self._filled: tuple[np.ndarray | None, np.ndarray | None, faiss.Index] | None = None
        self._lossless = bool(re.search(r"(Flat|HNSW\d+|NSG\d+)$", factory))

    def search(self, queries: np.ndarray, k: int, only: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """About the k best texts of each query, with exact scores.

        Args:
            queries: float32 [n, dim].
            only: bool [n_texts]: search these texts alone.  Few of them (`search.BLOCK`) are searched exactly.

        Returns:
            scores float32 [n, k], ids int64 [n, k]: score descending, ties by rising id; where the index finds fewer
            than k, the rest is -inf and -1.
        """
        queries = np.require(queries, np.float32, "CW")
        if only is not None and only.sum() <= search.BLOCK:
            return search.top_k(queries, self._shards, k, only=only)
        wide = k + search.SPARE if self._lossless else WIDER * k + search.SPARE
        scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries), BATCH):
            part = slice(start, start + BATCH)
            found = self._candidates(queries[part], wide, only)  # [B, W]
            scores[part], ids[part] = search.rescored(queries[part], self._shards, found, k)
        return scores, ids

    def _candidates(self, queries: np.ndarray, wide: int, only: np.ndarray | None) -> np.ndarray:
        """Ids int64 [n, wide]; -1 for none."""
        if only is not None and (found := self._selected(queries, wide, only)) is not None:
            return found
        names, index = self._of(only)
        _, rows = index.search(queries, wide)
        return rows if names is None else np.where(rows < 0, -1, names[rows])

    def _selected(self, queries: np.ndarray, wide: int, only: np.ndarray) -> np.ndarray | None:
        """`_candidates` from an inverted file of all texts; None for other indexes.

        Those cannot leave out texts, or lose their way where they do: a graph is walked through the texts themselves.
        """
        if self._gpu or not re.search(r"(^|,)IVF", self._factory) or re.search(r"R(Flat|efine)", self._factory):
            return None
        _, index = self._of(None)
        chosen = faiss.IDSelectorBitmap(np.packbits(only, bitorder="little"))
        params = faiss.SearchParametersIVF(sel=chosen, nprobe=faiss.extract_index_ivf(index).nprobe)
        if isinstance(index, faiss.IndexPreTransform):
            params = faiss.SearchParametersPreTransform(index_params=params)
        return index.search(queries, wide, params=params)[1]

    def _of(self, only: np.ndarray | None) -> tuple[np.ndarray | None, faiss.Index]:
        """(ids, index of those texts), ids None for all, whose rows are their ids.

        The last is kept, since searches come with the same mask in a row.
        """
        if self._filled is not None:
            mask, names, index = self._filled
            if mask is only or (mask is not None and only is not None and np.array_equal(mask, only)):
                return names, index
        self._filled = None  # its memory is needed
        index = faiss.deserialize_index(self._empty)
        names = None if only is None else np.flatnonzero(only)
        n = search.count(self._shards) if names is None else len(names)
        with timed(f"index {self._factory} of {n} texts"), _threads(1 if _is_graph(self._factory) else None):
            _fill(index, self._shards, only, n, self._factory, self._section)
        index = _on_gpu(index) if self._gpu else index
        self._filled = (None if only is None else only.copy(), names, index)
        return names, index


def _parse(factory: str, dim: int, section: str) -> faiss.Index:
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"{section}.index_factory: faiss cannot make {factory!r} for vectors of {dim} dimensions "
            f"({_reason(error)}); take Flat, or for example IVF1024,Flat or HNSW32"
        ) from None


def _train(
    index: faiss.Index, shards: Sequence[Path | str], factory: str, size: int | None, seed: int, section: str
) -> None:
    cells = ivf.nlist if (ivf := faiss.try_extract_index_ivf(index)) is not None else None
    n = search.count(shards)
    size = min(n, size or (MOST if cells is None else max(PER_CELL * cells, FEWEST)))
    sample = _sample(shards, n, size, seed)
    try:
        # A graph among the cells' centres depends on the order in which threads come to it.
        with timed(f"train {factory} on {size} vectors"), _threads(1 if "HNSW" in factory else None):
            index.train(sample)
    except RuntimeError as error:
        raise UserError(
            f"{section}.index_factory: {factory} cannot be trained on {size} of {n} vectors ({_reason(error)}); "
            f"take fewer cells or smaller codes, raise {section}.index_train_size where it is set, or take Flat"
        ) from None


def _sample(shards: Sequence[Path | str], n: int, size: int, seed: int) -> np.ndarray:
    """`size` of n vectors, float32 [size, dim], in the order of their ids."""
    chosen = np.zeros(n, bool)
    chosen[np.random.default_rng([seed, n]).choice(n, size, replace=False)] = True
    sample, filled = np.empty((size, search.dimension(shards)), np.float32), 0
    for ids, vectors in search.chosen_blocks(shards, chosen):
        sample[filled : filled + len(ids)] = vectors
        filled += len(ids)
    return sample


def _fill(
    index: faiss.Index, shards: Sequence[Path | str], only: np.ndarray | None, n: int, factory: str, section: str
) -> None:
    try:
        with progress(n, "index", "texts") as bar:
            for _, vectors in search.chosen_blocks(shards, only):
                index.add(np.ascontiguousarray(vectors))
                bar.update(len(vectors))
    except RuntimeError as error:
        raise UserError(
            f"{section}.index_factory: {factory} cannot be filled ({_reason(error)}); take another index"
        ) from None


def _set(index: faiss.Index, name: str, value: int, factory: str, section: str) -> None:
    try:
        faiss.ParameterSpace().set_index_parameter(index, name, value)
    except RuntimeError:
        key = {"nprobe": "nprobe", "efSearch": "ef_search"}[name]
        raise UserError(
            f"{section}.{key}: an index {factory!r} has no {name}; leave the key out, or see {section}.index_factory"
        ) from None


def _is_graph(factory: str) -> bool:
    """Whether texts are linked to each other: the links depend on the order in which threads come to them."""
    return not re.search(r"(^|,)IVF", factory) and bool(re.search("HNSW|NSG", factory))


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Let faiss have so many threads for a while; None leaves them as they are."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _on_gpu(index: faiss.Index) -> faiss.Index:
    if not (hasattr(faiss, "index_cpu_to_all_gpus") and faiss.get_num_gpus()):
        log.info("this build of faiss has no support for GPUs: the index is searched on the CPU")
        return index
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError as error:
        log.info("the index is searched on the CPU: %s", _reason(error))
        return index


def _reason(error: RuntimeError) -> str:
    """What faiss says, without the place in its sources."""
    return str(error).rsplit(": ", 1)[-1].strip()
