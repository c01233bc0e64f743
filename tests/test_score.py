"""score: each distinct pair once, the same as one by one, resumable, and never a score that is no number."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_reranker
from toy import toy_tables

from retune import tables
from retune.config import RerankerConfig, ScoreConfig
from retune.model.reranker import Reranker
from retune.runtime import UserError
from retune.stages import scores as stage
from retune.stages.score import score
from retune.stages.scores import scores

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> RerankerConfig:
    return RerankerConfig(model=str(tiny_reranker(tmp_path_factory.mktemp("teacher"))), max_length=64)


def files(paths: dict[str, Path]) -> dict[str, Path]:
    return {name: paths[name] for name in ("texts", "queries", "pairs")}


def run(paths: dict[str, Path], teacher: RerankerConfig, shards: int = 1, only_missing: bool = False, **how) -> dict:
    """Score in parts and put them together."""
    folder, parts = paths["pairs"].parent, []
    for shard in range(shards):
        parts.append(folder / f"scores-{shard}.parquet")
        scores(
            **files(paths), settings=ScoreConfig(batch_tokens=300), reranker=teacher, out=parts[-1],
            state=folder / f"state-{shard}", shard=(shard, shards), only_missing=only_missing,
        )  # fmt: skip
        assert not (folder / f"state-{shard}").exists()
    score(**files(paths), parts=parts, out=folder / "scored.parquet", only_missing=only_missing, **how)
    return pq.read_table(folder / "scored.parquet").to_pydict()


def columns(path: Path, *names: str) -> list[list]:
    table = pq.read_table(path)
    return [table[name].to_pylist() for name in names]


def one_by_one(paths: dict[str, Path], teacher: RerankerConfig) -> list[float]:
    """Scores of the table's pairs, each computed alone."""
    query_ids, text_ids = columns(paths["pairs"], "query_id", "text_id")
    [texts], [queries] = columns(paths["texts"], "text"), columns(paths["queries"], "text")
    ours = Reranker.load(teacher, target=CPU)
    return [ours.score([(queries[q], texts[t])])[0] for q, t in zip(query_ids, text_ids, strict=True)]


@pytest.mark.parametrize("group, shards", [(7, 1), (8192, 1), (5, 3)])
def test_scores_equal_one_by_one_and_the_rest_is_untouched(tmp_path, teacher, monkeypatch, group, shards):
    monkeypatch.setattr(stage, "GROUP", group)
    paths = toy_tables(tmp_path)
    before = pq.read_table(paths["pairs"]).to_pydict()
    after = run(paths, teacher, shards)
    expected = one_by_one(paths, teacher)
    np.testing.assert_allclose(after["score"], expected, atol=1e-5)
    assert np.ptp(expected) > 0.1
    assert {name: after[name] for name in after if name != "score"} == {
        name: before[name] for name in before if name != "score"
    }


def counted(monkeypatch) -> list[int]:
    """Numbers of rows that the reranker computes, call by call."""
    rows, forward = [], Reranker.forward

    def forward_and_count(self, input_ids, *rest, **named):
        rows.append(len(input_ids))
        return forward(self, input_ids, *rest, **named)

    monkeypatch.setattr(Reranker, "forward", forward_and_count)
    return rows


def repeated(tmp_path: Path, scores: list) -> dict[str, Path]:
    """Tables whose pairs repeat, and whose queries 0 and 1 have the same text."""
    [queries] = columns(toy_tables(tmp_path)["queries"], "text")
    queries[1] = queries[0]
    pairs = {"query_id": [0, 1, 0, 2, 2, 1], "text_id": [5, 5, 5, 5, 6, 0], "label": [1, 1, 0, 0, 1, 0]}
    paths = toy_tables(tmp_path, text=queries)
    rest = {"origin": ["given"] * 6, "similarity": [None] * 6, "score": scores}
    tables.write(paths["pairs"], "pairs", pairs | rest)
    return paths


def test_each_distinct_pair_is_computed_once(tmp_path, teacher, monkeypatch):
    paths, rows = repeated(tmp_path, [9.0] * 6), counted(monkeypatch)
    found = run(paths, teacher)["score"]
    assert sum(rows) == 4
    assert found[0] == found[1] == found[2] and len(set(found)) == 4
    assert 9.0 not in found, "scores that came with the data are replaced"


def test_only_missing_scores_are_computed_where_asked(tmp_path, teacher, monkeypatch):
    paths = repeated(tmp_path, [9.0, 8.0, 7.0, None, None, None])
    rows, expected = counted(monkeypatch), one_by_one(paths, teacher)
    rows.clear()
    found = run(paths, teacher, only_missing=True)["score"]
    assert sum(rows) == 3
    assert found[:3] == [9, 8, 7]
    np.testing.assert_allclose(found[3:], expected[3:], atol=1e-5)


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
    tables.write(paths["pairs"], "pairs", empty)
    assert run(paths, teacher, shards=2, margin=0.0)["score"] == []


def test_a_score_that_is_no_number_names_the_pair(tmp_path, teacher, monkeypatch):
    paths = toy_tables(tmp_path)
    [queries] = columns(paths["queries"], "text")
    forward, seven = Reranker.forward, Reranker.load(teacher, target=CPU).pieces([queries[7]], "query").ids.tolist()

    def broken(self, input_ids, *rest, **named):
        out = forward(self, input_ids, *rest, **named).clone()
        out[(input_ids[:, 1:4] == torch.tensor(seven)).all(1)] = float("nan")
        return out

    monkeypatch.setattr(Reranker, "forward", broken)
    with pytest.raises(UserError, match=f'score of query "{queries[7]}" and passage ".+" .text_id [0-9]+. is not fin'):
        run(paths, teacher)
    assert not (tmp_path / "scored.parquet").exists()


def test_parts_of_other_pairs_are_refused(tmp_path, teacher):
    paths = toy_tables(tmp_path)
    run(paths, teacher)
    other = toy_tables(tmp_path, seed=5)
    with pytest.raises(UserError, match="belong to other pairs"):
        score(**files(other), parts=[tmp_path / "scores-0.parquet"], out=tmp_path / "again.parquet")


# ---- interrupted --------------------------------------------------------------------------------


SLOW = """
import sys, time
from pathlib import Path
from retune.config import RerankerConfig, ScoreConfig
from retune.model.reranker import Reranker
from retune.stages import scores as stage
stage.GROUP = 8
folder, forward = Path(sys.argv[1]), Reranker.forward
def slow(self, *rest, **named):
    time.sleep(float(sys.argv[3]))
    return forward(self, *rest, **named)
Reranker.forward = slow
from retune.runtime import start_logging
start_logging()
stage.scores(
    **{name: folder / f"{name}.parquet" for name in ("texts", "queries", "pairs")}, settings=ScoreConfig(),
    reranker=RerankerConfig(model=sys.argv[2], max_length=64), out=folder / "part.parquet", state=folder / "state",
)
"""


def test_killed_and_run_again(tmp_path, teacher):
    """Finished groups are not scored again, and the table equals that of an uninterrupted run."""
    paths = toy_tables(tmp_path)

    def start(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", SLOW, tmp_path, teacher.model, seconds]
        environment = os.environ | {"PYTHONPATH": str(Path(stage.__file__).parents[2])}
        return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment)

    whole = start(0)
    assert whole.wait() == 0, whole.stderr.read()
    expected = pq.read_table(tmp_path / "part.parquet")
    (tmp_path / "part.parquet").unlink()
    assert len(expected) == 96

    killed = start(0.3)
    finished = time.monotonic() + 60
    while len(list(tmp_path.glob("state/*/*.npy"))) < 3:
        assert killed.poll() is None and time.monotonic() < finished
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "part.parquet").exists()
    done = 8 * len(list(tmp_path.glob("state/*/*.npy")))
    again = start(0)
    _, said = again.communicate()
    assert again.returncode == 0
    assert f"going on: {done} of 96 pairs were scored before" in said
    assert pq.read_table(tmp_path / "part.parquet").equals(expected)
    assert pq.read_metadata(paths["pairs"]).num_rows == 96


def test_finished_groups_of_other_pairs_do_not_count(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(stage, "GROUP", 8)
    other, rows = toy_tables(tmp_path / "other", seed=3), counted(monkeypatch)

    def left_behind(paths: dict[str, Path]) -> None:
        """Interrupt before the parts are put together."""
        with monkeypatch.context() as patch:
            patch.setattr(stage.tables, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                scores(**files(paths), settings=ScoreConfig(), reranker=teacher, out=tmp_path / "p", state=state)

    state, paths = tmp_path / "state", toy_tables(tmp_path / "own")
    left_behind(other)
    left_behind(paths)
    assert sum(rows) == 2 * 96
    scores(**files(paths), settings=ScoreConfig(), reranker=teacher, out=tmp_path / "p.parquet", state=state)
    assert sum(rows) == 2 * 96, "all groups were there"


# ---- false negatives ----------------------------------------------------------------------------


def judged(tmp_path: Path) -> tuple[dict[str, Path], Path]:
    """Three queries with scores: query 0 has one false negative, query 1 none, query 2 nothing else."""
    paths = toy_tables(tmp_path)
    pairs = {
        "query_id": [0, 0, 0, 0, 1, 1, 2, 2], "text_id": [0, 1, 30, 31, 1, 30, 2, 30],
        "label": [1, 1, 0, 0, 1, 0, 1, 0], "origin": ["given"] * 2 + ["mined"] * 2 + ["given", "mined"] * 2,
        "similarity": [None] * 8, "score": [None] * 8,
    }  # fmt: skip
    tables.write(paths["pairs"], "pairs", pairs)
    marks = {(0, 0): 5.0, (0, 1): 2.0, (0, 30): 2.5, (0, 31): 3.1, (1, 1): 0.0, (1, 30): 1.0, (2, 2): 1, (2, 30): 4}
    part = tmp_path / "part.parquet"
    keys = sorted(marks)
    values = {"query_id": [q for q, _ in keys], "text_id": [t for _, t in keys], "score": [marks[k] for k in keys]}
    tables.write(part, "scores", values)
    return paths, part


@pytest.mark.parametrize("action, kept, labels", [
    ("keep", [0, 1, 30, 31, 1, 30, 2, 30], [1, 1, 0, 0, 1, 0, 1, 0]),
    ("drop", [0, 1, 30, 1, 30], [1, 1, 0, 1, 0]),
    ("relabel", [0, 1, 31, 30, 1, 30, 2, 30], [1, 1, 1, 0, 1, 0, 1, 1]),
])  # fmt: skip
def test_action_what_the_config_makes_of_them(tmp_path, action, kept, labels):
    """A margin of 1 above the lowest positive: 3.1 > 2 + 1 and 4 > 1 + 1 are too much, 2.5 and 1.0 are not."""
    paths, part = judged(tmp_path)
    out, counts = tmp_path / "scored.parquet", tmp_path / "scoring.parquet"
    score(**files(paths), parts=[part], out=out, counts=counts, margin=1.0, action=action)
    found = pq.read_table(out).to_pydict()
    assert found["text_id"] == kept and found["label"] == labels
    numbers = dict(zip(*columns(counts, "name", "value"), strict=True))
    assert numbers == {
        "pairs": 8, "distinct pairs": 8, "negatives": 4, "false negatives": 2, "queries without another negative": 1,
    }  # fmt: skip


def test_putting_parts_together_needs_no_torch(tmp_path):
    paths, part = judged(tmp_path)
    code = (
        "import sys; from pathlib import Path; from retune.stages.score import score; f = Path(sys.argv[1]);"
        "score(**{n: f / f'{n}.parquet' for n in ('texts', 'queries', 'pairs')}, parts=[f / 'part.parquet'],"
        "out=f / 'out.parquet'); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, paths["texts"].parent], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False" and part.exists()
