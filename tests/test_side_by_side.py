"""On a machine with several GPUs jobs of one GPU run side by side, each on its own; without any, one has all threads.

The GPUs are fake, and each job of `scores` waits until another one runs; workflow and profile are the real ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_workflow import jsonl
from tiny import WORDS, tiny_bert, tiny_reranker

from retune import gpus

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "name": "toy", "embedder": {"model": "model"}, "reranker": {"model": "reranker", "max_length": 48},
    "ingest": {"train": "data/train.jsonl"}, "mine": None, "score": {"shards": 2},
    "train": {"knowledge_distillation": True, "train_group_size": 2}, "merge": None,
}  # fmt: skip
MACHINE = """
import os, sys, time
from pathlib import Path
from retune import gpus

here, lend = Path({here!r}), gpus.reserve
gpus.installed = lambda: {{str(i): f"GPU-{{i}}" for i in range({count})}}
gpus.folder = lambda: here


def reserve(count):
    names = lend(count)
    if sys.argv[0].endswith(".scores.py"):
        (here / f"runs-{{os.getpid()}}").write_text(os.environ.get(gpus.VISIBLE, ""))
        end = time.monotonic() + 60
        while len(list(here.glob("runs-*"))) < {count} and time.monotonic() < end:
            time.sleep(0.05)
        assert len(list(here.glob("runs-*"))) >= {count}, "no other job came to run beside this one"
    return names


gpus.reserve = reserve
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    tiny_bert(folder / "model")
    tiny_reranker(folder / "reranker")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 8)) for _ in range(20)]
    jsonl(
        folder / "data/train.jsonl", [{"query": t[:9], "pos": [t], "neg": [texts[i - 1]]} for i, t in enumerate(texts)]
    )
    (folder / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def snakemake(project: Path, count: int, *args: str, **environment: str) -> str:
    """What a run says on a machine with so many GPUs; all its Pythons believe in them."""
    fake = project / "fake"
    fake.mkdir(exist_ok=True)
    (fake / "sitecustomize.py").write_text(MACHINE.format(here=str(project), count=count))
    env = {name: value for name, value in os.environ.items() if name not in (gpus.VISIBLE, gpus.SCHEDULED, gpus.LENDS)}
    env |= {"PYTHONPATH": f"{fake}{os.pathsep}{ROOT}", **environment}
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile", "toy.yaml"]
    done = subprocess.run([*command, *args], cwd=project, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# The second is a Snakemake that runs inside an allocation of SLURM, and starts its jobs there.
@pytest.mark.parametrize("environment", [{}, {gpus.SCHEDULED: "17", gpus.VISIBLE: "0,1"}], ids=["alone", "allocation"])
def test_jobs_of_one_gpu_run_side_by_side_on_their_own(project: Path, environment: dict[str, str]) -> None:
    snakemake(project, 2, "--cores", "2", "--until", "scores", **environment)
    assert sorted(path.read_text() for path in project.glob("runs-*")) == ["GPU-0", "GPU-1"]


@pytest.mark.parametrize(("count", "args", "threads"), [(8, [], 4), (8, ["--resources", "gpu=2"], 16), (0, [], 32)])
def test_each_has_its_share_of_the_threads(project: Path, count: int, args: list[str], threads: int) -> None:
    said = snakemake(project, count, "--cores", "32", "--dry-run", "--until", "train", *args)
    found = dict(re.findall(r"^rule (\w+):\n(?:    (?!threads).*\n)*    threads: (\d+)$", said, re.M))
    assert found == {"scores": str(threads), "train": str(threads)}
