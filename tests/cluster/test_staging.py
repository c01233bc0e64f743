"""Inputs and results in an object store: an S3-compatible server on this machine, and jobs that share nothing else.

Not a part of `make test`: `make staging` starts it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from tiny import WORDS, tiny_bert  # noqa: E402

from retune import tables  # noqa: E402

pytestmark = pytest.mark.timeout(4800)
BUCKET, FOLDER = "results", "some/results"  # names that could be taken for those of the plan
CONFIG = {
    "name": "toy",
    "embedder": {"model": "./models/tiny"},
    "ingest": {"train": "data/train.jsonl", "exclude_benchmarks": True},
    "embed": {"shards": 2},
    "mine": {"range_for_sampling": "1-20", "negative_number": 3, "shards": 2},
    "train": {
        "train_group_size": 3,
        "args": {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1},
    },
    "evaluate": {"benchmarks": {"held": {"path": "data/held"}}, "k": 20, "cutoffs": [1, 10]},
}
SMALL = {key: CONFIG[key] for key in ("name", "embedder", "train")} | {
    "ingest": {"train": "data/train.jsonl"},
    "mine": {"range_for_sampling": "1-20", "negative_number": 3},
    "merge": None,
}
MADE = {"config.yaml", "ingest/pairs.parquet", "train/model/model.safetensors", "train/README.md", "report/index.html"}
# As profiles/kubernetes has it, but for where jobs run.
PODS = [
    "--executor", "cluster-generic", "--cluster-generic-submit-cmd", f"sh {ROOT}/tests/cluster/pod.sh",
    "--cluster-generic-status-cmd", "sh -c 'cat $0/ended 2>/dev/null || echo running'", "--cores", "2", "--jobs", "2",
    "--max-threads", "1", "--seconds-between-status-checks", "1", "--latency-wait", "5",
]  # fmt: skip


class Store:
    """A bucket on a server in this process."""

    def __init__(self, port: int) -> None:
        import boto3

        self.url = f"http://127.0.0.1:{port}"
        keys = {"aws_access_key_id": "me", "aws_secret_access_key": "mine", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=self.url, **keys)
        self.client.create_bucket(Bucket=BUCKET)
        self.environment = {
            "SNAKEMAKE_STORAGE_S3_ENDPOINT_URL": self.url,
            "SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "me",
            "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "mine",
        }

    def upload(self, folder: Path) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.client.upload_file(str(file), BUCKET, f"{FOLDER}/{file.relative_to(folder)}")

    def download(self, folder: Path) -> set[str]:
        """Copy everything into a folder; returns the names."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        names = {item["Key"].removeprefix(f"{FOLDER}/") for page in pages for item in page["Contents"]}
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.client.download_file(BUCKET, f"{FOLDER}/{name}", str(folder / name))
        return names


@pytest.fixture
def store() -> Iterator[Store]:
    server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        yield Store(running.get_host_and_port()[1])
    finally:
        running.stop()


@pytest.fixture
def project(tmp_path: Path, store: Store) -> Path:
    """The workflow without any data; data and a tiny model are in the store."""
    brought, project = tmp_path / "brought", tmp_path / "project"
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(6, 20))) for _ in range(80)]
    rows: list[Any] = [{"query": " ".join(text.split()[:4]), "pos": [text]} for text in texts]
    jsonl(brought / "data/train.jsonl", rows[:50])
    jsonl(brought / "data/held/corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(texts)])
    jsonl(brought / "data/held/queries.jsonl", [{"_id": f"q{i}", "text": rows[i]["query"]} for i in range(50, 80)])
    (brought / "data/held/qrels").mkdir()
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(50, 80))
    (brought / "data/held/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    tiny_bert(brought / "models/tiny")
    store.upload(brought)
    for name in ("retune", "workflow", "profiles", "envs"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", project)
    return project


def jsonl(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def snakemake(project: Path, store: Store, config: dict[str, Any], *args: str) -> str:
    """What a run that ends well says."""
    (project / "toy.yaml").write_text(yaml.safe_dump(config))
    pods = project.parent / "pods"
    pods.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= store.environment | {"PODS": str(pods)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # a job's python is the first there
    prefix = ["--default-storage-prefix", f"s3://{BUCKET}/{FOLDER}"]
    command = [sys.executable, "-m", "snakemake", "--configfile", "toy.yaml", *args, *prefix]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    said = "\n".join(file.read_text() for file in pods.glob("*/said.txt"))
    assert done.returncode == 0, done.stdout + done.stderr + said
    return done.stdout + done.stderr


def results(project: Path, store: Store) -> set[str]:
    """Names of the results in the store, copies of which are then in `found`; there are none elsewhere."""
    found = store.download(project.parent / "found")
    assert {"logs/toy/train.log", "benchmarks/toy/train.tsv"} <= found
    assert not [name for name in found if "/.state/" in name or "/.kept/" in name]
    assert not (project / "results").exists() and not (project / "logs").exists()
    return {name.removeprefix("results/toy/") for name in found}


def test_one_machine_works_on_a_store(project: Path, store: Store) -> None:
    options = ["--cores", "2", "--default-storage-provider", "s3"]
    snakemake(project, store, CONFIG, *options)
    judged = {"merge/model/model.safetensors", "evaluate/held/merged.run.parquet", "evaluate/metrics.parquet"}
    assert MADE | judged | {"embed/base/texts-01-of-02.parquet"} <= results(project, store)
    measured = tables.read(project.parent / "found/results/toy/evaluate/metrics.parquet", "metrics").to_pylist()
    assert {row["model"] for row in measured} == {"base", "tuned", "merged"}
    assert "Nothing to be done" in snakemake(project, store, CONFIG, *options)


def test_jobs_that_share_nothing_meet_in_the_store(project: Path, store: Store) -> None:
    options = ["--profile", "profiles/kubernetes", *PODS]
    snakemake(project, store, SMALL, *options)
    assert results(project, store) >= MADE
    pods = (project.parent / "pods").iterdir()
    assert [(pod / "ended").read_text().strip() for pod in pods] == ["success"] * 6
    assert "Nothing to be done" in snakemake(project, store, SMALL, *options)


def test_the_profile_is_one_of_snakemake(project: Path, store: Store) -> None:
    pytest.importorskip("snakemake_executor_plugin_kubernetes")
    said = snakemake(project, store, CONFIG, "--profile", "profiles/kubernetes", "--dry-run")
    assert "gpu_manufacturer=nvidia" in said and "mem_mb=64000" in said
