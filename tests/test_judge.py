"""A ready teacher while mining: what it refuses is never taken, it is asked no more than needed, and no pair twice."""

import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import some_texts, tiny_reranker
from world import World, may_take, of, simple, worlds

from retune import tables
from retune.config import RerankerConfig
from retune.data.judge import Judge
from retune.model.reranker import Reranker
from retune.runtime import UserError

ANY = RerankerConfig(model="any")


class Oracle:
    """In a reranker's place: scores 0 to 3 by a checksum of the texts; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def pieces(self, texts, kind):
        return list(texts)

    def join(self, queries, passages, query_rows, passage_rows):
        return [(queries[q], passages[p]) for q, p in zip(query_rows, passage_rows, strict=True)]

    def scores(self, pairs, max_tokens=None, bar=None):
        self.asked += pairs
        return np.array([self.score(*pair) for pair in pairs], np.float32)

    def score(self, query: str, passage: str) -> float:
        return zlib.crc32(f"{query}|{passage}".encode()) % 4


@pytest.fixture
def oracle(monkeypatch) -> Oracle:
    made = Oracle()
    monkeypatch.setattr(Judge, "load", classmethod(lambda cls, _, queries, texts: cls(made, queries, texts)))
    return made


def needed(passes: list[bool], number: int) -> int:
    """How many candidates, in the order of their priority, a lazy judge is asked for."""
    asked = taken = 0
    while taken < number and asked < len(passes):
        more = passes[asked : asked + number - taken]
        asked, taken = asked + len(more), taken + sum(more)
    return asked


@settings(max_examples=60, deadline=None)
@given(made=worlds(), margin=st.sampled_from([-1.0, 0.0, 1.0]), shortage=st.sampled_from(["random", "drop"]))
def test_what_the_teacher_refuses_is_never_taken(tmp_path_factory, made, margin, shortage):
    *contents, split, options = made
    options |= {"max_score_of_teacher": margin, "on_shortage": shortage, "sampling": "top"}
    world, oracle = World(tmp_path_factory.mktemp("w"), *contents, split), Oracle()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "load", classmethod(lambda cls, _, queries, texts: cls(oracle, queries, texts)))
        rows = world.rows(reranker=ANY, **options)
    assert len(set(oracle.asked)) == len(oracle.asked), "no pair is scored twice"
    number, wanted = options["negative_number"], set()
    for query in (query for query, side in enumerate(split) if side == "train"):
        may, text = may_take(world, query, options), world.queries[query]
        positives = [world.texts[t] for q, t, label in world.pairs if q == query and label]
        limit = min((oracle.score(text, one) for one in positives), default=np.inf) + margin
        passes = [oracle.score(text, world.texts[t]) <= limit for t in may.window]
        judged = may.window[: needed(passes, number)]
        wanted |= {(text, one) for one in positives} | {(text, world.texts[t]) for t in judged}
        expected = [t for t, good in zip(may.window, passes, strict=True) if good][:number]
        if shortage == "drop" and len(expected) < number:
            assert not [row for row in rows if row.query_id == query]
            continue
        assert of(rows, query, "mined") == expected
        refused = {t for t, good in zip(judged, passes, strict=False) if not good}
        assert not refused & set(of(rows, query, "random")), "nor as a random one"
    assert set(oracle.asked) == wanted, "positives, and as few candidates as will do"
    for row in rows:
        judged = row.label or row.origin == "mined"
        assert row.score == (oracle.score(world.queries[row.query_id], world.texts[row.text_id]) if judged else None)
    counts = world.counts()
    chosen = [row for row in rows if row.origin == "mined"]
    assert counts["candidates"]["seen"] == len(chosen) + sum(counts["removed"].values())
    assert counts["candidates"]["chosen"] == len(chosen) and counts["teacher"]["scored"] == len(oracle.asked)
    lowest = {q: min(row.score for row in rows if row.query_id == q and row.label) for q, *_ in world.pairs
              if any(row.query_id == q and row.label for row in rows)}  # fmt: skip
    above = [row for row in chosen if row.score > lowest.get(row.query_id, np.inf)]
    assert counts["teacher"]["above"] == len(above)


def test_the_same_bytes_whatever_the_shards_and_batches(tmp_path, oracle):
    world = simple(tmp_path, 80, 12)
    options = {"range_for_sampling": "2-60", "negative_number": 6, "max_score_of_teacher": 0.0, "reranker": ANY}
    first, counts = world.mine(**options).read_bytes(), world.counts()
    assert counts["removed"]["teacher"] > 20
    for shards, batch in ((2, 1024), (5, 1024), (1, 5), (1, 1)):
        assert world.mine(shards=shards, search_batch_size=batch, **options).read_bytes() == first
        assert world.counts() == counts


def test_it_is_asked_about_as_often_as_needed(tmp_path, oracle):
    """Two thirds or so of the candidates pass: the others cost half as many pairs again, not the whole window."""
    world = simple(tmp_path, 400, 20, seed=3)
    rows = world.rows(
        range_for_sampling="0-300", negative_number=10, max_score_of_teacher=1.0, reranker=ANY, on_shortage="drop"
    )
    queries = len({row.query_id for row in rows})
    assert queries > 10
    refused = world.counts()["removed"]["teacher"]
    assert len(oracle.asked) == 20 + 20 * 10 + refused - sum(10 - len(of(rows, q, "mined")) for q in range(20)
                                                            if of(rows, q, "mined"))  # fmt: skip
    assert len(oracle.asked) < 20 * 300 / 4


def test_without_a_teacher_the_threshold_is_left_to_a_later_stage(tmp_path, oracle):
    world = simple(tmp_path)
    options = {"range_for_sampling": "0-30", "negative_number": 5}
    plain = world.mine(**options).read_bytes()
    assert world.mine(max_score_of_teacher=0.0, **options).read_bytes() == plain
    assert world.mine(reranker=ANY, **options).read_bytes() == plain and oracle.asked == []


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> RerankerConfig:
    return RerankerConfig(model=str(tiny_reranker(tmp_path_factory.mktemp("teacher"))), max_length=64)


def texts_of(path: Path) -> list[str]:
    return pq.read_table(path)["text"].to_pylist()


def test_a_rerankers_scores_are_those_of_single_pairs(tmp_path, teacher):
    texts, rng = some_texts(60), np.random.default_rng(1)
    queries = [" ".join(text.split()[:3]) for text in texts[:8]]
    world = World(
        tmp_path, texts, queries, [(i, i, 1) for i in range(8)], rng.standard_normal((60, 8)),
        rng.standard_normal((8, 8)),
    )  # fmt: skip
    options = {"range_for_sampling": "0-40", "negative_number": 4, "reranker": teacher, "max_score_of_teacher": 0.1}
    rows = world.rows(**options)
    ours = Reranker.load(teacher, target=torch.device("cpu"))
    lowest = {row.query_id: row.score for row in rows if row.label}
    judged = [row for row in rows if row.score is not None]
    assert len(judged) > 24
    expected = [float(ours.score([(queries[row.query_id], texts[row.text_id])])[0]) for row in judged]
    np.testing.assert_allclose([row.score for row in judged], expected, atol=1e-5)
    assert all(row.score <= np.float32(lowest[row.query_id]) + np.float32(0.1) for row in judged)
    assert world.counts()["removed"]["teacher"] > 0
    assert world.mine(**options).read_bytes() == world.mine(shards=5, **options).read_bytes()


def test_a_score_that_is_no_number_names_the_pair(tmp_path, oracle):
    world = simple(tmp_path)
    oracle.score = lambda query, passage: float("nan") if passage == "text 2" else 1.0
    with pytest.raises(UserError, match='score of query "query 2" and text "text 2" is not finite'):
        world.mine(reranker=ANY, max_score_of_teacher=0.0)
    assert not (tmp_path / "mined.parquet").exists() and not (tmp_path / "mining.parquet").exists()


def test_no_pair_no_score(tmp_path, oracle):
    world = simple(tmp_path)
    judge = Judge(oracle, world.folder / "queries.parquet", world.folder / "texts.parquet")
    none = np.empty(0, np.int64)
    assert judge(none, none).shape == (0,) and tables.n_rows(world.folder / "texts.parquet") == 40
