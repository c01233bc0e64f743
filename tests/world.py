"""A small world to mine in: tables and vectors in a folder, `mine` on them, and what it may take by plain loops."""

from __future__ import annotations

import itertools
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
from hypothesis import strategies as st

from retune import tables
from retune.config import MineConfig
from retune.data import lexical
from retune.stages.mine import mine

META = {"model": "m", "revision": "None", "pooling": "mean", "normalize": "True"}


class World:
    """Tables and vectors in a folder, and `mine` on them."""

    def __init__(self, folder: Path, texts, queries, pairs, text_vectors, query_vectors, split=None, bins=None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.texts, self.queries, self.pairs = folder, texts, queries, pairs
        self.text_vectors, self.query_vectors = np.asarray(text_vectors), np.asarray(query_vectors)
        self.split, n = split or ["train"] * len(queries), len(queries)
        none = [None] * n
        tables.write(
            folder / "texts.parquet", "texts",
            {"text_id": range(len(texts)), "text": texts, "key": [None] * len(texts)},
        )  # fmt: skip
        columns = {
            "query_id": range(n), "dataset": ["d"] * n, "text": queries, "key": none, "prompt": none, "type": none,
            "in_batch_negatives": [True] * n, "batch_size": none, "split": self.split,
            "source": [f"train.jsonl:{row + 1}" for row in range(n)],
        }  # fmt: skip
        tables.write(folder / "queries.parquet", "queries", columns)
        columns = dict(zip(("query_id", "text_id", "label"), map(list, zip(*pairs, strict=True)), strict=True))
        columns |= {"origin": ["given"] * len(pairs), "similarity": [None] * len(pairs), "score": [9.0] * len(pairs)}
        tables.write(folder / "pairs.parquet", "pairs", columns)
        self.bins = bins
        if bins:
            tokens, names, of_query = bins
            tables.write(folder / "lengths.parquet", "lengths", {"text_id": range(len(texts)), "n_tokens": tokens})
            columns = {"query_id": range(n), "n_tokens": [1] * n, "length_bin": [names[i] for i in of_query]}
            tables.write(folder / "bins.parquet", "bins", columns)

    def vectors(self, name: str, vectors: np.ndarray, first: int = 0) -> Path:
        path = self.folder / f"{name}.parquet"
        with tables.writer(path, tables.embeddings_schema(vectors.shape[1], "float32"), META) as out:
            if len(vectors):
                ids = np.arange(first, first + len(vectors))
                out.write({"id": ids, "vector": tables.vector_array(vectors.astype(np.float32))})
        return path

    def mine(self, seed: int = 0, shards: int = 1, reranker=None, candidates=None, **options) -> Path:
        """Mine with these settings; returns the table of pairs.  The counts lie in `mining.parquet`."""
        settings, out = MineConfig(**options), self.folder / "mined.parquet"
        files = {name: self.folder / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
        if self.bins:
            files |= {name: self.folder / f"{name}.parquet" for name in ("lengths", "bins")}
        files |= {"query_vectors": None, "text_vectors": None}
        if settings.retriever != "bm25":
            cuts = itertools.pairwise(len(self.texts) * i // shards for i in range(shards + 1))
            files["text_vectors"] = [self.vectors(f"t{i}", self.text_vectors[a:b], a) for i, (a, b) in enumerate(cuts)]
            files["query_vectors"] = self.vectors("q", self.query_vectors)
        mine(
            **files, seed=seed, out=out, settings=settings, reranker=reranker, candidates=candidates,
            stats=self.folder / "mining.parquet",
        )  # fmt: skip
        return out

    def rows(self, **options) -> list[SimpleNamespace]:
        return [SimpleNamespace(**row) for row in pq.read_table(self.mine(**options)).to_pylist()]

    def counts(self) -> dict[str, dict[str, float]]:
        """{measure: {name: value}} of the last run."""
        found: dict[str, dict[str, float]] = {}
        for row in tables.read(self.folder / "mining.parquet", "mining").to_pylist():
            found.setdefault(row["measure"], {})[row["name"]] = row["value"]
        return found

    def similarity(self, retriever: str = "dense") -> np.ndarray:
        """Of every query and text, float32 [Q, T]: what filters work on."""
        if retriever == "bm25":
            return self.by_words
        return (self.query_vectors.astype(np.float64) @ self.text_vectors.T.astype(np.float64)).astype(np.float32)

    @cached_property
    def by_words(self) -> np.ndarray:
        n = len(self.texts)
        rows = np.arange(len(self.queries)).repeat(n), np.tile(np.arange(n), len(self.queries))
        return lexical.build(self.folder / "texts.parquet").pair_scores(self.queries, *rows).reshape(-1, n)

    def ranked(self, query: int, retriever: str = "dense", depth: int | None = None) -> list[int]:
        """All texts that a retriever ranks for a query, the best first; `depth` is that of the fused rankings."""
        if retriever == "hybrid":
            fused: dict[int, float] = {}
            for one in ("dense", "bm25"):
                for rank, text in enumerate(self.ranked(query, one)[:depth], 1):
                    fused[text] = fused.get(text, 0.0) + 1 / (60 + rank)
            return sorted(fused, key=lambda text: (-np.float32(fused[text]), text))
        scores = self.similarity(retriever)[query]
        found = [text for text in range(len(self.texts)) if retriever == "dense" or scores[text] > 0]
        return sorted(found, key=lambda text: (-scores[text], text))


def reads(text: str) -> str:
    return " ".join(text.lower().split())


def of(rows, query: int, *origins: str) -> list[int]:
    return [row.text_id for row in rows if row.query_id == query and row.origin in origins]


def simple(folder: Path, n_texts=40, n_queries=6, seed=0, dim=8, **more) -> World:
    """Query i has positive i (from the first one again where texts end); vectors at random."""
    rng = np.random.default_rng(seed)
    return World(
        folder, [f"text {i}" for i in range(n_texts)], [f"query {i}" for i in range(n_queries)],
        [(i, i % n_texts, 1) for i in range(n_queries)], rng.standard_normal((n_texts, dim)),
        rng.standard_normal((n_queries, dim)), **more,
    )  # fmt: skip


WORDS = ["ant", "bee", "cow", "Ant", "bee ", " COW", "dog", "ant bee", "bee cow", "Bee  cow", "cow ant bee", "dog elk"]


@st.composite
def worlds(draw):
    """Few words, so that queries and texts often read the same, also in another writing; small vectors that tie."""
    texts = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=len(WORDS), unique=True))
    queries = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
    pair = st.tuples(st.integers(0, len(queries) - 1), st.integers(0, len(texts) - 1), st.sampled_from([0, 1, 1]))
    pairs = draw(st.lists(pair, min_size=1, max_size=12, unique_by=lambda one: one[:2]))
    split = draw(st.lists(st.sampled_from(["train", "train", "dev"]), min_size=len(queries), max_size=len(queries)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    vectors = rng.integers(-1, 2, (len(texts), 2)), rng.integers(-1, 2, (len(queries), 2))
    low = draw(st.integers(0, 3))
    options = {
        "retriever": draw(st.sampled_from(["dense", "bm25", "hybrid"])),
        "range_for_sampling": f"{low}-{low + draw(st.integers(1, 12))}", "negative_number": draw(st.integers(1, 5)),
        "sampling": draw(st.sampled_from(["random", "top"])), "keep_existing_neg": draw(st.booleans()),
        "similarity_range": draw(st.sampled_from([None, "0-1"])),
        "absolute_margin": draw(st.sampled_from([None, 0.5])), "relative_margin": draw(st.sampled_from([None, 0.1])),
    }  # fmt: skip
    return texts, queries, pairs, *vectors, split, options


def may_take(world: World, query: int, options) -> SimpleNamespace:
    """By plain loops, ids of texts by rank.

    seen: all in the window. window: those of them which no filter on ids or similarity removes. fill: what a random
    fill may take.
    """
    retriever = options["retriever"]
    scores, texts = world.similarity(retriever)[query], world.texts
    readings = [reads(text) for text in texts]
    mine_too = [q for q, other in enumerate(world.queries) if reads(other) == reads(world.queries[query])]
    forbidden = {reads(world.queries[query])}
    dev, train = set(), set()
    for q, t, label in world.pairs:
        if q in mine_too and (label or options["keep_existing_neg"]):
            forbidden.add(readings[t])
        if label:
            (train if world.split[q] == "train" else dev).add(readings[t])
    forbidden |= dev - train
    positives = [scores[t] for q, t, label in world.pairs if q == query and label]
    low, high, top = 0.0, 1.0, np.float32(np.inf)
    if not options["similarity_range"]:
        low, high = -np.inf, np.inf
    if positives and options["relative_margin"] is not None:
        top = min(top, min(positives) - np.float32(options["relative_margin"]) * abs(min(positives)))
    if positives and options["absolute_margin"] is not None:
        top = min(top, min(positives) - np.float32(options["absolute_margin"]))
    free = [t for t in range(len(texts)) if readings[t] not in forbidden and readings.index(readings[t]) == t]
    first, end = map(int, options["range_for_sampling"].split("-"))
    ranked = world.ranked(query, retriever, 2 * end)[:end]
    window = [t for t in ranked[first:] if t in free and low <= scores[t] <= min(high, top)]
    too_similar = [t for t in ranked if scores[t] > min(high, top)]
    return SimpleNamespace(seen=ranked[first:], window=window, fill=[t for t in free if t not in too_similar])
