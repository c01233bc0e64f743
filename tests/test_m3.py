"""M3 from checkpoint to measures: heads that are loaded, trained, saved, merged, embedded and ranked by."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from flagembedding import ask, needs_flagembedding
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from test_train import job
from tiny import some_texts, tiny_bert, tiny_m3
from toy import toy_tables

from retune import tables
from retune.cli import main
from retune.config import EmbedConfig, EmbedderConfig, TrainConfig
from retune.data import headvectors, rankers
from retune.experiment import load as load_experiment
from retune.model import heads
from retune.model.embedder import Embedder
from retune.model.multihead import HEADS
from retune.plan import Node, Plan
from retune.report.training import curves
from retune.runtime import UserError
from retune.stages.embed import embed
from retune.stages.evaluate import evaluate
from retune.stages.merge import merge
from retune.stages.train import train

CPU = torch.device("cpu")
TEXTS = [*some_texts(14, longest=20), "ba ba ba", ""]
UNIFIED = {"unified_finetuning": True, "colbert_dim": 16, "use_self_distill": True, "self_distill_start_step": 2}


def load(model: Path | str, **settings) -> Embedder:
    return Embedder.load(EmbedderConfig(model=str(model), **settings), target=CPU)


@pytest.fixture(scope="module")
def m3(tmp_path_factory) -> Path:
    """With heads, as FlagEmbedding saves them."""
    return tiny_m3(tmp_path_factory.mktemp("m3"), colbert_dim=16)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """Without heads."""
    return tiny_m3(tmp_path_factory.mktemp("bare"))


def m3_job(folder: Path, base: Path, args: dict | None = None, **settings) -> dict:
    found = job(folder, base, toy_tables(folder / "tables"), args, **UNIFIED | settings)
    return found | {"embedder": EmbedderConfig(model=str(base), family="m3")}


@pytest.fixture(scope="module")
def trained(bare, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(**m3_job(folder, bare, {"num_train_epochs": 16, "learning_rate": 2e-3}))
    return folder


# ---- heads of a checkpoint ----------------------------------------------------------------------


def plainly(model: Embedder, text: str) -> tuple[np.ndarray, dict[int, float], np.ndarray]:
    """A text's vector, its tokens' weights and its tokens' vectors, alone and by transformers' own forward."""
    encoded = model.tokenizer.hf(text, return_tensors="pt", truncation=True, max_length=64)
    with torch.no_grad():
        states = model.backbone(**encoded).last_hidden_state[0]
        dense = torch.nn.functional.normalize(states[0], dim=-1)
        weights = torch.relu(model.heads.sparse_linear(states)).squeeze(-1)
        vectors = torch.nn.functional.normalize(model.heads.colbert_linear(states[1:]), dim=-1)
    bag: dict[int, float] = {}
    for token, weight in zip(encoded["input_ids"][0].tolist(), weights.tolist(), strict=True):
        if token > 3 and weight > 0:  # <s>, <pad>, </s>, <unk>
            bag[token] = max(weight, bag.get(token, 0.0))
    return dense.numpy(), bag, vectors.numpy()


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("budget", [1, 70, 10_000])
def test_heads_equal_one_text_at_a_time(m3, shortcut, budget):
    model = load(m3)
    assert model.card.family == "m3" and model.card.pooling == "cls"
    model.shortcut.enabled = shortcut
    found = model.encode_heads(TEXTS, "passage", max_tokens=budget)
    assert any(len(found.tokens[row]) for row in range(len(TEXTS)))
    for row, text in enumerate(TEXTS):
        dense, bag, vectors = plainly(model, text)
        np.testing.assert_allclose(found.dense[row], dense, atol=1e-5)
        assert found.tokens[row].tolist() == sorted(bag)
        np.testing.assert_allclose(found.weights[row], [bag[token] for token in sorted(bag)], atol=1e-5)
        np.testing.assert_allclose(found.colbert[row], vectors, atol=1e-5)
    np.testing.assert_allclose(model.encode_passages(TEXTS), found.dense, atol=1e-6)


def test_missing_heads_are_refused_for_inference(bare, m3, tmp_path):
    model = load(bare, family="m3")
    assert model.encode_passages(["ba"]).shape == (1, 32)  # dense needs none
    with pytest.raises(UserError, match=r"it has no sparse and colbert heads .* random scores, so only training"):
        model.encode_heads(["ba"], "query")
    half = tiny_m3(tmp_path / "half", colbert_dim=8)
    (half / "sparse_linear.pt").unlink()
    with pytest.raises(UserError, match=r"only one of M3's heads; sparse_linear\.pt is missing"):
        load(half)
    wide = tiny_m3(tmp_path / "wide", colbert_dim=8)
    torch.save(torch.nn.Linear(8, 1).state_dict(), wide / "sparse_linear.pt")
    with pytest.raises(UserError, match="its heads do not fit"):
        load(wide)
    (wide / "colbert_linear.pt").write_bytes(b"no pickle")
    with pytest.raises(UserError, match="its heads cannot be read"):
        load(wide)
    with pytest.raises(UserError, match=r"train\.colbert_dim: .* has a head of 16 dimensions"):
        Embedder.start(EmbedderConfig(model=str(m3)), CPU, 0, 8)


def test_new_heads_are_drawn_with_the_seed(bare, caplog):
    with caplog.at_level(logging.INFO, "retune"):
        first = Embedder.start(EmbedderConfig(model=str(bare), family="m3"), CPU, 3, None).heads.state_dict()
    assert "new heads, drawn with seed 3: sparse, and colbert of 32 dimensions" in caplog.text
    same = Embedder.start(EmbedderConfig(model=str(bare), family="m3"), CPU, 3, None).heads.state_dict()
    other = Embedder.start(EmbedderConfig(model=str(bare), family="m3"), CPU, 4, None).heads.state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


# ---- training -----------------------------------------------------------------------------------


def toy_texts(folder: Path) -> tuple[list[str], list[str]]:
    found = [tables.read(folder / f"tables/{name}.parquet", name)["text"].to_pylist() for name in ("queries", "texts")]
    return found[0], found[1]


def mrr(scores: np.ndarray) -> float:
    """Text i is the positive of query i; ties count against it."""
    own = scores[np.arange(len(scores)), np.arange(len(scores))]
    return float((1 / (scores >= own[:, None]).sum(1)).mean())


def all_scores(model: Embedder, queries: list[str], texts: list[str]) -> dict[str, np.ndarray]:
    """[Q, P] of each head, by plain loops."""
    left = [plainly(model, text) for text in queries]
    right = [plainly(model, text) for text in texts]
    return {
        "dense": np.array([[q[0] @ p[0] for p in right] for q in left]),
        "sparse": np.array([[sum(w * p[1].get(t, 0.0) for t, w in q[1].items()) for p in right] for q in left]),
        "colbert": np.array([[(q[2] @ p[2].T).max(1).mean() for p in right] for q in left]),
    }


def test_unified_training_lowers_the_loss_and_lifts_every_head(trained, bare):
    rows = tables.read(trained / "history.parquet", "history").to_pylist()
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]  # what self-distillation adds has a floor
    assert all(0 < row["sparse_nonzero"] < 1 for row in rows)
    start = Embedder.start(EmbedderConfig(model=str(bare), family="m3"), CPU, 1, 16).eval()
    queries, texts = toy_texts(trained)
    before, after = all_scores(start, queries, texts), all_scores(load(trained / "model"), queries, texts)
    for head in HEADS:
        assert mrr(after[head]) > mrr(before[head]), head
    assert mrr(after["dense"]) > 0.5 and mrr(after["colbert"]) > 0.6


def test_what_is_saved(trained):
    folder = trained / "model"
    own = load_file(folder / heads.FILE)
    for part in heads.PARTS:
        theirs = torch.load(folder / f"{part}.pt", weights_only=True)
        assert set(theirs) == {"weight", "bias"}
        assert all(torch.equal(theirs[name], own[f"{part}.{name}"]) for name in theirs)
    assert not any("linear" in name and "colbert" in name for name in load_file(folder / "model.safetensors"))
    ours, theirs = load(folder), SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(ours.encode_passages(TEXTS), theirs.encode(TEXTS), atol=1e-5)


THEIRS = """
import json, sys
import numpy as np
from FlagEmbedding import BGEM3FlagModel
folder, out, texts = json.loads(sys.stdin.read())
model = BGEM3FlagModel(folder, use_fp16=False, devices="cpu", colbert_dim=16)
found = model.encode(texts, return_dense=True, return_sparse=True, return_colbert_vecs=True, max_length=64)
weights = [{token: float(weight) for token, weight in bag.items()} for bag in found["lexical_weights"]]
np.savez(
    out, dense=found["dense_vecs"], weights=np.array(json.dumps(weights)),
    colbert=np.concatenate(found["colbert_vecs"]),
)
"""


@needs_flagembedding
def test_flagembedding_gives_the_same_representations(trained, tmp_path):
    ask(THEIRS, str(trained / "model"), str(tmp_path / "out.npz"), TEXTS)
    theirs, ours = np.load(tmp_path / "out.npz"), load(trained / "model").encode_heads(TEXTS, "passage")
    np.testing.assert_allclose(ours.dense, theirs["dense"], atol=1e-4)
    np.testing.assert_allclose(ours.colbert.values, theirs["colbert"], atol=1e-4)
    for row, bag in enumerate(json.loads(str(theirs["weights"]))):
        assert sorted(map(int, bag)) == ours.tokens[row].tolist()
        np.testing.assert_allclose(ours.weights[row], [bag[str(t)] for t in ours.tokens[row]], atol=1e-4)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors") | load_file(folder / "model" / heads.FILE)


def test_gradcache_changes_nothing(bare, tmp_path):
    """Chunks of a text or two, all or one of them kept: the same weights, bit for bit."""
    for name, keep in {"all": False, "one": True}.items():
        settings = {"grad_cache": keep, "max_tokens_per_batch": 48}
        train(**m3_job(tmp_path / name, bare, {"max_steps": 3}, **settings))
    one, other = weights_of(tmp_path / "all"), weights_of(tmp_path / "one")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_fixed_encoder_trains_the_heads_alone(bare, tmp_path):
    train(**m3_job(tmp_path, bare, {"max_steps": 4}, fix_encoder=True))
    before, after = load_file(bare / "model.safetensors"), weights_of(tmp_path)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    start = Embedder.start(EmbedderConfig(model=str(bare), family="m3"), CPU, 1, 16).heads.state_dict()
    assert not any(torch.equal(after[name], weight) for name, weight in start.items())


def test_dense_alone_saves_no_other_head(m3, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "retune"):
        train(**job(tmp_path, m3, toy_tables(tmp_path / "tables"), {"max_steps": 1}))
    assert "dense is trained alone, and no other head is saved" in caplog.text
    assert not heads.there(tmp_path / "model") and load(tmp_path / "model").card.family == "m3"


def test_a_collapsed_sparse_head_is_told_of(tmp_path, caplog):
    folder = tiny_m3(tmp_path / "base", colbert_dim=16)
    linear = torch.nn.Linear(32, 1)
    torch.nn.init.constant_(linear.bias, -100.0)
    torch.save(linear.state_dict(), folder / "sparse_linear.pt")
    with caplog.at_level(logging.WARNING, "retune"):
        train(**m3_job(tmp_path, folder, {"max_steps": 2, "logging_steps": 1}))
    assert caplog.text.count("the sparse head has collapsed: it weighs every token 0") == 1
    assert tables.read(tmp_path / "history.parquet", "history")["sparse_nonzero"].to_pylist() == [0.0, 0.0]
    assert "The sparse head has collapsed" in curves(tmp_path / "history.parquet")
    with caplog.at_level(logging.WARNING, "retune"):
        load(tmp_path / "model").encode_heads(["ba"], "query")
    assert "it has collapsed, and finds nothing" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fix_encoder": True}, "fix_encoder: it counts only with"),
        ({"use_self_distill": True}, "use_self_distill: it counts only with"),
        ({"unified_finetuning": True, "use_mrl": True, "mrl_dims": [8]}, "unified_finetuning: without use_mrl"),
        ({"head_weights": {"loss": {"lexical": 1}}}, "lexical"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
    assert TrainConfig(colbert_dim=-1).colbert_dim is None


def test_one_head_is_no_m3(tmp_path):
    asked = job(tmp_path, tiny_bert(tmp_path / "base"), toy_tables(tmp_path / "tables"), unified_finetuning=True)
    with pytest.raises(UserError, match=r"train\.unified_finetuning: .* has one head; set embedder\.family: m3"):
        train(**asked)


# ---- merging ------------------------------------------------------------------------------------


def test_merging_merges_the_heads(m3, trained, bare, tmp_path, caplog):
    other = tiny_m3(tmp_path / "other", seed=5, colbert_dim=16)
    merge(models=[m3, other], weights=[0.25, 0.75], out=tmp_path / "merged")
    one, two, merged = heads.read(m3), heads.read(other), heads.read(tmp_path / "merged")
    for name, weight in merged.items():
        torch.testing.assert_close(weight, 0.25 * one[name] + 0.75 * two[name])
    pickled = torch.load(tmp_path / "merged/colbert_linear.pt", weights_only=True)
    assert torch.equal(pickled["weight"], merged["colbert_linear.weight"])
    assert load(tmp_path / "merged").encode_heads(["ba"], "query").colbert.values.shape[1] == 16
    with caplog.at_level(logging.INFO, "retune"):
        merge(models=[bare, trained / "model"], weights=[0.5, 0.5], out=tmp_path / "half")
    assert "in one of them only, and copied: " in caplog.text
    assert torch.equal(
        heads.read(tmp_path / "half")["sparse_linear.bias"], heads.read(trained / "model")["sparse_linear.bias"]
    )


# ---- embedding and ranking ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(trained, tmp_path_factory) -> dict[str, Path]:
    """The toy queries, and the texts in two shards, by all heads."""
    folder, found = tmp_path_factory.mktemp("embedded"), {}
    parts = {
        "queries": ("queries", "query", (0, 1)),
        "a": ("texts", "passage", (0, 2)),
        "b": ("texts", "passage", (1, 2)),
    }
    for name, (table, kind, shard) in parts.items():
        found[name] = folder / f"{name}.parquet"
        embed(
            table=trained / f"tables/{table}.parquet", kind=kind, shard=shard, out=found[name],
            settings=EmbedConfig(dtype="float32", heads=["colbert", "sparse"]),
            embedder=EmbedderConfig(model=str(trained / "model")), cache=folder / "cache",
        )  # fmt: skip
    return found


def test_the_tables_hold_what_the_heads_make(embedded, trained):
    table = pq.read_table(embedded["b"])
    assert table.column_names == ["id", "vector", "tokens", "weights", "colbert"] and table["id"][0].as_py() == 24
    found = load(trained / "model").encode_heads(toy_texts(trained)[1][24:], "passage")
    for row in range(len(table)):
        assert table["tokens"][row].as_py() == found.tokens[row].tolist()
        np.testing.assert_allclose(table["weights"][row].as_py(), found.weights[row], atol=1e-6)
        np.testing.assert_allclose(table["colbert"][row].as_py(), found.colbert[row], atol=1e-5)


@pytest.mark.parametrize("head", rankers.RANKERS)
def test_rankings_equal_brute_force(embedded, trained, head, tmp_path, monkeypatch):
    monkeypatch.setattr(headvectors, "TEXTS", 7)
    monkeypatch.setattr(headvectors, "QUERIES", 5)
    monkeypatch.setattr(headvectors, "ROWS", 3)
    scores = all_scores(load(trained / "model"), *toy_texts(trained))
    weights, k = {"dense": 1.0, "sparse": 0.3, "colbert": 0.5}, 6
    sums = {"hybrid": sum(weight * scores[name] for name, weight in weights.items())}
    sums["dense+sparse"] = scores["dense"] + 0.3 * scores["sparse"]
    shards = [embedded["a"], embedded["b"]]
    evaluate(queries=embedded["queries"], texts=shards, k=k, out=tmp_path / "run", head=head, weights=weights)
    run = tables.read(tmp_path / "run", "run").to_pylist()
    for query in range(24):
        found = [(row["text_id"], row["score"]) for row in run if row["query_id"] == query]
        first = {name: np.argsort(-each[query], kind="stable")[:k] for name, each in scores.items()}
        common = set(np.flatnonzero(scores["sparse"][query] > 0).tolist())
        pool = {"dense": range(48), "sparse": common, "colbert": first["dense"]}
        both = {*first["dense"].tolist(), *(set(first["sparse"].tolist()) & common)}
        pool |= {"hybrid": both, "dense+sparse": both}
        by = (scores | sums)[head][query]
        expected = sorted(pool[head], key=lambda text: (-by[text], text))[:k]
        assert [text for text, _ in found] == [int(text) for text in expected], (head, query)
        np.testing.assert_allclose([score for _, score in found], by[expected], atol=1e-5)


def test_a_table_without_the_head_says_so(embedded, tmp_path, m3):
    settings = {"settings": EmbedConfig(dtype="float32"), "embedder": EmbedderConfig(model=str(m3))}
    paths = toy_tables(tmp_path)
    embed(table=paths["queries"], kind="query", out=tmp_path / "q", **settings)
    with pytest.raises(UserError, match=r"it has no tokens; embed with the head that makes it \(embed\.heads\)"):
        evaluate(queries=tmp_path / "q", texts=[tmp_path / "q"], k=3, out=tmp_path / "run", head="sparse")


def test_embedding_without_the_heads_is_refused(bare, tmp_path):
    paths = toy_tables(tmp_path)
    with pytest.raises(UserError, match="it has no sparse and colbert heads"):
        embed(
            table=paths["texts"], kind="passage", settings=EmbedConfig(heads=["sparse"]), out=tmp_path / "v",
            embedder=EmbedderConfig(model=str(bare), family="m3"),
        )  # fmt: skip


def test_the_plan_measures_every_head():
    raw = {
        "embedder": {"model": "m", "family": "m3"}, "ingest": {"train": "t.jsonl"},
        "train": {"unified_finetuning": True},
        "evaluate": {"benchmarks": {"b": {"path": "b"}}, "heads": ["dense", "sparse", "hybrid", "dense+sparse"],
                     "models": ["tuned"], "head_weights": {"colbert": 0}},
    }  # fmt: skip
    plan = Plan(load_experiment(raw))
    assert plan.judged("run") == ["tuned", "tuned-sparse", "tuned-hybrid", "tuned-dense+sparse"]
    assert plan.settings(Node("run", "embed", ("tuned", "b", "queries")))["settings"]["heads"] == ["dense", "sparse"]
    assert plan.settings(Node("run", "embed", ("base", "train", "queries")))["settings"]["heads"] == ["dense"]
    hybrid = plan.settings(Node("run", "evaluate", ("b", "tuned-hybrid")))
    both = plan.settings(Node("run", "evaluate", ("b", "tuned-dense+sparse")))
    assert both == hybrid | {"head": "dense+sparse"}
    assert hybrid["head"] == "hybrid" and hybrid["weights"] == {"dense": 1.0, "sparse": 0.3, "colbert": 0.0}
    assert hybrid["index_factory"] == "Flat"  # dense finds candidates
    assert plan.settings(Node("run", "evaluate", ("b", "tuned-sparse"))) == {"k": 100, "head": "sparse"}
    assert plan.settings(Node("run", "metrics"))["models"] == plan.judged("run")
    assert (
        plan.path(Node("run", "evaluate", ("b", "tuned-sparse"))) == "results/run/evaluate/b/tuned-sparse.run.parquet"
    )
    assert [node.labels for node in plan.parents(Node("run", "evaluate", ("b", "tuned-sparse")))][1][0] == "tuned"


def test_train_and_embed_by_command(bare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = some_texts(20, longest=12)
    rows = [{"query": f"is {text.split()[0]}?", "pos": [text], "neg": texts[:2]} for text in texts[4:]]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model_name_or_path", str(bare), "--train_data", "rows.jsonl", "--output_dir", "out", "--max_steps", "1"]
    given += ["--unified_finetuning", "True", "--use_self_distill", "True", "--fix_encoder", "False", "--family", "m3"]
    assert main(["train", *given, "--self_distill_start_step", "0", "--train_group_size", "2"]) == 0
    assert load("out").heads.colbert_dim == 32
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = [
        "embed",
        "--input_file",
        "texts.jsonl",
        "--embedder_name_or_path",
        "out",
        "--heads",
        "sparse",
        "--shards",
        "2",
    ]
    assert main([*asked, "--output_file", "v.npy"]) == 1
    assert main([*asked, "--output_file", "v.parquet"]) == 0
    table = pq.read_table("v.parquet")
    assert table.column_names == ["id", "vector", "tokens", "weights"] and table["id"].to_pylist() == list(range(20))
