"""The fit stage: an encoder becomes a cross-encoder that loads elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_bert
from toy import toy_tables

from retune import tables
from retune.config import FitConfig, RerankerConfig
from retune.model.reranker import Reranker
from retune.runtime import UserError
from retune.stages.fit import fit


def job(folder: Path, args: dict | None = None, **changed) -> dict:
    base = folder.parent / "base"
    args = {"learning_rate": 2e-3, "num_train_epochs": 20, "per_device_train_batch_size": 8} | (args or {})
    settings = FitConfig(**{"train_group_size": 3, "args": args} | changed)
    return {
        "reranker": RerankerConfig(model=str(base), max_length=48, fit=settings), "seed": 3, "state": folder / "state",
        "model_out": folder / "model", "history_out": folder / "history.parquet",
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    tiny_bert(folder / "base", dropout=0.0)
    fit(**toy_tables(folder / "tables"), **job(folder / "run"))
    return folder


def texts_of(folder: Path) -> list[tuple[str, str]]:
    queries = tables.read(folder / "tables" / "queries.parquet", "queries")["text"].to_pylist()
    texts = tables.read(folder / "tables" / "texts.parquet", "texts")["text"].to_pylist()
    pairs = tables.read(folder / "tables" / "pairs.parquet", "pairs")
    ids = zip(pairs["query_id"].to_pylist(), pairs["text_id"].to_pylist(), strict=True)
    return [(queries[query], texts[text]) for query, text in ids]


def test_it_learns_to_put_the_positive_first(trained):
    rows = tables.read(trained / "run" / "history.parquet", "history").to_pylist()
    assert rows[0]["loss"] == pytest.approx(np.log(3), abs=0.15)  # a new head knows nothing of three
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    logits = Reranker.load(str(trained / "run" / "model")).score(texts_of(trained)).reshape(-1, 4)
    assert (logits.argmax(1) == 0).mean() > 0.7


def test_the_checkpoint_gives_the_same_logits_in_sentence_transformers(trained):
    from sentence_transformers import CrossEncoder

    pairs = texts_of(trained)
    theirs = CrossEncoder(str(trained / "run" / "model"), device="cpu", max_length=48).predict(pairs)
    ours = Reranker.load(RerankerConfig(model=str(trained / "run" / "model"), max_length=48)).score(pairs)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_an_interrupted_run_equals_an_uninterrupted_one(trained, monkeypatch):
    paths = {name: trained / "tables" / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
    args = {"num_train_epochs": 2, "save_steps": 4, "save_total_limit": 1}
    fit(**paths, **job(trained / "whole", args))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        from retune.training.trainer import GroupTrainer

        plain = GroupTrainer.compute_loss

        def until_step_6(self, *given, **named):
            if self.state.global_step == 5:
                raise KeyboardInterrupt
            return plain(self, *given, **named)

        patch.setattr(GroupTrainer, "compute_loss", until_step_6)
        fit(**paths, **job(trained / "parts", args))
    checkpoints = trained / "parts" / "state" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-4"]
    fit(**paths, **job(trained / "parts", args))
    one, two = (trained / name / "model" / "model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()


def test_at_most_max_queries(trained):
    paths = {name: trained / "tables" / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
    fit(**paths, **job(trained / "few", {"num_train_epochs": 1, "logging_steps": 1}, max_queries=9))
    rows = tables.read(trained / "few" / "history.parquet", "history").to_pylist()
    assert [row["step"] for row in rows] == [1, 2]  # 8 queries and 1


def test_mistakes_name_the_section(trained):
    paths = {name: trained / "tables" / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
    with pytest.raises(UserError, match=r"reranker\.fit\.args: .*learning_rat"):
        fit(**paths, **job(trained / "wrong", {"learning_rat": 1}))
