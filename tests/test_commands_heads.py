"""retune evaluate --heads: each head of an M3 model, and their sums, measured as plain loops over the texts would."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_m3 import all_scores, load
from tiny import some_texts, tiny_bert, tiny_m3

from retune import tables
from retune.cli import main

N, K = 12, 20
TEXTS = list(dict.fromkeys(some_texts(90, longest=12)))[:60]
QUERIES = [" ".join(text.split()[:3]) for text in TEXTS[:N]]
ALL = ["dense", "sparse", "colbert", "dense+sparse", "all"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_m3(tmp_path_factory.mktemp("models") / "m3", colbert_dim=16)


@pytest.fixture(scope="module")
def words(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("set")
    rows = [{"query": query, "positive": [text]} for query, text in zip(QUERIES, TEXTS, strict=False)]
    for name, lines in {"corpus": [{"content": text} for text in TEXTS], "queries": rows}.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--corpus_data", folder / "corpus.json", "--query_data", folder / "queries.json"]
    found = ["evaluate", "--encoder", model, *files, "--vector_dtype", "float32", "--k", K, "--cutoffs", 10]
    return list(map(str, found))


def evaluated(capsys: pytest.CaptureFixture, words: list[str], *more: object) -> dict:
    assert main([*words, *map(str, more)]) == 0, capsys.readouterr().err
    return ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])


def by_loops(model: Path, weights: dict[str, float]) -> dict[str, float]:
    """MRR@10 of each ranking; sums and colbert among the K best of their first heads."""
    scores = all_scores(load(model, query_max_length=32, passage_max_length=128), QUERIES, TEXTS)
    first = {head: np.argsort(np.argsort(-scores[head], 1, "stable"), 1) < K for head in ("dense", "sparse")}
    first["sparse"] &= scores["sparse"] > 0
    both = first["dense"] | first["sparse"]
    two = sum(weights[head] * scores[head] for head in ("dense", "sparse"))
    ranked = {
        "dense": (scores["dense"], first["dense"]), "sparse": (scores["sparse"], first["sparse"]),
        "colbert": (scores["colbert"], first["dense"]), "dense+sparse": (two, both),
        "hybrid": (two + weights["colbert"] * scores["colbert"], both),
    }  # fmt: skip
    found = {}
    for head, (each, among) in ranked.items():
        each = np.where(among, each, -np.inf)
        own = each[np.arange(N), np.arange(N)]
        ranks = 1 + (each > own[:, None]).sum(1)
        found[head] = float(np.where(np.isfinite(own) & (ranks <= 10), 1 / ranks, 0).mean())
    return found


def test_every_head_and_their_sums(capsys, words, model, tmp_path) -> None:
    outputs = ["--save_metrics", tmp_path / "m.parquet", "--save_run", tmp_path / "run.trec"]
    found = evaluated(capsys, words, "--heads", *ALL, *outputs)
    expected = by_loops(model, {"dense": 1.0, "sparse": 0.3, "colbert": 1.0})
    assert list(found) == ["dense", "sparse", "colbert", "dense+sparse", "hybrid"]
    assert {head: values["MRR@10"] for head, values in found.items()} == pytest.approx(expected, abs=1e-9)
    assert len(set(expected.values())) >= 3, "rankings that differ"
    table = tables.read(tmp_path / "m.parquet", "metrics").to_pylist()
    means = {row["model"]: row["value"] for row in table if row["query_id"] is None and row["measure"] == "MRR"}
    assert means == {"model" + ("" if head == "dense" else f"-{head}"): one["MRR@10"] for head, one in found.items()}
    runs = {path.name: path.read_text().splitlines() for path in tmp_path.glob("*.trec")}
    assert set(runs) == {"run.trec", *(f"run-{head}.trec" for head in list(found)[1:])}
    assert runs["run-colbert.trec"][0].split()[-1] == "m3-colbert" and runs["run.trec"][0].split()[-1] == "m3"


def test_one_head_is_printed_as_ever(capsys, words, model, tmp_path) -> None:
    weights = {"dense": 0.2, "sparse": 3.0, "colbert": 0.5}
    flags = [word for head, weight in weights.items() for word in (f"--{head}_weight", weight)]
    found = evaluated(capsys, words, "--heads", "all", *flags, "--save_run", tmp_path / "run.trec")
    expected = by_loops(model, weights)["hybrid"]
    assert list(found) == ["MRR@10", "Recall@10"] and found["MRR@10"] == pytest.approx(expected, abs=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["run.trec"]
    assert evaluated(capsys, words) == evaluated(capsys, words, "--heads", "dense")


def test_kept_vectors_hold_the_heads(capsys, words, tmp_path) -> None:
    heads = ["--heads", "sparse", "colbert"]
    kept = ["--save_path", tmp_path / "v.parquet"]
    first = evaluated(capsys, words, *heads, *kept, "--save_embedding")
    assert pq.read_schema(tmp_path / "v.parquet").names == ["id", "vector", "tokens", "weights", "colbert"]
    assert evaluated(capsys, words, *heads, *kept, "--load_embedding") == first
    evaluated(capsys, words, *kept, "--save_embedding")
    shown = refused(capsys, words, *heads, *kept, "--load_embedding")
    assert "--heads: " in shown and "v.parquet holds nothing of sparse and colbert; save it with these" in shown
    shown = refused(capsys, words, *heads, "--save_path", tmp_path / "v.npy", "--save_embedding")
    assert "v.npy: sparse and colbert are kept in a .parquet alone" in shown


def test_an_interrupted_evaluation_of_heads_goes_on(capsys, words, tmp_path, monkeypatch) -> None:
    work = ["--work_dir", tmp_path / "work", "--heads"]
    first = evaluated(capsys, words, *work, "dense", "sparse")
    for stage in ("embed", "evaluate"):
        monkeypatch.setattr(f"retune.stages.{stage}.{stage}", lambda **_: pytest.fail("it was done before"))
    assert evaluated(capsys, words, *work, "sparse", "dense") == first


def refused(capsys: pytest.CaptureFixture, words: list[str], *more: object) -> str:
    assert main([*words, *map(str, more)]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


def test_mistakes(capsys, words, tmp_path) -> None:
    assert "--heads: " in refused(capsys, words, "--heads", "dens") and "dense+sparse" in refused(
        capsys, words, "--heads", "dens"
    )
    assert "--heads: one is named twice" in refused(capsys, words, "--heads", "all", "hybrid")
    other = tiny_bert(tmp_path / "bert")
    assert "it has no sparse and colbert heads" in refused(capsys, words, "--encoder", other, "--heads", "sparse")
