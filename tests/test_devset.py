"""The dev set: set-aside queries alone, their positives and others to search in; nDCG by hand."""

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from toy import toy_tables

from retune.data import devset

N = 24


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return toy_tables(tmp_path, N, split=["dev" if i % 3 == 0 else "train" for i in range(N)])


def read(paths: dict[str, Path], **changed) -> devset.DevSet:
    how = {"seed": 1, "most_queries": 100, "passages": 5} | changed
    return devset.load(paths["texts"], paths["queries"], paths["pairs"], **how)


def test_only_queries_that_were_set_aside_with_their_positives(paths):
    found = read(paths)
    queries, texts = (pq.read_table(paths[name])["text"].to_pylist() for name in ("queries", "texts"))
    assert found.queries == queries[::3]
    for row, column, grade in zip(found.rows, found.columns, found.grades, strict=True):
        assert found.passages[column] == texts[3 * row] and grade == 1
    assert len(found.rows) == len(found.queries) and len(found.passages) >= len(found.queries)
    assert len(set(found.passages)) == len(found.passages) <= len(found.queries) + 5


def test_draws_depend_on_the_seed_alone(paths):
    few = read(paths, most_queries=3)
    assert len(few.queries) == 3 and few.queries == read(paths, most_queries=3).queries
    assert any(read(paths, most_queries=3, seed=seed).queries != few.queries for seed in range(2, 6))


def test_no_query_set_aside_no_dev_set(tmp_path):
    assert read(toy_tables(tmp_path)) is None


def test_ndcg_by_hand():
    """Query 0 finds its positive at rank 2; query 1 finds one of two at rank 1; query 2 none within 2."""
    found = devset.DevSet(
        ["a", "b", "c"], [None] * 3, list("vwxyz"), np.array([0, 1, 1, 2]), np.array([1, 2, 3, 4]), np.ones(4, np.int8)
    )
    scores = np.array([[0.9, 0.8, 0.1, 0.1, 0.1], [0.2, 0.1, 0.9, 0.0, 0.3], [0.5, 0.5, 0.4, 0.3, 0.5]])
    expected = [1 / math.log2(3), 1 / (1 + 1 / math.log2(3)), 0]
    assert found.ndcg(scores, 2) == pytest.approx(np.mean(expected))
