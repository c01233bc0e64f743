"""Knowing when to stop: nDCG@10 of the queries set aside, the best checkpoint, early stopping."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_bert
from toy import toy_tables

from retune import tables
from retune.config import EmbedderConfig, TrainConfig
from retune.data import devset
from retune.model.embedder import Embedder
from retune.runtime import UserError
from retune.stages.train import train
from retune.training import run
from retune.training.arguments import training_arguments
from retune.training.dev import evaluator
from retune.training.trainer import GroupTrainer

N = 32
ARGS = {"learning_rate": 2e-3, "num_train_epochs": 4, "per_device_train_batch_size": 8, "eval_steps": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "base")


def job(folder: Path, base: Path, args: dict | None = None, **settings) -> dict:
    """24 training queries, so 3 steps an epoch, and 8 set aside."""
    paths = toy_tables(folder / "tables", N, split=["dev" if row % 4 == 0 else "train" for row in range(N)])
    settings = {"train_group_size": 3, "temperature": 0.05, "dev_passages": 30} | settings
    return {
        **paths, "bins": None, "judgments": paths["pairs"], "seed": 1, "drop_longer_than": None,
        "settings": TrainConfig(args=ARGS | (args or {}), **settings), "embedder": EmbedderConfig(model=str(base)),
        "state": folder / "state", "model_out": folder / "model", "history_out": folder / "history.parquet",
    }  # fmt: skip


def of(model: str | Path, given: dict) -> float:
    """nDCG@10 of a checkpoint on the dev set of a job."""
    aside = devset.load(given["texts"], given["queries"], given["judgments"], seed=1, most_queries=500, passages=30)
    return evaluator(Embedder.load(str(model)), aside, None)()


def values(folder: Path) -> dict[int, float]:
    rows = tables.read(folder / "history.parquet", "history").to_pylist()
    return {row["step"]: row["dev"] for row in rows if row["dev"] is not None}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("trained")
    given = job(folder, base)
    train(**given)
    return folder, given


def test_the_model_is_the_best_checkpoint(trained, base):
    folder, given = trained
    found = values(folder)
    assert list(found) == [2, 4, 6, 8, 10, 12]
    assert max(found.values()) > of(base, given) + 0.1, "training helps queries that it never saw here"
    assert of(folder / "model", given) == pytest.approx(max(found.values()), abs=1e-6)


def test_the_same_again_after_a_kill(trained, base, tmp_path, monkeypatch):
    """Interrupted between two evaluations: the same weights, the same history."""
    folder, _ = trained
    plain = GroupTrainer.compute_loss

    def dies(self, *given, **named):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return plain(self, *given, **named)

    given = job(tmp_path, base)
    monkeypatch.setattr(GroupTrainer, "compute_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train(**given)
    monkeypatch.setattr(GroupTrainer, "compute_loss", plain)
    train(**given)
    assert values(tmp_path) == values(folder)
    read = [(place / "model/model.safetensors").read_bytes() for place in (folder, tmp_path)]
    assert read[0] == read[1]


STOPPING = ({"learning_rate": 1e-12, "max_steps": 12}, {"early_stopping_patience": 2})
ENDINGS = {
    "between two evaluations": (*STOPPING, 5),
    "after it stopped": (*STOPPING, None),
    "after an evaluation at the start": (STOPPING[0] | {"eval_on_start": True}, STOPPING[1], 3),
    "after the last step, the best one not asked for": (
        {"learning_rate": 3e-2, "load_best_model_at_end": False},
        {},
        None,
    ),
}


@pytest.mark.parametrize(("args", "settings", "step"), ENDINGS.values(), ids=ENDINGS.keys())
def test_an_end_is_the_same_after_a_kill(base, tmp_path, monkeypatch, args, settings, step):
    """Killed in `step`, or where there is none after the last one, before the model is in its place."""
    whole, parts = (job(tmp_path / name, base, args, **settings) for name in ("whole", "parts"))
    train(**whole)
    found = values(tmp_path / "whole")
    if settings:
        assert list(found) == [2, 4, 6], "two evaluations without a better one"
    else:
        assert max(found, key=found.get) < 12, "the last step is not the best"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_in(patch, step)
        train(**parts)
    assert not (tmp_path / "parts" / "model").exists()
    train(**parts)
    assert values(tmp_path / "parts") == found
    one, two = (tmp_path / name / "model/model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()


def killed_in(patch, step: int | None) -> None:
    plain = GroupTrainer.compute_loss

    def dies(self, *given, **named):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return plain(self, *given, **named)

    def placing(*_):
        raise KeyboardInterrupt

    patch.setattr(GroupTrainer, "compute_loss", dies)
    if step is None:
        patch.setattr(run, "write_history", placing)


def test_it_stops_where_nothing_gets_better(base, tmp_path):
    """A learning rate that does nothing: the first evaluation is the best, and two more are waited for."""
    given = job(tmp_path, base, {"learning_rate": 1e-12, "max_steps": 12}, early_stopping_patience=2)
    train(**given)
    found = values(tmp_path)
    assert list(found) == [2, 4, 6] and len(set(found.values())) == 1


def test_nothing_set_aside_no_evaluation(base, tmp_path):
    given = job(tmp_path, base, {"eval_steps": None, "max_steps": 2}, dev_queries=0)
    train(**given)
    assert values(tmp_path) == {}
    with pytest.raises(UserError, match=r"train\.early_stopping_patience: no queries are set aside"):
        train(**job(tmp_path, base, dev_queries=0, early_stopping_patience=2))


@pytest.mark.parametrize(
    ("args", "settings", "message"),
    [
        (
            {"eval_strategy": "no"},
            {"early_stopping_patience": 2},
            r"args\.eval_strategy: no leaves train\.early_stopping",
        ),
        (
            {"eval_strategy": False},
            {"early_stopping_patience": 2},
            r"args\.eval_strategy: no leaves train\.early_stopping",
        ),
        ({"metric_for_best_model": "loss"}, {}, r"args\.metric_for_best_model: expected dev, .*, found loss"),
        ({"eval_on_start": True}, {"dev_queries": 0}, r"args\.eval_on_start: there is no evaluation during training"),
    ],
)
def test_evaluations_that_cannot_be_are_mistakes(base, tmp_path, monkeypatch, args, settings, message):
    monkeypatch.setattr(Embedder, "tokenize", lambda *_: pytest.fail("it is said before anything is tokenised"))
    with pytest.raises(UserError, match=rf"^train\.{message}"):
        train(**job(tmp_path, base, {"eval_steps": None} | args, **settings))


def test_no_checkpoints_still_evaluations(base, tmp_path, caplog):
    """Early stopping needs none, and the last step becomes the model."""
    args = {"learning_rate": 1e-12, "max_steps": 12, "save_strategy": "no"}
    given = job(tmp_path, base, args, early_stopping_patience=2)
    train(**given)
    assert list(values(tmp_path)) == [2, 4, 6]
    assert "train.args.save_strategy: no: without checkpoints the last step is kept, not the best one" in caplog.text


def test_no_evaluations_are_told_of(tmp_path, caplog):
    found = training_arguments({"eval_strategy": False}, tmp_path, 0, dev=True)
    assert found.eval_strategy == "no" and not found.load_best_model_at_end
    assert "train.args.eval_strategy: no: the queries set aside are not looked at" in caplog.text


def test_checkpoints_of_the_best_alone(tmp_path, caplog):
    found = training_arguments({"save_strategy": "best", "eval_steps": 7}, tmp_path, 0, dev=True)
    assert (found.save_strategy, found.eval_strategy, found.eval_steps) == ("best", "steps", 7)
    assert found.load_best_model_at_end and not caplog.text


def test_few_queries_and_passages_are_drawn(trained):
    _, given = trained
    few = devset.load(given["texts"], given["queries"], given["judgments"], seed=1, most_queries=3, passages=0)
    assert len(few.queries) == len(few.passages) == 3
