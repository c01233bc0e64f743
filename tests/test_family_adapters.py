"""LoRA adapters of language models and of M3, and other parts that families share with plain encoders."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from test_icl import groups, train_set
from test_train import job
from tiny import tiny_decoder, tiny_m3
from toy import toy_tables

from retune import tables
from retune.config import EmbedConfig, EmbedderConfig, TrainConfig
from retune.data import candidates
from retune.data.batches import Chunker, joined
from retune.data.incontext import InContextCollate
from retune.data.shuffle import Shuffler
from retune.experiment import load as load_experiment
from retune.model import heads, trainable
from retune.model.embedder import Embedder
from retune.model.mixture import mix
from retune.plan import Plan
from retune.stages.embed import embed
from retune.stages.evaluate import evaluate
from retune.stages.train import train

CPU = torch.device("cpu")
LORA = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8}
UNIFIED = {"unified_finetuning": True, "colbert_dim": 16}
TEXTS = ["bar co", "di bar fun ge", "co"]


def load(model: Path | str, **settings) -> Embedder:
    return Embedder.load(EmbedderConfig(model=str(model), **settings), target=CPU)


def run(folder: Path, base: Path, embedder: dict, **settings) -> Path:
    """Four steps on the toy tables; returns the folder of the model."""
    args = {"max_steps": 4, "learning_rate": 1e-2}
    asked = job(folder, base, toy_tables(folder / "tables"), args, **LORA | settings)
    train(**asked | {"embedder": EmbedderConfig(model=str(base), **embedder)})
    return folder / "model"


# ---- language models ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("decoder"), "qwen2")


@pytest.mark.parametrize("family", ["decoder", "icl"])
def test_adapters_of_a_language_model(decoder, tmp_path, family):
    """Folded in, beside their base and alone they are the same embedder, which ends its texts."""
    embedder = {"family": family, "query_instruction": "Find"}
    model = run(tmp_path / "whole", decoder, embedder)
    folded = load(model)
    expected = folded.encode_passages(TEXTS)
    assert np.abs(expected - load(decoder, **embedder).encode_passages(TEXTS)).max() > 1e-3
    assert folded.tokenize(["bar"], "passage").ids[-1] == folded.tokenizer.hf.eos_token_id
    on_base = load(decoder, **embedder, peft_path=str(model / "adapter"))
    np.testing.assert_allclose(on_base.encode_passages(TEXTS), expected, atol=1e-5)
    alone = run(tmp_path / "alone", decoder, embedder, save_merged_lora_model=False)
    assert not (alone / "config.json").exists()
    found = load(alone)
    assert found.card.family == family and found.card.pooling == "last_token"
    np.testing.assert_allclose(found.encode_passages(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(found.encode_queries(TEXTS), folded.encode_queries(TEXTS), atol=1e-5)


def test_adapters_of_a_language_model_are_trained_further(decoder, tmp_path):
    model = run(tmp_path, decoder, {"family": "decoder"})
    settings = EmbedderConfig(model=str(decoder), family="decoder", peft_path=str(model / "adapter"))
    further = trainable.load(settings, TrainConfig(use_lora=True, continue_adapters=True), 0, CPU).eval()
    np.testing.assert_allclose(further.encode_passages(TEXTS), load(model).encode_passages(TEXTS), atol=1e-5)


# ---- M3 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    return tiny_m3(tmp_path_factory.mktemp("bare"))


def same_heads(one: Embedder, other: Embedder) -> None:
    """All that the heads make is the same, and the heads are."""
    mine, theirs = (model.encode_heads(TEXTS, "passage") for model in (one, other))
    np.testing.assert_allclose(mine.dense, theirs.dense, atol=1e-5)
    assert mine.tokens.values.tolist() == theirs.tokens.values.tolist()
    np.testing.assert_allclose(mine.weights.values, theirs.weights.values, atol=1e-5)
    np.testing.assert_allclose(mine.colbert.values, theirs.colbert.values, atol=1e-5)


def test_heads_are_trained_and_saved_with_adapters(bare, tmp_path):
    """The heads that lie with adapters belong to these, and come before those of the base."""
    other = tiny_m3(tmp_path / "other", colbert_dim=16)  # the same backbone, with heads of its own
    model = run(tmp_path / "whole", other, {"family": "m3"}, **UNIFIED)
    folded = load(model)
    assert not torch.equal(heads.read(model)["sparse_linear.weight"], heads.read(other)["sparse_linear.weight"])
    same_heads(folded, load(other, family="m3", peft_path=str(model / "adapter")))
    alone = run(tmp_path / "alone", other, {"family": "m3"}, **UNIFIED, save_merged_lora_model=False)
    assert not (alone / "config.json").exists()
    same_heads(folded, load(alone))
    settings = EmbedderConfig(model=str(bare), family="m3", peft_path=str(model / "adapter"))
    further = TrainConfig(use_lora=True, continue_adapters=True, unified_finetuning=True)
    same_heads(folded, trainable.load(settings, further, 0, CPU).eval())


def test_a_fixed_encoder_is_not_judged_by_its_vectors(bare, tmp_path, caplog):
    """Queries set aside would call the first checkpoint the best: no vector changes."""
    split = ["dev" if row % 4 == 0 else "train" for row in range(24)]
    paths = toy_tables(tmp_path / "tables", split=split)
    asked = job(tmp_path, bare, paths, {"max_steps": 4, "learning_rate": 1e-2}, **UNIFIED, fix_encoder=True)
    asked |= {"embedder": EmbedderConfig(model=str(bare), family="m3"), "judgments": paths["pairs"]}
    with caplog.at_level(logging.INFO, "retune"):
        train(**asked)
    assert "train.fix_encoder: vectors stay as they are" in caplog.text
    assert set(tables.read(tmp_path / "history.parquet", "history")["dev"].to_pylist()) == {None}
    with pytest.raises(ValueError, match="fix_encoder: adapters are a part of the encoder"):
        TrainConfig(**UNIFIED, **LORA, fix_encoder=True)


def test_queries_set_aside_choose_an_m3_model(bare, tmp_path):
    split = ["dev" if row % 4 == 0 else "train" for row in range(24)]
    paths = toy_tables(tmp_path / "tables", split=split)
    asked = job(
        tmp_path, bare, paths, {"max_steps": 4, "logging_steps": 1, "eval_steps": 2, "save_steps": 2}, **UNIFIED
    )
    train(**asked | {"embedder": EmbedderConfig(model=str(bare), family="m3"), "judgments": paths["pairs"]})
    assert set(tables.read(tmp_path / "history.parquet", "history")["dev"].to_pylist()) > {None}
    assert load(tmp_path / "model").heads.colbert_dim == 16


@pytest.mark.parametrize("kept", ["heads.safetensors", "sparse_linear.pt", "both"])
def test_heads_are_merged_whichever_file_they_are_in(tmp_path, kept):
    one, two = (tiny_m3(tmp_path / name, seed, colbert_dim=16) for seed, name in enumerate("ab"))
    expected = {name: 0.5 * weight + 0.5 * heads.read(two)[name] for name, weight in heads.read(one).items()}
    if kept != "sparse_linear.pt":
        heads.write(two, heads.read(two))
    if kept == "heads.safetensors":
        for part in heads.PARTS:
            (two / f"{part}.pt").unlink()
    mix([one, two], [0.5, 0.5], tmp_path / "out")
    for written in (heads.read(tmp_path / "out"), _pickled(tmp_path / "out")):
        assert written.keys() == expected.keys()
        assert all(torch.allclose(written[name], weight, atol=1e-7) for name, weight in expected.items())


def _pickled(folder: Path) -> dict[str, torch.Tensor]:
    (folder / heads.FILE).unlink()
    return heads.read(folder)


@pytest.mark.parametrize("head", ["dense", "colbert", "hybrid"])
def test_an_index_finds_what_the_heads_rank(tmp_path, head):
    """One that misses nothing gives the run of the exact search."""
    base, paths = tiny_m3(tmp_path / "base", colbert_dim=16), toy_tables(tmp_path / "tables")
    for kind, name in (("query", "queries"), ("passage", "texts")):
        embed(
            table=paths[name], kind=kind, settings=EmbedConfig(dtype="float32", heads=["dense", "sparse", "colbert"]),
            embedder=EmbedderConfig(model=str(base), family="m3"), out=tmp_path / name,
        )  # fmt: skip
    asked = {"queries": tmp_path / "queries", "texts": [tmp_path / "texts"], "k": 5, "head": head}
    asked["weights"] = {"dense": 1.0, "sparse": 0.3, "colbert": 1.0}
    evaluate(**asked, out=tmp_path / "exact")
    evaluate(**asked, out=tmp_path / "all", index_factory="IVF4,Flat", nprobe=4)
    evaluate(**asked, out=tmp_path / "few", index_factory="IVF4,Flat", nprobe=1)
    exact, every, few = (tables.read(tmp_path / name, "run")["text_id"].to_pylist() for name in ("exact", "all", "few"))
    assert exact == every != few


def test_runs_of_all_heads_in_trecs_form():
    raw = {
        "embedder": {"model": "m", "family": "m3"}, "ingest": {"train": "t.jsonl"}, "train": None,
        "evaluate": {"benchmarks": {"b": {"path": "b"}}, "heads": ["dense", "sparse"], "trec": True},
    }  # fmt: skip
    plan = Plan(load_experiment(raw))
    wanted = [plan.path(node) for node in plan.targets()]
    assert [path for path in wanted if path.endswith(".trec")] == [
        "results/run/evaluate/b/base.trec", "results/run/evaluate/b/base-sparse.trec"
    ]  # fmt: skip
    raw["evaluate"] |= {"heads": ["sparse"], "min_delta": {}}
    with pytest.raises(Exception, match="min_delta: it compares models by dense, which is not in heads"):
        load_experiment(raw)


# ---- in-context ---------------------------------------------------------------------------------


def test_positives_of_an_in_context_batch_are_shuffled(tmp_path):
    model = load(tiny_decoder(tmp_path / "base", "mistral"), family="icl")
    data, texts, path = train_set(tmp_path / "tables")
    texts = [text * 40 for text in texts]  # long enough to be cut
    tokens = joined([model.tokenize(data.queries, "query", data.prompts), model.tokenize(texts, "passage")])
    positives = [texts[at] for at in data.text_ids[data.starts]]
    shuffler = Shuffler(data, positives, lambda some, _: model.tokenize(some, "passage"), 1.0, 3)
    made = InContextCollate(
        data, Chunker(tokens, model.pad_token_id, 10**6, overhead=10**6), len(data) + data.text_ids, False, None,
        shuffler, model=model, positives=candidates.positive_texts(data, path), settings=TrainConfig(), seed=3,
    )  # fmt: skip
    (chunk,) = (batch := made(groups(data, range(4))))["chunks"]
    changed, others = shuffler(0, np.arange(4), data.starts[:4])
    assert changed.all()
    for at, place in enumerate(batch["passage_places"].tolist()):
        query, member = divmod(at, 3)
        own = model.tokenize([texts[data.text_ids[data.starts[query] + member]]], "passage")
        wanted = own if member else others.take(np.array([query]))
        assert chunk["input_ids"][place][chunk["attention_mask"][place].bool()].tolist() == wanted.ids.tolist()
