"""Each example config runs from end to end, with a tiny model in place of its own and few steps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_workflow import jsonl
from tiny import WORDS, tiny_bert, tiny_decoder, tiny_m3, tiny_reranker

from retune import tables
from retune.experiment import deep_merge
from retune.model.embedder import Embedder

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "environment": "cpu", "split": {"length_list": [0, 16]},
    "mine": {"range_for_sampling": "1-10", "negative_number": 2},
    "train": {"nproc_per_node": 1, "train_group_size": 3, "args": {"max_steps": 2, "per_device_train_batch_size": 4}},
    "evaluate": {"k": 10, "cutoffs": [1, 10], "models": ["tuned"]}, "merge": None, "report": None,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "bge-base": {"evaluate": {"models": ["tuned", "merged"]}, "merge": {}},
    "bge-m3": {"reranker": {"model": "reranker", "max_length": 60}},
    "icl": {"embedder": {"query_max_length": 300}},
}
MODELS: dict[str, Callable[[Path], Path]] = {
    "bge-base": tiny_bert, "bge-m3": lambda folder: tiny_m3(folder, colbert_dim=16),
    "icl": lambda folder: tiny_decoder(folder, "mistral"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_config_runs(name: str, tmp_path: Path) -> None:
    for part in ("retune", "workflow", "profiles", "envs"):
        (tmp_path / part).symlink_to(ROOT / part)
    shutil.copy(ROOT / "Snakefile", tmp_path)
    MODELS[name](tmp_path / "model")
    tiny_reranker(tmp_path / "reranker")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(6, 14))) for _ in range(24)]
    rows = [{"query": " ".join(text.split()[:4]), "pos": [text], "neg": []} for text in texts]
    jsonl(tmp_path / "data/train.jsonl", rows[:16])
    jsonl(tmp_path / "data/corpus.jsonl", [{"text": text} for text in texts])
    jsonl(tmp_path / "data/held/corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    jsonl(tmp_path / "data/held/queries.jsonl", [{"_id": f"q{i}", "text": rows[i]["query"]} for i in range(16, 24)])
    (tmp_path / "data/held/qrels").mkdir()
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(16, 24))
    (tmp_path / "data/held/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    given = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    config = deep_merge(deep_merge(given, SMALL), {"embedder": {"model": "model"}} | OVERRIDES[name])
    config["embedder"] = given["embedder"] | {"model": "model"} | OVERRIDES[name].get("embedder", {})
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", "small.yaml"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    results = tmp_path / "results" / name
    tuned = Embedder.load(results / "train/model")
    found = tables.read(results / "evaluate/metrics.parquet", "metrics").to_pylist()
    measured = {row["model"] for row in found}
    heads = config["evaluate"].get("heads", ["dense"])
    models = config["evaluate"]["models"]
    assert measured == {m if head == "dense" else f"{m}-{head}" for m in models for head in heads}
    assert tuned.card.family == given["embedder"].get("family", "encoder")
    if name == "icl":
        instruction = given["embedder"]["query_instruction"]
        assert tuned.read(["co"], "query") == [f"<instruct>{instruction}\n<query>co\n<response>"]
    if name == "bge-m3":
        assert tuned.heads.colbert_dim == 16
