"""Who finds candidates: words, both, an index, a GPU; and the texts of a candidate pool alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import some_texts
from world import World, of, reads, simple

from retune import tables
from retune.data import search
from retune.runtime import UserError

NFCORPUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "nfcorpus"


def wordy(folder: Path, n_texts: int = 120, n_queries: int = 20) -> World:
    texts, rng = some_texts(n_texts, longest=12), np.random.default_rng(2)
    queries = [" ".join(text.split()[:2]) for text in texts[:n_queries]]
    return World(
        folder, texts, queries, [(i, i, 1) for i in range(n_queries)], rng.standard_normal((n_texts, 8)),
        rng.standard_normal((n_queries, 8)),
    )  # fmt: skip


def test_bm25_takes_what_shares_a_word_and_random_ones_otherwise(tmp_path):
    world = wordy(tmp_path)
    rows = world.rows(retriever="bm25", range_for_sampling="0-50", negative_number=30)
    mined = [row for row in rows if row.origin == "mined"]
    assert len(mined) > 100 and any(row.origin == "random" for row in rows)
    for row in rows:
        shared = set(reads(world.texts[row.text_id]).split()) & set(reads(world.queries[row.query_id]).split())
        assert (row.similarity > 0) == bool(shared)
        assert shared or row.origin == "random"
    assert tables.metadata(tmp_path / "mining.parquet")["settings"].count("bm25") == 1


def test_hybrid_ranks_by_both_and_filters_by_the_vectors(tmp_path):
    world = wordy(tmp_path)
    rows = world.rows(retriever="hybrid", range_for_sampling="0-40", negative_number=40, absolute_margin=0.0)
    scores = world.similarity()
    ranks = {name: [world.ranked(query, name, 80) for query in range(20)] for name in ("dense", "bm25", "hybrid")}
    for query in range(20):
        top = ranks["hybrid"][query][:40]
        below = [t for t in top if t != query and scores[query][t] <= scores[query][query]]
        first = [t for t in below if world.texts.index(world.texts[t]) == t and world.texts[t] != world.queries[query]]
        assert of(rows, query, "mined") == first
        assert top != ranks["dense"][query][:40] and top != ranks["bm25"][query][:40]


def test_an_index_that_looks_into_every_cell_finds_what_exact_search_finds(tmp_path):
    world = simple(tmp_path, 400, 30)
    options = {"range_for_sampling": "5-60", "negative_number": 8}
    exact = world.mine(**options).read_bytes()
    assert world.mine(index_factory="IVF8,Flat", nprobe=8, **options).read_bytes() == exact
    assert world.mine(index_factory="IVF8,Flat", nprobe=8, shards=3, **options).read_bytes() == exact
    assert world.mine(index_factory="IVF8,Flat", nprobe=1, **options).read_bytes() != exact
    with pytest.raises(UserError, match=r"mine\.index_factory"):
        world.mine(index_factory="Flatt", **options)


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(tmp_path, monkeypatch):
    world, asked = simple(tmp_path), []
    plain = world.mine(use_gpu_for_searching=False).read_bytes()
    monkeypatch.setattr(search, "backend", lambda: asked.append(1) or "faiss")
    assert world.mine(use_gpu_for_searching=False).read_bytes() == plain and not asked, "torch is not even asked"
    with pytest.raises(UserError, match=r"mine\.use_gpu_for_searching: there is no GPU"):
        world.mine(use_gpu_for_searching=True)
    monkeypatch.setattr(search, "backend", lambda: "torch")  # which computes on the CPU where there is no GPU
    assert world.mine(use_gpu_for_searching=True).read_bytes() == plain


@pytest.mark.parametrize("retriever", ["dense", "bm25", "hybrid"])
def test_a_candidate_pool_is_ranked_alone(tmp_path, retriever):
    world = wordy(tmp_path)
    inside = np.arange(120) % 3 > 0
    rows = world.rows(
        retriever=retriever, candidates=inside, range_for_sampling="0-20", negative_number=50, sampling="top"
    )
    found = [row for row in rows if row.origin != "given"]
    assert all(inside[row.text_id] for row in found) and len(found) > 300
    if retriever == "dense":
        for query in range(20):
            top = [text for text in world.ranked(query) if inside[text]][:20]
            ranks = [row.rank for row in rows if row.query_id == query and row.origin == "mined"]
            assert [top[rank] for rank in ranks] == of(rows, query, "mined")
    assert {row.text_id for row in rows if row.origin == "given"} == set(range(20)), "positives may lie outside"


def test_a_text_of_the_pool_stands_for_its_other_writings(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["Own", "other thing", "Other  Thing", "third"]
    world = World(
        tmp_path, texts, ["ask"], [(0, 0, 1)], rng.standard_normal((4, 3)), rng.standard_normal((1, 3))
    )  # fmt: skip
    options = {"range_for_sampling": "0-4", "negative_number": 3}
    assert sorted(of(world.rows(**options), 0, "mined")) == [1, 3]
    pool = np.array([False, False, True, True])
    assert sorted(of(world.rows(candidates=pool, **options), 0, "mined")) == [2, 3]


def test_candidates_on_nfcorpus_equal_a_plain_float64_ranking(tmp_path):
    """Word-hash vectors of real passages: all of the window, in order, for every query; ties by id."""
    if not (NFCORPUS / "corpus.jsonl").is_file():
        pytest.skip("nfcorpus is not in ../shared/data")
    with open(NFCORPUS / "corpus.jsonl") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(300), strict=False)]
    counts = np.zeros((len(texts), 16))
    for row, text in enumerate(texts):
        for word in text.lower().split()[:12]:
            counts[row, sum(word.encode()) % 16] += 1
    vectors = np.sqrt(counts).astype(np.float16).astype(np.float32)  # short texts: many ties
    queries = [text.split(".")[0] for text in texts[:200]]
    world = World(tmp_path, texts, queries, [(i, i, 1) for i in range(200)], vectors, vectors[:200])
    rows = world.rows(range_for_sampling="10-110", negative_number=100, sampling="top", shards=3)
    readings = [reads(text) for text in texts]
    scores = (vectors[:200].astype(np.float64) @ vectors.T.astype(np.float64)).astype(np.float32)
    ties = 0
    for query in range(200):
        order = np.lexsort((np.arange(len(texts)), -scores[query]))[10:110]
        expected = [int(text) for text in order if readings[text] not in (readings[query], reads(queries[query]))]
        expected = [text for text in expected if readings.index(readings[text]) == text]
        assert of(rows, query, "mined") == expected
        ties += len(order) - len(np.unique(scores[query][order]))
    assert ties > 500
    drawn = world.rows(range_for_sampling="10-110", negative_number=15)
    assert all(10 <= row.rank < 110 for row in drawn if row.origin == "mined")
    assert {(row.query_id, row.text_id) for row in drawn} <= {(row.query_id, row.text_id) for row in rows}
