"""The whole of MS MARCO in 64 shards is planned in seconds, job by job: sizes are in the config, not in data."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SHARDS = 64
# What a cluster adds to configs/msmarco.yaml: shards, nodes, and a teacher whose scores are cut too.
OVER = {
    "reranker": {"model": "BAAI/bge-reranker-base"},
    "embed": {"shards": SHARDS},
    "mine": {"shards": SHARDS},
    "score": {"shards": SHARDS},
    "train": {"knowledge_distillation": True, "nnodes": 2, "nproc_per_node": 8},
    "variants": {"no_teacher": {"score": None, "train": {"knowledge_distillation": False}}},
}
SECONDS = 30


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_ms_marco_in_64_shards_is_planned_within_seconds(profile: str, tmp_path: Path) -> None:
    if profile == "slurm" and not importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        pytest.skip("Snakemake's plugin for SLURM is not installed: pip install -e '.[cluster]'")
    for file in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        (tmp_path / "data/msmarco" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/msmarco" / file).touch()
    (tmp_path / "over.yaml").write_text(yaml.safe_dump(OVER))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--dry-run"]
    command += ["--configfile", str(ROOT / "configs/msmarco.yaml"), "over.yaml", "--quiet", "rules"]
    command += [] if profile == "default" else ["--profile", str(ROOT / "profiles" / profile)]
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    spent, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if os.getloadavg()[0] > (os.cpu_count() or 1):  # others compute here too, so time on the clock tells nothing
        spent = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    counts = {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", said, re.M)}
    assert counts["embed"] == SHARDS + 1 and counts["search"] == SHARDS and counts["scores"] == SHARDS
    models, benchmarks = 1 + 2 + 2, 2  # base, and of each run tuned and merged
    assert counts["embed_benchmark"] == models * benchmarks * (SHARDS + 1)
    assert counts["mine"] == 1 and counts["train"] == 2  # no_teacher mines what the main run mines
    assert spent < SECONDS, f"{spent:.0f} s for {counts['total']} jobs"
