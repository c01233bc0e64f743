"""mine: what may never be taken is never taken, what was asked for is there, and the bytes are the same each time."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import some_texts

from retune import tables
from retune.config import MineConfig
from retune.data import negatives
from retune.runtime import UserError
from retune.stages.mine import mine

META = {"model": "m", "revision": "None", "pooling": "mean", "normalize": "True"}
NFCORPUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "nfcorpus"


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
        columns |= {"origin": ["given"] * len(pairs), "similarity": [None] * len(pairs), "score": [None] * len(pairs)}
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

    def mine(self, seed: int = 0, shards: int = 1, **options) -> Path:
        cuts = [len(self.texts) * i // shards for i in range(shards + 1)]
        parts = [self.vectors(f"t{i}", self.text_vectors[a:b], a) for i, (a, b) in enumerate(itertools.pairwise(cuts))]
        out = self.folder / "mined.parquet"
        files = {name: self.folder / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
        if self.bins:
            files |= {name: self.folder / f"{name}.parquet" for name in ("lengths", "bins")}
        mine(
            **files, query_vectors=self.vectors("q", self.query_vectors), text_vectors=parts, seed=seed, out=out,
            settings=MineConfig(**options),
        )  # fmt: skip
        return out

    def rows(self, **options) -> list[SimpleNamespace]:
        return [SimpleNamespace(**row) for row in pq.read_table(self.mine(**options)).to_pylist()]

    def similarity(self) -> np.ndarray:
        return (self.query_vectors.astype(np.float64) @ self.text_vectors.T.astype(np.float64)).astype(np.float32)

    def ranked(self, query: int) -> list[int]:
        scores = self.similarity()[query]
        return sorted(range(len(self.texts)), key=lambda text: (-scores[text], text))


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


# ---- properties ---------------------------------------------------------------------------------


@st.composite
def worlds(draw):
    """Few words, so that queries and texts often read the same, also in another writing; small vectors that tie."""
    word = st.sampled_from(["a", "b", "c", "d", "A", "b ", " C", "e", "f", "g", "h"])
    texts = draw(st.lists(word, min_size=1, max_size=11, unique=True))
    queries = draw(st.lists(word, min_size=1, max_size=6))
    pair = st.tuples(st.integers(0, len(queries) - 1), st.integers(0, len(texts) - 1), st.sampled_from([0, 1, 1]))
    pairs = draw(st.lists(pair, min_size=1, max_size=12, unique_by=lambda one: one[:2]))
    split = draw(st.lists(st.sampled_from(["train", "train", "dev"]), min_size=len(queries), max_size=len(queries)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    vectors = rng.integers(-1, 2, (len(texts), 2)), rng.integers(-1, 2, (len(queries), 2))
    low = draw(st.integers(0, 3))
    options = {
        "range_for_sampling": f"{low}-{low + draw(st.integers(1, 12))}", "negative_number": draw(st.integers(1, 5)),
        "sampling": draw(st.sampled_from(["random", "top"])), "keep_existing_neg": draw(st.booleans()),
        "similarity_range": draw(st.sampled_from([None, "0-1"])),
        "absolute_margin": draw(st.sampled_from([None, 0.5])), "relative_margin": draw(st.sampled_from([None, 0.1])),
    }  # fmt: skip
    return texts, queries, pairs, *vectors, split, options


def may_take(world: World, query: int, options) -> tuple[list[int], list[int]]:
    """By plain loops: (candidates in the window, by rank; texts that a random fill may take besides)."""
    scores, texts = world.similarity()[query], world.texts
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
    seen = world.ranked(query)[:end]
    window = [t for t in seen[first:] if t in free and low <= scores[t] <= min(high, top)]
    too_similar = [t for t in seen if scores[t] > min(high, top)]
    return window, [t for t in free if t not in too_similar]


@settings(max_examples=150, deadline=None)
@given(made=worlds(), shortage=st.sampled_from(["random", "drop", "error"]))
def test_what_holds_for_all_tables(tmp_path_factory, made, shortage):
    *contents, split, options = made
    world = World(tmp_path_factory.mktemp("w"), *contents, split)
    number, scores = options["negative_number"], world.similarity()
    trained = [query for query, side in enumerate(split) if side == "train"]
    windows = {query: may_take(world, query, options) for query in trained}
    short = [query for query in trained if len(windows[query][0]) < number]
    if shortage == "error" and short:
        with pytest.raises(UserError, match=rf"{len(short)} queries have .* first train\.jsonl:{short[0] + 1}:"):
            world.mine(on_shortage=shortage, **options)
        return
    rows = world.rows(on_shortage=shortage, **options)
    assert {row.query_id for row in rows} <= set(trained), "set-aside queries are not mined"
    for query in trained:
        window, fill = windows[query]
        mined, filled = of(rows, query, "mined"), of(rows, query, "random")
        if shortage == "drop" and query in short:
            assert not [row for row in rows if row.query_id == query]
            continue
        assert set(mined) <= set(window) and len(set(mined)) == len(mined) == min(number, len(window))
        if options["sampling"] == "top":
            assert mined == window[:number]
        assert set(filled) <= set(fill) - set(mined) and len(set(filled)) == len(filled)
        assert len(filled) == (min(number - len(mined), len(set(fill) - set(mined))) if shortage == "random" else 0)
        given_rows = [
            (t, label) for q, t, label in world.pairs if q == query and (label or options["keep_existing_neg"])
        ]
        assert sorted((row.text_id, row.label) for row in rows if row.query_id == query and row.origin == "given") == (
            sorted(given_rows)
        )
    for row in rows:
        assert row.similarity == scores[row.query_id][row.text_id]
        assert row.origin == "given" or row.label == 0
    order = [(row.query_id, -row.label, row.origin != "given") for row in rows]
    assert order == sorted(order)


@settings(max_examples=25, deadline=None)
@given(made=worlds(), seed=st.integers(0, 99), shards=st.sampled_from([1, 2, 5]), batch=st.sampled_from([1, 2, 1024]))
def test_the_same_bytes_whatever_the_shards_and_batches(tmp_path_factory, made, seed, shards, batch):
    world = World(tmp_path_factory.mktemp("w"), *made[:-1])
    first = world.mine(seed, **made[-1]).read_bytes()
    assert world.mine(seed, shards, search_batch_size=batch, **made[-1]).read_bytes() == first


# ---- who is drawn -------------------------------------------------------------------------------


def test_the_seed_decides_and_nothing_else_changes(tmp_path):
    world = simple(tmp_path, 200, 30)
    options = {"range_for_sampling": "5-100", "negative_number": 6}
    one, two, other = (world.mine(seed, **options).read_bytes() for seed in (1, 1, 2))
    assert one == two != other
    assert world.mine(1, shards=3, search_batch_size=7, **options).read_bytes() == one


def test_all_of_the_window_is_drawn_from_evenly(tmp_path):
    world = simple(tmp_path, 60, 400)
    rows = world.rows(range_for_sampling="10-30", negative_number=5)
    counts = np.zeros(60)
    for query in range(400):
        ranked = world.ranked(query)
        for text in of(rows, query, "mined"):
            counts[ranked.index(text)] += 1
    assert counts[:10].sum() == counts[30:].sum() == 0
    assert counts.sum() == 400 * 5
    assert counts[10:30].min() > 60 and counts[10:30].max() < 145, "each rank is expected 100 times or a little less"


def test_top_takes_the_first_ones_allowed(tmp_path):
    world = simple(tmp_path)
    rows = world.rows(range_for_sampling="3-20", negative_number=4, sampling="top")
    for query in range(6):
        expected = [text for text in world.ranked(query)[3:20] if text != query][:4]
        assert of(rows, query, "mined") == expected


def test_margins_by_hand(tmp_path):
    """One query along the first axis: similarities are the texts' first numbers; the positives have .8 and .6."""
    values = [0.8, 0.6, 0.95, 0.58, 0.56, 0.5, 0.2, -0.3]
    world = World(
        tmp_path, [f"text {value}" for value in values], ["query"], [(0, 0, 1), (0, 1, 1)],
        [[value, 0] for value in values], [[1, 0]],
    )  # fmt: skip
    cases = {
        (): [0.95, 0.58, 0.56, 0.5, 0.2, -0.3],
        (("relative_margin", 0.05),): [0.56, 0.5, 0.2, -0.3],
        (("absolute_margin", 0.1),): [0.5, 0.2, -0.3],
        (("similarity_range", "0.2-0.57"),): [0.56, 0.5, 0.2],
        (("relative_margin", 0.05), ("absolute_margin", 0.3)): [0.2, -0.3],
    }
    for options, expected in cases.items():
        rows = world.rows(
            range_for_sampling="0-8",
            negative_number=len(expected),
            sampling="top",
            on_shortage="error",
            **dict(options),
        )
        assert [values[text] for text in of(rows, 0, "mined")] == expected, options


def test_a_relative_margin_lies_below_a_negative_similarity_too():
    lowest = np.array([0.8, -0.4, np.inf], np.float32)
    found = negatives.ceilings(lowest, MineConfig(relative_margin=0.05))
    np.testing.assert_allclose(found, [0.76, -0.42, np.inf], rtol=1e-6)


# ---- shortage -----------------------------------------------------------------------------------


def test_random_fill_gives_the_number_and_not_what_is_too_similar(tmp_path):
    world = simple(tmp_path, 40, 8)
    scores = world.similarity()
    options = {"range_for_sampling": "0-12", "negative_number": 15, "absolute_margin": 0.0}
    rows = world.rows(**options)
    filled = 0
    for query in range(8):
        mined, random = of(rows, query, "mined"), of(rows, query, "random")
        filled += len(random)
        ceiling = scores[query][query]
        allowed = [text for text in range(40) if scores[query][text] <= ceiling and text != query]
        seen_too_similar = {t for t in world.ranked(query)[:12] if scores[query][t] > ceiling}
        assert not seen_too_similar & set(random)
        assert len(mined) + len(random) == min(15, 39 - len(seen_too_similar)) and len(allowed) <= 39
    assert filled > 20


def test_few_texts_are_all_taken_and_no_more(tmp_path, caplog):
    world = simple(tmp_path, 5, 2)
    rows = world.rows(range_for_sampling="0-2", negative_number=9)
    assert [sorted(of(rows, query, "mined", "random")) for query in range(2)] == [[1, 2, 3, 4], [0, 2, 3, 4]]
    assert "2 queries keep too few negatives" in caplog.text


def test_drop_leaves_the_query_out(tmp_path):
    """Texts are the axes' two ends; a query along the first axis has 3 similar texts, the others have 2."""
    vectors = [[1, 0]] * 4 + [[0, 1]] * 3
    world = World(
        tmp_path, [f"text {i}" for i in range(7)], ["one", "two"], [(0, 0, 1), (1, 4, 1)], vectors, [[1, 0], [0, 1]]
    )
    options = {"range_for_sampling": "0-7", "negative_number": 3, "similarity_range": "0.5-1.5"}
    rows = world.rows(on_shortage="drop", **options)
    assert {row.query_id for row in rows} == {0}
    assert of(rows, 0, "given") == [0] and sorted(of(rows, 0, "mined")) == [1, 2, 3]
    with pytest.raises(UserError, match=r'1 queries have fewer than 3 candidates, first train\.jsonl:2: "two"'):
        world.rows(on_shortage="error", **options)


def test_an_error_leaves_the_earlier_result(tmp_path):
    world = simple(tmp_path)
    before = world.mine(range_for_sampling="0-20", negative_number=3).read_bytes()
    with pytest.raises(UserError):
        world.mine(range_for_sampling="0-2", negative_number=30, on_shortage="error")
    assert (tmp_path / "mined.parquet").read_bytes() == before


def test_draw_is_complete_distinct_and_even():
    pool = np.arange(100, 130)
    counts = np.zeros(30)
    for seed in range(600):
        found = negatives.draw(np.random.default_rng(seed), pool, 5, lambda ids: ids % 2 == 0)
        assert len(set(found.tolist())) == 5 and (found % 2 == 0).all()
        counts[found - 100] += 1
    assert counts[::2].min() > 140 and counts[::2].max() < 265, "200 expected of each"
    rare = negatives.draw(np.random.default_rng(0), np.arange(10_000), 3, lambda ids: np.isin(ids, [7, 9_998]))
    assert sorted(rare.tolist()) == [7, 9_998]
    assert len(negatives.draw(np.random.default_rng(0), pool[:0], 3, lambda ids: ids > 0)) == 0


# ---- bins, existing negatives, set-aside queries ------------------------------------------------


def test_a_bins_queries_get_the_window_of_the_bins_own_texts(tmp_path):
    rng = np.random.default_rng(5)
    n = 60
    tokens = np.where(np.arange(n) < 40, 100, 700)
    tokens[-3:] = 3000  # texts of a bin that holds no query
    names = ["len-0-500", "len-500-1000"]
    world = World(
        tmp_path, [f"text {i}" for i in range(n)], [f"query {i}" for i in range(6)], [(i, i, 1) for i in range(6)],
        rng.standard_normal((n, 8)), rng.standard_normal((6, 8)), bins=(tokens, names, [0, 1, 0, 1, 1, 0]),
    )  # fmt: skip
    rows = world.rows(pool="bin", range_for_sampling="2-9", negative_number=4, sampling="top", search_batch_size=2)
    for query, number in enumerate([0, 1, 0, 1, 1, 0]):
        inside = [t for t in world.ranked(query) if (number == 0 and t < 40) or (number == 1 and 40 <= t < 57)]
        assert of(rows, query, "mined") == [t for t in inside[2:9] if t != query][:4]
    rows = world.rows(pool="bin", range_for_sampling="0-1", negative_number=20)
    for query, number in enumerate([0, 1, 0, 1, 1, 0]):
        found = of(rows, query, "mined", "random")
        assert all((text < 40) if number == 0 else (40 <= text < 57) for text in found)
        assert len(found) == (20 if number == 0 else 17)


def test_existing_negatives_are_dropped_or_kept(tmp_path):
    world = simple(tmp_path)
    pairs = [*world.pairs, (0, 30, 0), (0, 31, 0), (2, 30, 0)]
    world = World(tmp_path, world.texts, world.queries, pairs, world.text_vectors, world.query_vectors)
    options = {"range_for_sampling": "0-40", "negative_number": 37, "on_shortage": "error"}
    rows = world.rows(keep_existing_neg=True, **options)
    assert of(rows, 0, "given") == [0, 30, 31]
    assert sorted(of(rows, 0, "mined")) == [t for t in range(40) if t not in (0, 30, 31)]
    rows = world.rows(keep_existing_neg=False, **options)
    assert of(rows, 0, "given") == [0] and {30, 31} & set(of(rows, 0, "mined"))


def test_a_candidate_that_differs_in_writing_only(tmp_path):
    """Text 1 is the positive and text 2 the query, in other letters; of two that read the same the first stands."""
    texts = ["paris is big", "Paris  IS big", "WHERE is paris", "Rome is old", "rome is OLD", "Oslo is cold"]
    world = World(tmp_path, texts, ["where is  Paris"], [(0, 0, 1)], np.linspace([1.0], [0.5], 6), [[1.0]])
    rows = world.rows(range_for_sampling="0-6", negative_number=6)
    assert sorted(of(rows, 0, "mined", "random")) == [3, 5]


def test_a_set_aside_querys_positive_is_open_to_others_only_if_it_is_also_theirs(tmp_path):
    pairs = [(0, 0, 1), (1, 1, 1), (1, 0, 1), (2, 2, 1)]
    rng = np.random.default_rng(0)
    world = World(
        tmp_path, list("vwxyz"), ["one", "two", "three"], pairs, rng.standard_normal((5, 3)),
        rng.standard_normal((3, 3)), split=["train", "dev", "train"],
    )  # fmt: skip
    rows = world.rows(range_for_sampling="0-5", negative_number=5)
    assert {row.query_id for row in rows} == {0, 2}
    assert sorted(of(rows, 0, "mined", "random")) == [2, 3, 4]  # 1 is closed
    assert sorted(of(rows, 2, "mined", "random")) == [0, 3, 4]  # 0 is a positive of query 0 as well


def test_vectors_of_another_table_are_refused(tmp_path):
    world = simple(tmp_path)
    world.text_vectors = world.text_vectors[:-1]
    with pytest.raises(UserError, match=r"39 vectors for 40 rows of .*texts\.parquet"):
        world.mine()


# ---- on real text -------------------------------------------------------------------------------


def test_ranks_and_window_on_nfcorpus(tmp_path):
    """Word-hash vectors of real passages: the mined ranks equal those of a plain float64 sort."""
    if not (NFCORPUS / "corpus.jsonl").is_file():
        pytest.skip("nfcorpus is not in ../shared/data")
    with open(NFCORPUS / "corpus.jsonl") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(1500), strict=False)]
    vectors = np.zeros((len(texts), 64))
    for row, text in enumerate(texts):
        for word in text.lower().split():
            vectors[row, sum(word.encode()) % 64] += 1
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    vectors = vectors.astype(np.float32)
    queries = [text.split(".")[0] for text in texts[:80]]
    world = World(tmp_path, texts, queries, [(i, i, 1) for i in range(80)], vectors, vectors[:80])
    rows = world.rows(range_for_sampling="10-210", negative_number=15, shards=3, on_shortage="error")
    scores = vectors[:80].astype(np.float64) @ vectors.T.astype(np.float64)
    for query in range(80):
        order = np.lexsort((np.arange(len(texts)), -scores[query].astype(np.float32)))
        rank = {text: place for place, text in enumerate(order.tolist())}
        mined = of(rows, query, "mined")
        assert len(set(mined)) == 15 and query not in mined
        assert all(10 <= rank[text] < 210 for text in mined)


def test_the_query_itself_among_the_texts_is_never_taken(tmp_path):
    texts = some_texts(100)
    rng = np.random.default_rng(0)
    world = World(
        tmp_path, texts, texts[:20], [(i, i + 20, 1) for i in range(20)], rng.standard_normal((100, 16)),
        rng.standard_normal((20, 16)),
    )  # fmt: skip
    distinct = len({reads(text) for text in texts})
    rows = world.rows(range_for_sampling="0-50", negative_number=99)
    for query in range(20):
        found = of(rows, query, "mined", "random")
        assert query not in found and len(found) == distinct - 2
