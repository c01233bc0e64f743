"""Every index gives exact scores in order, the same whatever the shards; with all cells, it is the exact search."""

import re

import faiss
import numpy as np
import pytest
from test_search import equal, shards_of, write

from retune.data import index, search
from retune.runtime import UserError

FACTORIES = [
    "Flat",
    "IVF8,Flat",
    "IVF8,SQ8",
    "OPQ4_16,IVF4,PQ4x4",
    "IVF8_HNSW8,Flat",
    "HNSW16",
    "PQ3x4",
    "SQ8",
    "PCA16,Flat",
]


@pytest.fixture(autouse=True)
def no_exact_search_of_few_texts(monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 128)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(queries [20, 24], texts float16 [600, 24] around 12 centres, folder)."""
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((12, 24))[rng.integers(0, 12, 600)] + rng.standard_normal((600, 24))
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float16)
    queries = texts[::30].astype(np.float32) + rng.standard_normal((20, 24)).astype(np.float32) / 10
    return queries, texts, tmp_path_factory.mktemp("index")


def recall(found: np.ndarray, best: np.ndarray) -> float:
    return np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, best, strict=True)])


@pytest.mark.parametrize("factory", FACTORIES)
def test_exact_scores_in_order_whatever_the_shards(made, factory):
    queries, texts, folder = made
    one = shards_of(folder, texts, 1)
    scores, ids = index.build(one, factory, nprobe=4 if "IVF" in factory else None, train_size=256, seed=3).search(
        queries, 15
    )
    rows = np.repeat(np.arange(len(queries)), 15)
    np.testing.assert_array_equal(scores.ravel(), search.pair_scores(queries, one, rows, ids.ravel()))
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ids)
    assert recall(ids, search.top_k(queries, one, 15)[1]) > 0.6
    for count in (2, 5):
        shards = shards_of(folder, texts, count)
        again = index.build(shards, factory, nprobe=4 if "IVF" in factory else None, train_size=256, seed=3).search(
            queries, 15
        )
        equal(again, (scores, ids))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8_HNSW8,Flat", "RR24,IVF8,Flat", "Flat"])
def test_all_cells_are_the_exact_search(made, factory, masked, count):
    queries, texts, folder = made
    shards = shards_of(folder, texts, count)
    only = np.arange(len(texts)) % 3 > 0 if masked else None
    built = index.build(
        shards, factory, nprobe=8 if "IVF" in factory else None, ef_search=64 if "HNSW" in factory else None
    )
    for k in (1, 40, 500):
        equal(built.search(queries, k, only), search.top_k(queries, shards, k, only=only))


@pytest.mark.parametrize("factory", FACTORIES)
def test_only_some_texts(made, factory):
    queries, texts, folder = made
    shards = shards_of(folder, texts, 2)
    built = index.build(shards, factory, nprobe=4 if "IVF" in factory else None)
    everything = built.search(queries, 20)
    for only in (np.arange(600) % 2 == 0, np.arange(600) < 300):
        scores, ids = built.search(queries, 20, only)
        assert only[ids[ids >= 0]].all() and np.isneginf(scores[ids < 0]).all()
        assert recall(ids, search.top_k(queries, shards, 20, only=only)[1]) > 0.75
        equal(built.search(queries, 20, only.copy()), (scores, ids))
    equal(built.search(queries, 20), everything)


def test_few_texts_are_searched_exactly(made, monkeypatch):
    queries, texts, folder = made
    shards = shards_of(folder, texts, 1)
    only = np.arange(600) < 100
    built = index.build(shards, "IVF8,Flat", nprobe=1)
    equal(built.search(queries, 50, only), search.top_k(queries, shards, 50, only=only))


def test_nprobe_and_ef_search_are_used(made):
    queries, texts, folder = made
    shards = shards_of(folder, texts, 1)
    best = search.top_k(queries, shards, 10)[1]
    few, many = (recall(index.build(shards, "IVF32,Flat", nprobe=n).search(queries, 10)[1], best) for n in (1, 16))
    assert few < many
    assert index.build(shards, "HNSW8", ef_search=77)._of(None)[1].hnsw.efSearch == 77


def test_the_sample_is_drawn_by_the_seed_over_ids(made):
    _, texts, folder = made
    samples = [index._sample(shards_of(folder, texts, count), 600, 50, 7) for count in (1, 2, 5)]
    assert samples[0].shape == (50, 24)
    for sample in samples[1:]:
        np.testing.assert_array_equal(sample, samples[0])
    rows = [np.flatnonzero((texts == row).all(1))[0] for row in samples[0]]
    assert rows == sorted(set(rows))
    assert not np.array_equal(index._sample(shards_of(folder, texts, 1), 600, 50, 8), samples[0])


@pytest.mark.parametrize(
    "factory, size, expected", [("IVF4,Flat", None, 600), ("IVF4,Flat", 200, 200), ("PQ3x4", None, 600)]
)
def test_how_many_vectors_are_trained_on(made, monkeypatch, factory, size, expected):
    _, texts, folder = made
    sizes = []
    sample = index._sample
    monkeypatch.setattr(index, "_sample", lambda *args: sizes.append(args[2]) or sample(*args))
    index.build(shards_of(folder, texts, 1), factory, train_size=size)
    assert sizes == [expected]


def test_training_vectors_by_default(made, monkeypatch):
    monkeypatch.setattr(search, "count", lambda _: 10**7)
    sizes = []
    monkeypatch.setattr(index, "_sample", lambda *args: sizes.append(args[2]) or np.random.rand(1000, 24).astype("f4"))
    shards = shards_of(made[2], made[1], 1)
    for factory in ("IVF8,Flat", "IVF500,Flat", "SQ8"):
        index.build(shards, factory)
    assert sizes == [10_000, 32_000, 100_000]


def test_a_graph_does_not_depend_on_threads(made):
    queries, texts, folder = made
    shards = shards_of(folder, texts, 1)
    before = faiss.omp_get_max_threads()
    try:
        found = []
        for threads in (1, 4):
            faiss.omp_set_num_threads(threads)
            found += [
                index.build(shards, f, seed=1).search(queries, 30) for f in ("HNSW4", "IVF8_HNSW4,Flat", "IVF8,SQ8")
            ]
            assert faiss.omp_get_max_threads() == threads
    finally:
        faiss.omp_set_num_threads(before)
    for one, four in zip(found[:3], found[3:], strict=True):
        equal(four, one)


def test_fewer_texts_than_asked_for(made):
    queries, texts, folder = made
    shards = [write(folder / "five.parquet", texts[:5])]
    equal(index.build(shards, "HNSW8").search(queries, 9), search.top_k(queries, shards, 9))
    assert index.build(shards, "SQ8").search(queries[:0], 9)[0].shape == (0, 9)


@pytest.mark.parametrize(
    "factory, options, message",
    [
        ("Nonsense", {}, "mine.index_factory: faiss cannot make 'Nonsense'"),
        ("PQ7", {}, "mine.index_factory: faiss cannot make 'PQ7' for vectors of 24 dimensions (The"),
        ("IVF1024,Flat", {}, "mine.index_factory: IVF1024,Flat cannot be trained on 600 of 600 vectors"),
        ("IVF64,Flat", {"train_size": 32}, "raise mine.index_train_size"),
        ("HNSW8", {"nprobe": 3}, "mine.nprobe: an index 'HNSW8' has no nprobe"),
        ("IVF4,Flat", {"ef_search": 3}, "mine.ef_search: an index 'IVF4,Flat' has no efSearch"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key(made, factory, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        index.build(shards_of(made[2], made[1], 1), factory, **options)


def test_an_index_that_cannot_be_filled_names_the_key(made):
    built = index.build(shards_of(made[2], made[1], 1), "IDMap,Flat")
    with pytest.raises(UserError, match=r"mine\.index_factory: IDMap,Flat cannot be filled"):
        built.search(made[0], 3)


def test_without_support_for_gpus_the_log_says_so(made, caplog):
    caplog.set_level("INFO", "retune")
    queries, texts, folder = made
    shards = shards_of(folder, texts, 1)
    found = index.build(shards, "IVF8,Flat", nprobe=8, gpu=True).search(queries, 5)
    equal(found, search.top_k(queries, shards, 5))
    if not faiss.get_num_gpus():
        assert "the index is searched on the CPU" in caplog.text
