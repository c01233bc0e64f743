"""A big run, as one on MS MARCO asks for, is planned in seconds, job by job: sizes are in the config, not in data."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "name": "big",
    "embedder": {"model": "BAAI/bge-base-en-v1.5"},
    "reranker": {"model": "BAAI/bge-reranker-base"},
    "ingest": {"train": "data/train.jsonl", "corpus": "data/corpus.jsonl"},
    "embed": {"shards": 64},
    "mine": {"shards": 64},
    "score": {"shards": 64},
    "train": {"knowledge_distillation": True, "nnodes": 2, "nproc_per_node": 8},
    "evaluate": {"benchmarks": {"dev": {"path": "data/dev"}}},
    "variants": {"no_teacher": {"score": None, "train": {"knowledge_distillation": False}}},
}
SECONDS = 30


def test_a_run_of_64_shards_is_planned_within_seconds(tmp_path: Path) -> None:
    for file in ("train.jsonl", "corpus.jsonl", "dev/corpus.jsonl", "dev/queries.jsonl", "dev/qrels/test.tsv"):
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / file).touch()
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile", "big.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, "--dry-run", "--quiet", "rules"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.M)}
    assert counts["embed"] == 64 + 1 and counts["search"] == 64 and counts["scores"] == 64
    models = 1 + 2 + 2  # base, and of each run tuned and merged
    assert counts["embed_benchmark"] == models * (64 + 1)
    assert counts["mine"] == 1 and counts["train"] == 2  # no_teacher mines what the main run mines
    spent = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    assert spent < SECONDS, f"{spent:.0f} s of computing for {counts['total']} jobs"
