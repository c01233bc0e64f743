"""min_delta: a missing gain, or a loss on a guard set, fails, and the message holds the table."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from retune import tables
from retune.config import MinDeltaConfig
from retune.experiment import ConfigError, load
from retune.plan import Node, Plan
from retune.runtime import UserError
from retune.stages.gate import gate

ROOT = Path(__file__).resolve().parents[1]
RAW = {
    "name": "x", "embedder": {"model": "m"}, "ingest": {"train": "a.jsonl"},
    "evaluate": {
        "benchmarks": {"faq": {"path": "faq"}, "web": {"path": "web", "guard": True}},
        "min_delta": {"target": 0.01, "guard": -0.02},
    },
}  # fmt: skip


def table(path: Path, means: dict[tuple[str, str], float], measure: str = "nDCG", cutoff: int = 10) -> Path:
    """A table of metrics with these means, and a query's value that is no mean."""
    rows = []
    for (benchmark, model), value in means.items():
        p = None if model == "base" else 0.25
        row = {"model": model, "benchmark": benchmark, "measure": measure, "cutoff": cutoff, "query_id": None}
        rows += [row | {"value": value, "low": value, "high": value, "p_value": p}]
        rows += [row | {"query_id": 0, "value": 0.0, "low": None, "high": None, "p_value": None}]
        rows += [row | {"measure": "MRR", "value": 0.0, "low": 0.0, "high": 0.0, "p_value": p}]
    tables.write(path, "metrics", {name: [row[name] for row in rows] for name in tables.TABLES["metrics"].names})
    return path


def run(folder: Path, faq: float, web: float, **settings) -> str:
    means = {("faq", "base"): 0.5, ("faq", "merged"): faq, ("web", "base"): 0.4, ("web", "merged"): web}
    options = MinDeltaConfig(**{"target": 0.01, "guard": -0.02, "models": ["merged"]} | settings)
    gate(metrics=table(folder / "m.parquet", means), settings=options, guards=["web"], out=folder / "gate.txt")
    return (folder / "gate.txt").read_text()


def test_the_table_of_what_passed(tmp_path: Path) -> None:
    lines = [line.split("  ") for line in run(tmp_path, 0.51, 0.38).splitlines()]
    assert lines[0] == ["nDCG@10 against base"]
    cells = [[cell.strip() for cell in line if cell] for line in lines[1:]]
    assert cells == [
        ["benchmark", "kind", "model", "base", "then", "difference", "at least"],
        ["faq", "target", "merged", "0.5000", "0.5100", "+0.0100 (p = 0.250)", "+0.0100", "passed"],
        ["web", "guard", "merged", "0.4000", "0.3800", "-0.0200 (p = 0.250)", "-0.0200", "passed"],
    ]


@pytest.mark.parametrize(
    ("faq", "web", "failed"), [(0.509, 0.4, ["faq"]), (0.6, 0.379, ["web"]), (0.4, 0.3, ["faq", "web"])]
)
def test_what_fails(tmp_path: Path, faq: float, web: float, failed: list[str]) -> None:
    with pytest.raises(UserError, match=f"not reached on {len(failed)} benchmark") as caught:
        run(tmp_path, faq, web)
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines if line.endswith("FAILED")] == failed and len(lines) == 5
    assert not (tmp_path / "gate.txt").exists()


def test_without_numbers_no_loss_is_allowed(tmp_path: Path) -> None:
    assert run(tmp_path, 0.5, 0.4, target=0.0, guard=0.0).count("passed") == 2
    with pytest.raises(UserError):
        run(tmp_path, 0.5, 0.3999, target=0.0, guard=0.0)


def test_the_plan_asks_for_a_gate_where_there_is_one() -> None:
    plan = Plan(load(RAW | {"variants": {"free": {"evaluate": {"min_delta": None}}}}))
    asked = [plan.path(node) for node in plan.targets()]
    assert "results/x/evaluate/gate.txt" in asked and "results/x.free/evaluate/gate.txt" not in asked
    settings = plan.settings(Node("x", "gate"))
    assert settings["guards"] == ["web"] and settings["settings"]["models"] == ["merged"]
    # what is a guard, and what must be reached, is nothing that reading or measuring depends on
    other = RAW["evaluate"] | {"benchmarks": {"faq": {"path": "faq", "guard": True}, "web": {"path": "web"}}}
    changed = Plan(load(RAW | {"evaluate": other}))
    for rule, labels in (("benchmark", ("faq",)), ("metrics", ())):
        assert plan.key(Node("x", rule, labels)) == changed.key(Node("x", rule, labels))


def test_trec_runs_are_asked_for() -> None:
    plan = Plan(load(RAW | {"evaluate": RAW["evaluate"] | {"trec": True}}))
    asked = [plan.path(node) for node in plan.targets()]
    assert [path for path in asked if path.endswith(".trec")] == [
        f"results/x/evaluate/{benchmark}/{model}.trec"
        for benchmark in ("faq", "web") for model in ("base", "tuned", "merged")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_delta": {"measure": "nDCG@5"}}, "nDCG@5 is none of the cutoffs"),
        ({"min_delta": {"measure": "ndcg"}}, "evaluate.min_delta.measure"),
        ({"min_delta": {"models": ["tuned"]}, "models": ["base", "merged"]}, "`tuned` is not in evaluate.models"),
        ({"models": ["tuned", "merged"]}, "expected `base` and another model in evaluate.models"),
        ({"benchmarks": {}}, "expected a benchmark to compare models on"),
    ],
)
def test_mistakes(change: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(RAW | {"evaluate": RAW["evaluate"] | change})
    assert message in str(caught.value) and "evaluate" in str(caught.value)


# ---- the rules themselves, with real Snakemake, on tables that are there --------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("retune", "workflow", "profiles", "envs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", tmp_path)
    for name in ("faq", "web"):
        for file in ("queries.jsonl", "corpus.jsonl", "qrels/test.tsv"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("x")
    (tmp_path / "a.jsonl").write_text("{}")
    return tmp_path


def snakemake(project: Path, rule: str, target: str, **evaluate) -> subprocess.CompletedProcess:
    options = RAW["evaluate"] | {"models": ["base", "tuned"]} | evaluate
    config = RAW | {"report": None, "merge": None, "evaluate": options}
    (project / "x.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "snakemake", "--cores", "1", target, "--allowed-rules", rule]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [*command, "--configfile", "x.yaml"], cwd=project, capture_output=True, text=True, env=environment
    )


def test_a_failed_gate_leaves_the_metrics(project: Path) -> None:
    metrics, passed = project / "results/x/evaluate/metrics.parquet", project / "results/x/evaluate/gate.txt"
    metrics.parent.mkdir(parents=True)
    means = {("faq", "base"): 0.5, ("faq", "tuned"): 0.6, ("web", "base"): 0.4, ("web", "tuned"): 0.3}
    before = table(metrics, means).read_bytes()
    done = snakemake(project, "gate", "results/x/evaluate/gate.txt", min_delta={"guard": -0.05})
    shown = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in shown
    assert "evaluate.min_delta: not reached on 1 benchmark" in shown
    assert re.search(r"web +guard +tuned +0\.4000 +0\.3000 +-0\.1000 \(p = 0\.250\) +-0\.0500 +FAILED", shown)
    assert metrics.read_bytes() == before and not passed.exists()
    done = snakemake(project, "gate", "results/x/evaluate/gate.txt", min_delta={"guard": -0.1})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in passed.read_text()


def test_a_run_in_trecs_form(project: Path) -> None:
    results = project / "results/x"
    texts = {"text_id": range(3), "text": list("abc"), "key": ["d7", None, "d9"]}
    tables.write(results / "ingest/faq/texts.parquet", "texts", texts)
    none = [None, None]
    queries = {
        "query_id": [0, 1], "dataset": ["faq"] * 2, "text": ["x", "y"], "key": ["q1", "q2"], "prompt": none,
        "type": none, "in_batch_negatives": [True] * 2, "batch_size": none, "split": ["test"] * 2, "source": ["s"] * 2,
    }  # fmt: skip
    tables.write(results / "ingest/faq/queries.parquet", "queries", queries)
    run = {"query_id": [0, 0, 0, 1], "text_id": [2, 0, 1, 1], "rank": [1, 2, 3, 1], "score": [0.5, 0.5, 0.5, 0.75]}
    tables.write(results / "evaluate/faq/base.run.parquet", "run", run)
    done = snakemake(project, "trec", "results/x/evaluate/faq/base.trec", trec=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in (results / "evaluate/faq/base.trec").read_text().splitlines()]
    assert [(row[0], row[2], row[3], row[5]) for row in rows] == [
        ("q1", "d9", "1", "base"), ("q1", "d7", "2", "base"), ("q1", "1", "3", "base"), ("q2", "1", "1", "base")
    ]  # fmt: skip
    scores = [float(row[4]) for row in rows]
    assert 0.5 == scores[0] > scores[1] > scores[2] > 0.4999 and scores[3] == 0.75
