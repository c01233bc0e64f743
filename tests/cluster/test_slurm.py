"""The demo, small, on a real SLURM: what each job asked for, what becomes of killed ones, training on two nodes.

Not a part of `make test`: `make cluster` starts it, where SLURM is installed or can be.  Tests marked `long` train, and
take most of the time.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from slurm import Slurm, install, missing, wait_for

from retune import tables

ROOT = Path(__file__).resolve().parents[2]
PROFILE = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
# Here a job may have two threads, and one that has finished is seen soon.
OPTIONS = ["--max-threads", "2", "--latency-wait", "10"]
SOON = ["--slurm-init-seconds-before-status-checks", "2"]
STEPS, SAVED = 24, 4
MANY = 64  # shards; their jobs are as small as the texts are few, so sixteen go out as one, four side by side in it
GROUPED = ["--groups", "embed=embeds", "search=searches", "--group-components", "embeds=16", "searches=16"]
GROUPED += ["--set-threads", "embed=1", "search=1", "--set-resources", "embed:mem_mb=1000", "search:mem_mb=1000"]
GROUPED += ["--cores", "4", "--jobs", "2"]
LONG = 2400  # seconds after which something will not come about any more
pytestmark = pytest.mark.timeout(2 * LONG)
PACKAGES = ["asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "unittest", "urllib", "xml"]


def small(**train) -> dict:
    """The demo's config with little data, and training long enough to be interrupted."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    sizes = {"train_rows": 60, "test_queries": 10, "test_passages": 20, "guard_queries": 10, "guard_passages": 20}
    config |= {"demo": sizes | {"packages": PACKAGES}}
    config["embedder"] |= {"passage_max_length": 32}
    config["reranker"] |= {"max_length": 48, "fit": config["reranker"]["fit"] | {"max_queries": 16}}
    config["embed"], config["score"], config["mine"]["shards"] = {"shards": 2}, {"shards": 2}, 2
    config["ingest"] |= {"dev_fraction": 0.2}  # merging weights are searched by the queries set aside
    config["merge"] = {"models": ["base", "tuned"], "search": {"step": 0.5}}
    args = config["train"]["args"] | {"per_device_train_batch_size": 4, "max_steps": STEPS, "save_steps": SAVED}
    config["train"] |= {"args": args | {"logging_steps": 1}, "dev_queries": 0} | train
    config["evaluate"]["models"] = ["base"]
    del config["variants"]
    return config


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := missing():
        pytest.skip(reason)
    install()
    found = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name in ("retune", "workflow", "profiles", "envs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    (folder / "two_nodes.yaml").write_text(yaml.safe_dump(small(nnodes=2)))
    (folder / "one_node.yaml").write_text(yaml.safe_dump(small(nproc_per_node=2)))
    return folder


def command(config: str, *args: str, profile: str = "slurm") -> list[str]:
    soon = SOON if profile == "slurm" else []
    options = ["--profile", f"profiles/{profile}", "--configfile", config, *OPTIONS, *soon]
    return [sys.executable, "-m", "snakemake", *args, *options]


def snakemake(cluster: Slurm, project: Path, *args: str, **options) -> str:
    """What a run that ends well says."""
    done = subprocess.run(
        command(*args, **options), cwd=project, env=cluster.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rule(job: dict[str, str]) -> str:
    return re.sub(r"_wildcards_.*", "", job["Comment"]).removeprefix("rule_")


def megabytes(memory: str) -> float:
    """`32000M` and `62.50G` as numbers."""
    return float(memory[:-1]) * {"M": 1, "G": 1024, "T": 1024**2}[memory[-1]]


def complete_checkpoints(project: Path) -> list[Path]:
    return sorted(project.glob("results/demo/train/.state/checkpoints/checkpoint-*/complete"))


def trainers(node: str) -> list[int]:
    """Process ids of torchrun and its workers on a node."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            said = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if b"retune.stages.train" in said[0] and f"SLURMD_NODENAME={node}".encode() in said[1].split(b"\0"):
            found.append(int(folder.name))
    return found


class Driver:
    """Snakemake in the background; what it said is shown where something does not come about."""

    def __init__(self, cluster: Slurm, project: Path, *arguments: str) -> None:
        self._said = (project / f"driver-{time.monotonic_ns()}.txt").open("w+")
        options = {"stdout": self._said, "stderr": subprocess.STDOUT, "env": cluster.environment}
        self._process = subprocess.Popen(command(*arguments), cwd=project, **options)

    def until(self, found: Callable[[], object], what: str, seconds: float = LONG) -> None:
        def ended() -> bool:
            return bool(found()) or self._process.poll() is not None

        try:
            wait_for(ended, what, seconds)
            assert found(), f"Snakemake ended before {what}"
        except (TimeoutError, AssertionError) as error:
            self.kill()
            self._said.seek(0)
            pytest.fail(f"{error}\n{self._said.read()}")
        except BaseException:
            self.kill()
            raise

    def ends_well(self) -> None:
        self.until(lambda: self._process.poll() == 0, "its end")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def mined(cluster: Slurm, project: Path) -> list[dict[str, str]]:
    """The jobs of mining, which is disturbed in two ways.

    1. A running `ingest` is cancelled.  2. Snakemake is killed while the parts are searched, which come to their end
    without it; then Snakemake is started again.
    """
    first = Driver(cluster, project, "two_nodes.yaml", "--until", "mine")
    first.until(lambda: cluster.running("rule_ingest"), "a running ingest")
    cluster.run("scancel", cluster.running("rule_ingest")[0])
    first.until(lambda: len(cluster.running("rule_search")) == 2, "both searches running")
    first.kill()
    wait_for(lambda: not cluster.queue(), "the end of what was submitted", LONG)
    snakemake(cluster, project, "two_nodes.yaml", "--unlock")
    snakemake(cluster, project, "two_nodes.yaml", "--until", "mine")
    return accounted(cluster)


@pytest.fixture(scope="module")
def trained(mined, cluster: Slurm, project: Path) -> list[dict[str, str]]:
    """The jobs of the whole experiment; while two nodes train, everything on the second is killed."""
    driver = Driver(cluster, project, "two_nodes.yaml")
    driver.until(lambda: complete_checkpoints(project), "a checkpoint")
    for process in trainers("n2"):
        os.kill(process, signal.SIGKILL)
    driver.ends_well()
    return accounted(cluster)


def accounted(cluster: Slurm) -> list[dict[str, str]]:
    """All jobs so far, once the last has reached the accounts."""
    wait_for(lambda: {job["State"] for job in cluster.jobs()}.isdisjoint({"PENDING", "RUNNING"}), "the accounts")
    return cluster.jobs()


def check_requests(jobs: list[dict[str, str]], rules: set[str]) -> None:
    """Every one of these rules ran as a job with what the profile asks for."""
    done = {rule(job): job for job in jobs if job["State"] == "COMPLETED"}
    assert rules <= set(done)
    attempts = {name: len([job for job in jobs if rule(job) == name]) for name in ("ingest", "train")}
    for name in sorted(rules):
        asked = PROFILE["set-resources"].get(name, {})
        job, attempt = done[name], attempts.get(name, 1)
        memory = eval(asked.get("mem_mb", PROFILE["default-resources"]["mem_mb"]), {"attempt": attempt})
        runtime = eval(asked.get("runtime", PROFILE["default-resources"]["runtime"]), {"attempt": attempt})
        nodes = 2 if name == "train" else 1
        assert (name, megabytes(job["ReqMem"]), job["TimelimitRaw"]) == (name, nodes * memory, str(runtime))
        assert job["Partition"] == asked.get("slurm_partition", "cpu")
        gpus = re.search(r"gres/gpu=(\d+)", job["ReqTRES"])
        assert (name, int(gpus[1]) if gpus else 0) == (name, 2 if name == "train" else asked.get("gpu", 0))
        assert (name, int(job["NNodes"])) == (name, nodes)
        assert int(job["ReqCPUS"]) == nodes * min(2, PROFILE["set-threads"].get(name, 1))


def test_every_rule_of_mining_ran_as_a_job_with_what_the_profile_asks_for(mined) -> None:
    check_requests(mined, {"demo", "ingest", "embed", "search", "mine"})


def test_a_cancelled_job_is_submitted_again_with_more_memory(mined) -> None:
    first, second = [job for job in mined if rule(job) == "ingest"]
    assert first["State"].startswith("CANCELLED") and second["State"] == "COMPLETED"
    assert (megabytes(first["ReqMem"]), megabytes(second["ReqMem"])) == (32000, 64000)


def test_after_a_killed_snakemake_only_the_rest_is_run(mined) -> None:
    first, second = by_run(mined)
    assert {"demo", "ingest", "embed", "search"} <= first
    assert second == {"mine"}


def by_run(jobs: list[dict[str, str]]) -> list[set[str]]:
    """Rules by call of Snakemake, which names its jobs alike."""
    return [{rule(job) for job in jobs if job["JobName"] == run} for run in dict.fromkeys(j["JobName"] for j in jobs)]


@pytest.mark.long
def test_every_other_rule_ran_as_a_job_with_what_the_profile_asks_for(trained) -> None:
    rules = {"split", "leakage", "embed_benchmark", "fit", "scores", "score", "train", "weigh", "merge", "evaluate"}
    check_requests(trained, rules)
    assert not by_run(trained)[2] & {"demo", "ingest", "embed", "search", "mine"}


@pytest.mark.long
def test_small_jobs_are_submitted_as_one(trained) -> None:
    done = {job["Comment"] for job in trained if job["State"] == "COMPLETED"}
    assert {"rule_benchmarks_benchmark", "rule_metrics_metrics"} <= done  # named after group and first rule


@pytest.mark.long
def test_a_dead_node_ends_the_job_and_training_goes_on_from_its_checkpoint(trained, project: Path) -> None:
    states = [job["State"] for job in trained if rule(job) == "train"]
    assert states == ["FAILED", "COMPLETED"]
    said = (project / "logs/demo/train.log").read_text()
    step = int(re.search(rf"going on from step (\d+) of {STEPS}", said)[1])
    assert step >= SAVED and step % SAVED == 0


@pytest.mark.long
def test_two_nodes_learn_as_two_processes_on_one(trained, cluster: Slurm, project: Path) -> None:
    found = losses(project)
    assert len(found) == STEPS
    snakemake(cluster, project, "one_node.yaml", "--until", "train")
    last = [job for job in cluster.jobs() if rule(job) == "train"][-1]
    assert last["NNodes"] == "1" and "gres/gpu=2" in last["ReqTRES"]
    said = cluster.run("sacct", "-X", "-n", "-o", "SubmitLine%2000", "-j", last["JobID"])
    assert "--nodes=1 " in said  # and not by luck: two GPUs may be those of two nodes
    np.testing.assert_allclose(found, losses(project), rtol=1e-5)


def losses(project: Path) -> list[float]:
    return tables.read(project / "results/demo/train/history.parquet", "history")["loss"].to_pylist()


@pytest.mark.long
def test_a_second_run_submits_nothing(trained, cluster: Slurm, project: Path) -> None:
    before = len(cluster.jobs())
    snakemake(cluster, project, "one_node.yaml", "--until", "train")
    assert len(accounted(cluster)) == before


@pytest.mark.long
def test_a_submit_command_does_as_well(cluster: Slurm, project: Path) -> None:
    config = small() | {"name": "generic"}
    config["ingest"]["train"] = {"docstrings": "results/generic/raw/train.jsonl"}
    config["evaluate"] = None
    (project / "generic.yaml").write_text(yaml.safe_dump(config))
    before = len(cluster.jobs())
    snakemake(cluster, project, "generic.yaml", "--until", "ingest", profile="generic")
    assert (project / "results/generic/ingest/pairs.parquet").is_file()
    demo, ingest = accounted(cluster)[before:]
    assert [megabytes(job["ReqMem"]) for job in (demo, ingest)] == [4000, 32000] and ingest["Partition"] == "cpu"


@pytest.mark.long
def test_many_shards_find_what_two_do(mined, cluster: Slurm, project: Path) -> None:
    """More shards than texts, even: some have none."""
    config, wanted, before = small(nnodes=2), negatives(project), len(cluster.jobs())
    config["embed"], config["mine"]["shards"] = {"shards": MANY}, MANY
    (project / "many.yaml").write_text(yaml.safe_dump(config))
    snakemake(cluster, project, "many.yaml", "--until", "mine", *GROUPED)
    jobs = accounted(cluster)[before:]
    assert {job["State"] for job in jobs} == {"COMPLETED"}
    counts = Counter(rule(job) for job in jobs)
    assert counts == {"embeds_embed": MANY // 16 + 1, "searches_search": MANY // 16, "mine": 1}  # and the queries
    for pattern in ("embed/base/texts-*", "mine/found-*"):
        assert len(list(project.glob(f"results/demo/{pattern}-of-{MANY}.parquet"))) == MANY
    assert negatives(project) == wanted


def negatives(project: Path) -> list[dict]:
    """What was mined; the scores of texts that were embedded with others beside them differ by rounding."""
    pairs = tables.read(project / "results/demo/mine/pairs.parquet", "pairs", ["query_id", "text_id", "label"])
    return pairs.to_pylist()
