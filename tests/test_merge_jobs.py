"""The jobs weigh and merge as the config has them: what is said of the base model is said of no other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny import tiny_bert
from toy import toy_tables

from retune import tables
from retune.data import trial
from retune.experiment import ConfigError, load
from retune.plan import Node, Plan

ROOT = Path(__file__).resolve().parents[1]
JOB = """
import json, runpy, sys
from types import SimpleNamespace

folder, script, job = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
job |= {"input": SimpleNamespace(**job["input"]), "params": SimpleNamespace(**job["params"])}
here = SimpleNamespace(log=["job.log"], threads=1, resources={}, wildcards=SimpleNamespace(run="x"), **job)
sys.path.insert(0, folder)
runpy.run_path(f"{folder}/{script}.py", {"snakemake": here})
"""
RAW = {
    "name": "x",
    "embedder": {"model": "me/base", "revision": "v1"},
    "ingest": {"train": "a.jsonl", "dev_fraction": 0.1},
    "merge": {"models": ["base", "me/other"], "weights": [0.25, 0.75]},
}
SEARCH = {"models": ["base", "me/other"], "search": {"step": 0.5, "measure": "MRR@10", "passages": 20}}
ROWS = [
    {"query": "bar cost", "pos": ["bar cost din"], "neg": ["fun gelt", "hip lox lom"]},
    {"query": "mux gen", "pos": ["mux gen band"], "neg": ["bar cost din"]},
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's cache: me/base at v1 and, of other weights, at main; me/other at main alone."""
    folder = tmp_path_factory.mktemp("hub")
    for seed, (name, revision) in enumerate([("base", "v1"), ("base", "main"), ("other", "main")], 1):
        home, commit = folder / f"models--me--{name}", hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
        tiny_bert(home / "snapshots" / commit, seed)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / revision).write_text(commit)
    return folder


def snapshot(cache: Path, name: str, revision: str) -> Path:
    return cache / f"models--me--{name}" / "snapshots" / hashlib.sha1(f"{name} {revision}".encode()).hexdigest()


def run(folder: Path, cache: Path, rule: str, raw: dict, **files: object) -> Path:
    """Run a rule's script on the settings that follow from a config; its output."""
    node, plan = Node("x", rule), Plan(load(raw))
    out = plan.path(node)
    job = {"params": {"settings": plan.settings(node), **files}, "input": {"weights": []}, "output": [out]}
    command = [sys.executable, "-c", JOB, str(ROOT / "workflow/scripts"), rule, json.dumps(job, default=str)]
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment)
    assert done.returncode == 0, (folder / "job.log").read_text()
    return folder / out


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---- revisions, tokenizers, adapters ------------------------------------------------------------


def test_the_revision_is_that_of_base_alone(tmp_path: Path, cache: Path) -> None:
    """me/other has no v1, and the weights of me/base at main are others."""
    found = state(run(tmp_path, cache, "merge", RAW))
    base, other = state(snapshot(cache, "base", "v1")), state(snapshot(cache, "other", "main"))
    assert all(torch.equal(found[n], (0.25 * base[n].double() + 0.75 * other[n].double()).float()) for n in base)


def test_losses_are_of_the_models_as_each_is_read(tmp_path: Path, cache: Path) -> None:
    """Base's tokenizer is elsewhere, where the words have other ids: the other model has its own."""
    hub, words = tmp_path / "hub", tmp_path / "words"
    shutil.copytree(cache, hub)
    base, other = snapshot(hub, "base", "v1"), snapshot(hub, "other", "main")
    for file in base.glob("*token*"):
        (words / file.name).parent.mkdir(exist_ok=True)
        shutil.move(file, words / file.name)
    said = json.loads((words / "tokenizer.json").read_text())
    ids = said["model"]["vocab"]
    ids["bar"], ids["hip"] = ids["hip"], ids["bar"]
    (words / "tokenizer.json").write_text(json.dumps(said))
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    embedder = RAW["embedder"] | {"tokenizer_name": str(words)}
    merge = {"models": ["base", "me/other"], "examples": str(tmp_path / "few.jsonl")}
    rows = tables.read(run(tmp_path, hub, "weigh", RAW | {"embedder": embedder, "merge": merge}), "weights").to_pylist()
    shutil.copytree(words, base, dirs_exist_ok=True)
    wanted = [loss_by_loops(base), loss_by_loops(other)]
    assert [row["value"] for row in rows[:2]] == pytest.approx(wanted, rel=1e-5) and wanted[0] != wanted[1]


def loss_by_loops(folder: Path) -> float:
    """InfoNCE at temperature .05 of `ROWS`, all passages in one batch, through sentence-transformers."""
    model = SentenceTransformer(str(folder), device="cpu")
    passages = [text for row in ROWS for text in [*row["pos"], *row["neg"]]]
    scores = model.encode([row["query"] for row in ROWS]) @ model.encode(passages).T / 0.05
    losses = []
    for row, own in zip(ROWS, np.exp(scores.astype(np.float64)), strict=True):
        first = passages.index(row["pos"][0])
        others = [score for text, score in zip(passages, own, strict=True) if text not in row["pos"]]
        losses.append(-np.log(own[first] / (own[first] + sum(others))))
    return float(np.mean(losses))


@pytest.mark.parametrize("weights", [{"search": {}}, {"examples": "few.jsonl"}])
def test_what_base_is_put_together_from_is_put_on_no_mixture(weights: dict) -> None:
    parts = {"peft_path": "lora", "tokenizer_name": "words", "config_name": "config", "sha256": "0" * 64}
    raw = RAW | {"embedder": RAW["embedder"] | parts | {"pooling": "mean"}}
    found = Plan(load(raw | {"merge": {"models": ["tuned", "me/other"]} | weights})).settings(Node("x", "weigh"))
    embedder = found["embedder"]
    assert {embedder[key] for key in (*parts, "revision")} == {None} and embedder["pooling"] == "mean"
    assert found["own"] == [{}, {}]


def test_a_base_that_is_trained_here_has_no_revision() -> None:
    plan = Plan(load(RAW | {"variants": {"second": {"embedder": {"model": "variant:x"}}}}))
    assert plan.config("x.second").embedder.revision == "v1"  # of its own base
    revisions = {run: plan.settings(Node(run, "merge"))["revisions"] for run in plan.runs}
    assert revisions == {"x": ["v1", None], "x.second": [None, None]}


# ---- guard sets ---------------------------------------------------------------------------------


def test_a_guard_sets_grades_count_from_where_its_benchmark_says(tmp_path: Path, cache: Path) -> None:
    """Of each query two passages are of grade 1, one is of grade 2, which alone is relevant."""
    aside = toy_tables(tmp_path / "data", 12, split=["dev" if i % 2 else "train" for i in range(12)])
    graded = toy_tables(tmp_path / "graded", 8, seed=5, split=["test"] * 8, label=[2, 1, 1, 0] * 8)
    held = {"path": "held", "guard": True, "relevant_from": 2}
    raw = RAW | {"merge": SEARCH, "evaluate": {"benchmarks": {"held": held}}}
    out = run(tmp_path, cache, "weigh", raw, aside=aside, guards={"held": graded})
    rows = tables.read(out, "weights").to_pylist()
    found = {tuple(row["weights"]): row["value"] for row in rows if row["collection"] == "held"}

    collection = trial.collections(aside, {"held": graded}, seed=42, queries=1000, passages=20)["held"]
    for weights, name, revision in [((1, 0), "base", "v1"), ((0, 1), "other", "main")]:
        values = {level: mrr_by_loops(snapshot(cache, name, revision), collection, level) for level in (1, 2)}
        assert found[weights] == pytest.approx(values[2], abs=1e-9) and values[1] != values[2]


def mrr_by_loops(folder: Path, collection: trial.DevSet, level: int) -> float:
    """MRR@10 through sentence-transformers."""
    model = SentenceTransformer(str(folder), device="cpu")
    scores = model.encode(collection.queries) @ model.encode(collection.passages).T
    judged = list(zip(collection.rows, collection.columns, collection.grades, strict=True))
    values = []
    for row, own in enumerate(scores):
        relevant = {column for query, column, grade in judged if query == row and grade >= level}
        ranks = [rank for rank, column in enumerate(np.argsort(-own, kind="stable")[:10], 1) if column in relevant]
        values.append(1 / ranks[0] if ranks else 0.0)
    return float(np.mean(values))


def test_grades_count_only_for_measures_that_ask_for_them() -> None:
    held = {"path": "held", "guard": True, "relevant_from": 2}
    other = {"path": "other", "relevant_from": 3}
    raw = RAW | {"merge": SEARCH, "evaluate": {"benchmarks": {"held": held, "other": other}}}
    assert Plan(load(raw)).settings(Node("x", "weigh"))["levels"] == {"held": 2}
    raw |= {"merge": SEARCH | {"search": {"measure": "nDCG@10"}}}
    assert Plan(load(raw)).settings(Node("x", "weigh"))["levels"] == {}


@pytest.mark.parametrize(
    ("merge", "guard", "refused"),
    [(SEARCH, True, True), (SEARCH, False, False), (RAW["merge"], True, False), (None, True, False)],
)
def test_a_guard_set_is_not_taken_for_the_queries_set_aside(merge: dict | None, guard: bool, refused: bool) -> None:
    raw = RAW | {"merge": merge, "evaluate": {"benchmarks": {"dev": {"path": "held", "guard": guard}}}}
    if not refused:
        assert list(load(raw).runs["x"].evaluate.benchmarks) == ["dev"]
        return
    with pytest.raises(ConfigError, match=r"evaluate\.benchmarks\.dev: merge\.search calls the queries"):
        load(raw)
