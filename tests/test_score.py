"""score: each distinct pair once, the same as one by one, and never a score that is no number."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_reranker
from toy import toy_tables

from retune.config import RerankerConfig, ScoreConfig
from retune.model.reranker import Reranker
from retune.runtime import UserError
from retune.stages import score as stage
from retune.stages.score import score

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> RerankerConfig:
    return RerankerConfig(model=str(tiny_reranker(tmp_path_factory.mktemp("teacher"))), max_length=64)


def run(paths: dict[str, Path], teacher: RerankerConfig, batch_tokens: int = 300) -> dict[str, list]:
    out = paths["pairs"].with_name("scored.parquet")
    score(
        texts=paths["texts"], queries=paths["queries"], pairs=paths["pairs"], out=out, reranker=teacher,
        settings=ScoreConfig(batch_tokens=batch_tokens),
    )  # fmt: skip
    return pq.read_table(out).to_pydict()


def columns(path: Path, *names: str) -> list[list]:
    table = pq.read_table(path)
    return [table[name].to_pylist() for name in names]


@pytest.mark.parametrize("block", [7, 65536])
def test_scores_equal_one_by_one_and_the_rest_is_untouched(tmp_path, teacher, monkeypatch, block):
    monkeypatch.setattr(stage, "BLOCK", block)
    paths = toy_tables(tmp_path)
    before = pq.read_table(paths["pairs"]).to_pydict()
    after = run(paths, teacher)
    [texts], [queries] = columns(paths["texts"], "text"), columns(paths["queries"], "text")
    pairs = [(queries[q], texts[t]) for q, t in zip(before["query_id"], before["text_id"], strict=True)]
    ours = Reranker.load(teacher, target=CPU)
    expected = [ours.score([pair])[0] for pair in pairs]
    np.testing.assert_allclose(after["score"], expected, atol=1e-5)
    assert np.ptp(expected) > 0.1
    assert {name: after[name] for name in after if name != "score"} == {
        name: before[name] for name in before if name != "score"
    }


def test_each_distinct_pair_is_computed_once(tmp_path, teacher, monkeypatch):
    """Pairs repeat, and the queries 0 and 1 have the same text."""
    [queries] = columns(toy_tables(tmp_path)["queries"], "text")
    queries[1] = queries[0]
    pairs = {"query_id": [0, 1, 0, 2, 2, 1], "text_id": [5, 5, 5, 5, 6, 0], "label": [1, 1, 0, 0, 1, 0]}
    paths = toy_tables(tmp_path, text=queries)
    rest = {"origin": ["given"] * 6, "similarity": [None] * 6, "score": [9.0] * 6}
    stage.tables.write(paths["pairs"], "pairs", pairs | rest)
    rows, forward = [], Reranker.forward

    def counted(self, input_ids, *rest, **named):
        rows.append(len(input_ids))
        return forward(self, input_ids, *rest, **named)

    monkeypatch.setattr(Reranker, "forward", counted)
    found = run(paths, teacher)["score"]
    assert sum(rows) == 4
    assert found[0] == found[1] == found[2] and len(set(found)) == 4
    assert 9.0 not in found, "scores that came with the data are replaced"


def test_the_same_bytes_twice(tmp_path, teacher):
    paths = toy_tables(tmp_path)
    made = []
    for _ in range(2):
        run(paths, teacher)
        made.append((tmp_path / "scored.parquet").read_bytes())
    assert made[0] == made[1]


def test_no_pairs_no_scores(tmp_path, teacher):
    paths = toy_tables(tmp_path)
    empty = {"query_id": [], "text_id": [], "label": [], "origin": [], "similarity": [], "score": []}
    stage.tables.write(paths["pairs"], "pairs", empty)
    assert run(paths, teacher)["score"] == []


def test_a_score_that_is_no_number_names_the_query(tmp_path, teacher, monkeypatch):
    paths = toy_tables(tmp_path)
    [queries] = columns(paths["queries"], "text")
    forward, seven = Reranker.forward, Reranker.load(teacher, target=CPU).pieces([queries[7]], "query").ids.tolist()

    def broken(self, input_ids, *rest, **named):
        out = forward(self, input_ids, *rest, **named).clone()
        out[(input_ids[:, 1:4] == torch.tensor(seven)).all(1)] = float("nan")
        return out

    monkeypatch.setattr(Reranker, "forward", broken)
    with pytest.raises(UserError, match=f'score of query "{queries[7]}" and text [0-9]+ is not finite'):
        run(paths, teacher)
    assert not (tmp_path / "scored.parquet").exists()
