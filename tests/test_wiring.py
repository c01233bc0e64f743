"""What rules are told beside the plan: files that models are read from, and where the hub's lie."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from retune.plan import TRAIN, Node

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "workflow"))
wiring = importlib.import_module("wiring")
FILES = ["base/config.json", "base/model.safetensors", "lora/adapter_model.safetensors", "words/tokenizer.json"]


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A config whose model, adapters and tokenizer lie in folders of their own."""
    for name in ("HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.setenv(name, "before")  # goes with the test
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for file in (
        "base/config.json",
        "base/model.safetensors",
        "lora/adapter_model.safetensors",
        "words/tokenizer.json",
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    return {
        "name": "x", "merge": None, "ingest": {"train": str(tmp_path / "rows.jsonl")},
        "embedder": {
            "model": str(tmp_path / "base"), "peft_path": str(tmp_path / "lora"),
            "tokenizer_name": str(tmp_path / "words"),
        },
    }  # fmt: skip


def job(**wildcards: str) -> SimpleNamespace:
    return SimpleNamespace(run="x", **wildcards)


def test_a_job_waits_for_all_files_that_a_model_is_read_from(raw: dict, tmp_path: Path) -> None:
    found = wiring.wire(raw, [])
    assert found.model("base")(job()) == [str(tmp_path / file) for file in FILES]
    assert found.model("tuned")(job()) == ["results/x/train/model"]
    embedder = found.portable("embed", "model", TRAIN, "part")(job(model="base", part="queries"))["embedder"]
    assert embedder["model"] == "input" and embedder["peft_path"] == str(tmp_path / "lora")


def test_a_model_of_the_hub_keeps_its_name_whatever_is_put_on_it(raw: dict, tmp_path: Path) -> None:
    raw["embedder"]["model"] = "someone/model"
    found = wiring.wire(raw, [])
    embedder = found.portable("embed", "model", TRAIN, "part")(job(model="base", part="queries"))["embedder"]
    assert embedder["model"] == "someone/model"
    assert found.model("base")(job())[0] == str(tmp_path / "lora" / "adapter_model.safetensors")


def test_the_hubs_cache_and_token_reach_jobs_by_their_environment_alone(raw: dict, monkeypatch) -> None:
    plain = wiring.wire(raw, [])
    assert (os.environ["HF_HUB_CACHE"], os.environ["HF_TOKEN"]) == ("before", "before")
    monkeypatch.setenv("MINE", "secret")
    found = wiring.wire(raw | {"cache_dir": "models", "token": "MINE"}, [])
    assert (os.environ["HF_HUB_CACHE"], os.environ["HF_TOKEN"]) == ("models", "secret")
    for rule in ("config", "ingest", "split", "train", "report"):
        node = Node("x", rule)
        assert plain.plan.settings(node) == found.plan.settings(node) and plain.plan.key(node) == found.plan.key(node)


def test_a_variable_that_is_not_there(raw: dict, capsys) -> None:
    with pytest.raises(SystemExit):
        wiring.wire(raw | {"token": "NOT_HERE"}, [])
    assert capsys.readouterr().err == "token: there is no environment variable NOT_HERE\n"


RESOURCES = ("gpu", "gres", "nodes", "tasks", "tasks_per_gpu", "mpi")


@pytest.mark.parametrize(
    ("nodes", "processes", "asked"),
    [
        (1, 1, {"gpu": 1, "nodes": 1}),
        (1, 8, {"gpu": 8, "nodes": 1}),
        (2, 8, {"gres": "gpu:8", "nodes": 2, "tasks": 2, "tasks_per_gpu": 0, "mpi": "srun"}),
    ],
)
def test_training_asks_for_its_nodes(raw: dict, nodes: int, processes: int, asked: dict) -> None:
    """Also for one: `gpu` is a number for the whole job, which a scheduler may give on several nodes."""
    found = wiring.wire(raw | {"train": {"nnodes": nodes, "nproc_per_node": processes}}, [])
    values = {name: found.training(name)(job()) for name in RESOURCES}
    assert {name: value for name, value in values.items() if value is not None} == asked


def test_in_an_object_store_files_and_models_are_named_and_not_looked_for(raw: dict) -> None:
    raw |= {"embedder": {"model": "./models/mine"}, "ingest": {"train": "data/rows.jsonl"}}
    found = wiring.wire(raw, [], stored=True)
    assert found.training_files(job()) == ["data/rows.jsonl"]
    assert found.model("base")(job()) == ["./models/mine"]
    raw["embedder"]["model"] = "someone/model"
    assert wiring.wire(raw, [], stored=True).model("base")(job()) == []


@pytest.mark.parametrize("path", ["data/*.jsonl", "/data/rows.jsonl", "../rows.jsonl", "~/rows.jsonl", "data/", "data"])
def test_in_an_object_store_a_path_is_that_of_a_file_there(path: str, raw: dict, capsys: pytest.CaptureFixture) -> None:
    raw["ingest"]["train"] = path
    with pytest.raises(SystemExit):
        wiring.wire(raw, [], stored=True)
    assert f"{path}: with results in an object store, name each file" in capsys.readouterr().err
