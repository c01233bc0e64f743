"""Each example config runs from end to end, with a tiny model in place of its own and few steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_workflow import jsonl
from tiny import WORDS, tiny_bert, tiny_decoder, tiny_m3, tiny_reranker

from retune import tables
from retune.experiment import deep_merge
from retune.model.embedder import Embedder
from retune.report.page import decimal
from retune.report.training import COLLAPSED

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "environment": "cpu", "split": {"length_list": [0, 16]},
    "mine": {"range_for_sampling": "1-10", "negative_number": 2},
    "train": {"nproc_per_node": 1, "train_group_size": 3, "args": {"max_steps": 2, "per_device_train_batch_size": 4}},
    "evaluate": {"k": 10, "cutoffs": [1, 10], "models": ["tuned"]}, "merge": None, "report": None,
}  # fmt: skip
TEACHER, LOGGED = {"model": "reranker", "max_length": 60}, {"args": {"logging_steps": 1}}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bge-base": {"evaluate": {"models": ["tuned", "merged"]}, "merge": {}},
    "bge-m3": {"reranker": TEACHER, "evaluate": {"models": ["base", "tuned"]}, "report": {}, "train": LOGGED},
    "gemma2-lora": {"reranker": TEACHER},
    "icl": {"embedder": {"query_max_length": 300}, "reranker": TEACHER},
}


def weighing_m3(folder: Path) -> Path:
    """An M3 model whose sparse head weighs nearly every token."""
    tiny_m3(folder, colbert_dim=16)
    linear = torch.load(folder / "sparse_linear.pt", weights_only=True)
    torch.save(linear | {"bias": linear["bias"] + 1}, folder / "sparse_linear.pt")
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "bge-base": tiny_bert, "bge-m3": weighing_m3,
    "gemma2-lora": lambda folder: tiny_decoder(folder, "gemma2"), "icl": lambda folder: tiny_decoder(folder, "mistral"),
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
    jsonl(tmp_path / "data/sts.jsonl", [row | {"query": row["query"][::-1]} for row in rows[:8]])
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
    CHECKS.get(name, lambda *_: None)(results, given, tuned)


def m3_is_measured_by_head(results: Path, given: dict[str, Any], tuned: Embedder) -> None:
    """Runs that differ, and in the report each head's measures, and what the sparse head did in training."""
    assert tuned.heads.colbert_dim == 16
    runs = {head: tables.read(results / f"evaluate/held/tuned{head}.run.parquet", "run") for head in
            ("", "-sparse", "-colbert", "-dense+sparse", "-hybrid")}  # fmt: skip
    assert len({str(run["score"].to_pylist()) for run in runs.values()}) == 5
    best = {head: run["score"].to_pylist()[0] for head, run in runs.items()}
    assert best["-hybrid"] > max(best[""], best["-colbert"]), "a sum"
    page = (results / "report/index.html").read_text()
    rows = tables.read(results / "evaluate/metrics.parquet", "metrics").to_pylist()
    for head in runs:
        [mean] = [row["value"] for row in rows if row["query_id"] is None and row["model"] == f"tuned{head}"
                  and (row["measure"], row["cutoff"]) == ("nDCG", 10)]  # fmt: skip
        shown = re.search(rf"tuned{re.escape(head)}</span><b>([\d.]+)</b>", page)
        assert shown and shown[1] == decimal(mean), head
        assert re.search(rf"Tuning \w+ nDCG@10{re.escape(head.replace('-', ' of ', 1))} on held ", page), head
    assert "Share of tokens that the sparse head weighs" in page and COLLAPSED not in page


def adapters_are_folded_in(results: Path, given: dict[str, Any], tuned: Embedder) -> None:
    """The model is whole, its adapters lie beside it, and it learnt the tokens of its instruction."""
    said = json.loads((results / "train/model/adapter/adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"]) == (32, 64)
    assert set(said["target_modules"]) == set(given["train"]["target_modules"])
    tokens = given["train"]["additional_special_tokens"]
    assert [tuned.tokenizer.hf.tokenize(token) for token in tokens] == [[token] for token in tokens]
    assert not any("lora" in name for name in load_file(results / "train/model/model.safetensors"))
    instruction, suffix = given["embedder"]["query_instruction"], "\n<response>" if tuned.card.family == "icl" else ""
    assert tuned.read(["co"], "query") == [f"<instruct>{instruction}\n<query>co{suffix}"]
    assert tuned.card.pooling == "last_token" and tuned.card.normalize


CHECKS: dict[str, Callable[[Path, dict[str, Any], Embedder], None]] = {
    "bge-m3": m3_is_measured_by_head, "gemma2-lora": adapters_are_folded_in, "icl": adapters_are_folded_in,
}  # fmt: skip
