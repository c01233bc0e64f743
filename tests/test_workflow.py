"""The workflow as users run it: whole runs, second runs, edits, mistakes and failures, with real Snakemake."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import WORDS, tiny_bert

from retune import tables

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "name": "toy",
    "embedder": {"model": "model"},
    "ingest": {"train": "data/train.jsonl", "dev_fraction": 0.1},
    "embed": {"shards": 2},
    "mine": {"range_for_sampling": "1-20", "negative_number": 3, "shards": 2},
    "train": {
        "train_group_size": 3,
        "temperature": 0.05,
        "args": {"per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 1},
    },
    "evaluate": {"benchmarks": {"held": {"path": "data/held"}}, "k": 20, "cutoffs": [1, 10]},
    "variants": {
        "teacher": {
            "reranker": {"model": "model", "max_length": 48, "fit": {"train_group_size": 3}},
            "score": {"shards": 2},
            "train": {"knowledge_distillation": True},
        }
    },
}


def jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def snakemake(project: Path, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", "toy.yaml", *args]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)


def planned(project: Path, *args: str) -> set[str]:
    """Rules that a dry run would run."""
    return set(counted(project, *args)) - {"all"}


def counted(project: Path, *args: str) -> dict[str, int]:
    """{rule: jobs} that a dry run would run."""
    done = snakemake(project, "--dry-run", *args)
    assert done.returncode == 0, done.stderr
    stats = re.search(r"job +count\n[- ]+\n(.*?)\ntotal", done.stdout + done.stderr, re.S)
    return {rule: int(count) for rule, count in map(str.split, stats[1].splitlines())} if stats else {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project beside a tiny model and tiny data, run once from end to end."""
    project = tmp_path_factory.mktemp("project")
    for name in ("retune", "workflow", "profiles", "envs"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", project)
    tiny_bert(project / "model")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(6, 20))) for _ in range(80)]
    rows = [{"query": " ".join(text.split()[:4]), "pos": [text], "neg": []} for text in texts]
    jsonl(project / "data/train.jsonl", rows[:50])
    jsonl(project / "data/held/corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(texts)])
    jsonl(project / "data/held/queries.jsonl", [{"_id": f"q{i}", "text": rows[i]["query"]} for i in range(50, 80)])
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(50, 80))
    (project / "data/held/qrels").mkdir()
    (project / "data/held/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    (project / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    done = snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    return project


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """The finished project, to be changed by a test; times are kept, so that nothing looks new."""
    copy = tmp_path / "project"
    shutil.copytree(finished, copy, symlinks=True)
    return copy


def test_every_artifact_of_the_contract_is_there(finished: Path) -> None:
    files = [
        "config.yaml",
        "ingest/texts.parquet",
        "ingest/queries.parquet",
        "ingest/pairs.parquet",
        "ingest/rejected.parquet",
        "ingest/leakage.parquet",
        "split/lengths.parquet",
        "split/bins.parquet",
        "embed/base/queries.parquet",
        "embed/base/texts-00-of-02.parquet",
        "embed/base/texts-01-of-02.parquet",
        "mine/pairs.parquet",
        "mine/mining.parquet",
        "train/model/model.safetensors",
        "train/history.parquet",
        "train/README.md",
        "merge/model/model.safetensors",
        "merge/README.md",
        "evaluate/held/base.run.parquet",
        "evaluate/held/tuned.run.parquet",
        "evaluate/held/merged.run.parquet",
        "evaluate/metrics.parquet",
        "report/index.html",
    ]
    missing = [file for file in files if not (finished / "results/toy" / file).is_file()]
    assert missing == []
    assert not (finished / "results/toy/train/.state").exists()
    costs = {path.name for path in (finished / "benchmarks/toy").iterdir()}
    assert {"mine.tsv", "train.tsv", "embed.base.queries.tsv"} <= costs


def test_a_variant_has_only_what_is_its_own(finished: Path) -> None:
    own = {path.name for path in (finished / "results/toy.teacher").iterdir()}
    assert own == {".kept", "config.yaml", "score", "train", "embed", "merge", "evaluate", "report"}
    assert sorted(path.name for path in (finished / "results/toy.teacher/embed").iterdir()) == ["merged", "tuned"]
    scored = tables.read(finished / "results/toy.teacher/score/pairs.parquet", "pairs")
    assert scored["score"].null_count == 0
    assert len(scored) == tables.n_rows(finished / "results/toy/mine/pairs.parquet")


def test_metrics_hold_every_model(finished: Path) -> None:
    found = tables.read(finished / "results/toy.teacher/evaluate/metrics.parquet", "metrics").to_pylist()
    means = {(row["model"], row["measure"], row["cutoff"]): row["value"] for row in found if row["query_id"] is None}
    assert {model for model, _, _ in means} == {"base", "tuned", "merged"}
    assert means["tuned", "MRR", 10] > means["base", "MRR", 10]


def test_the_tuned_model_loads_in_sentence_transformers(finished: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from retune.model.embedder import Embedder

    for folder in ("results/toy/train/model", "results/toy/merge/model"):
        theirs = SentenceTransformer(str(finished / folder), device="cpu").encode(WORDS[:5])
        ours = Embedder.load(finished / folder).encode_passages(WORDS[:5])
        assert np.abs(theirs - ours).max() < 1e-5


def test_a_second_run_plans_nothing(finished: Path) -> None:
    done = snakemake(finished, "--dry-run")
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr


AFTER_TRAIN = {"train", "merge", "embed_benchmark", "evaluate", "metrics", "card", "report"}


@pytest.mark.parametrize(
    ("file", "rules"),
    [
        ("retune/objective/losses.py", AFTER_TRAIN | {"fit", "scores", "score"}),  # the teacher learns by them too
        ("retune/objective/recipe.py", AFTER_TRAIN),
        ("retune/stages/mine.py", AFTER_TRAIN | {"mine", "fit", "scores", "score"}),
        ("retune/stages/metrics.py", {"metrics", "card", "report"}),
        ("retune/report/card.py", {"card"}),
        ("retune/config.py", set()),
    ],
)
def test_an_edit_reruns_what_it_reaches(project: Path, file: str, rules: set[str]) -> None:
    path = project / file
    path.write_text(path.read_text() + "\nEDITED = True\n")
    assert planned(project) == rules


def test_a_comment_reruns_nothing(project: Path) -> None:
    for file in ("retune/stages/mine.py", "retune/tables.py", "workflow/scripts/train.py"):
        (project / file).write_text((project / file).read_text() + "\n# a comment\n")
    assert planned(project) == set()


def test_a_setting_reruns_its_stage_and_what_follows(project: Path) -> None:
    config = CONFIG | {"train": CONFIG["train"] | {"temperature": 0.1}, "variants": {}}
    (project / "toy.yaml").write_text(yaml.safe_dump(config))
    assert planned(project) == AFTER_TRAIN | {"config"}
    (project / "toy.yaml").write_text(yaml.safe_dump(CONFIG | {"report": {"examples": 3}, "variants": {}}))
    assert planned(project) == {"config", "report"}


def test_weights_are_searched_on_the_queries_set_aside(project: Path) -> None:
    held = CONFIG["evaluate"]["benchmarks"]["held"] | {"guard": True}
    evaluate = CONFIG["evaluate"] | {"benchmarks": {"held": held}}
    config = CONFIG | {"merge": {"search": {"step": 0.5}}, "evaluate": evaluate, "variants": {}}
    (project / "toy.yaml").write_text(yaml.safe_dump(config))
    assert planned(project) == AFTER_TRAIN - {"train"} | {"weigh", "config"}
    done = snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = tables.read(project / "results/toy/merge/weights.parquet", "weights").to_pylist()
    assert [row["collection"] for row in rows] == ["dev", "held"] * 3
    weights = next(row["weights"] for row in rows if row["chosen"])
    card = (project / "results/toy/merge/README.md").read_text()
    assert f"| {weights[0]:.4g} | `model` |" in card and "## Measured" in card
    assert "Merging" in (project / "results/toy/report/index.html").read_text()
    assert planned(project) == set()


def test_a_touched_input_reruns_nothing(project: Path) -> None:
    for file in ("data/train.jsonl", "data/held/corpus.jsonl", "model/model.safetensors", "workflow/scripts/mine.py"):
        (project / file).touch()
    assert planned(project) == set()


def test_changed_data_reruns_all_that_reads_it(project: Path) -> None:
    with open(project / "data/train.jsonl", "a") as file:
        file.write(json.dumps({"query": "bar bast", "pos": ["bar bast cor dist"]}) + "\n")
    found = planned(project)
    assert {"ingest", "split", "embed", "mine", "train", "report"} <= found and "benchmark" not in found


def test_mistakes_in_the_config_are_lines_without_a_traceback(project: Path) -> None:
    (project / "toy.yaml").write_text(
        "name: toy\nembedder: {model: model, pooling: max}\ningest: {train: data/train.jsonl, dev_fraction: 2}\n"
        "mine: {negative_nmber: 3}\ntrain: {learning_rate: 1, args: {lerning_rate: 1}}\n"
    )
    done = snakemake(project, "--dry-run")
    shown = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("toy.yaml:")]
    assert done.returncode != 0 and len(shown) == 5
    assert "Traceback" not in done.stdout + done.stderr


def test_a_bad_row_stops_the_run_with_its_line_and_the_log(project: Path) -> None:
    before = (project / "results/toy/ingest/pairs.parquet").read_bytes()
    with open(project / "data/train.jsonl", "a") as file:
        file.write(json.dumps({"query": "bar", "pos": "cor"}) + "\n")
    done = snakemake(project)
    shown = done.stdout + done.stderr
    assert done.returncode != 0
    assert "train.jsonl:51: pos: expected a list of strings, found a string" in shown
    assert "logs/toy/ingest.log" in shown and "Traceback" not in shown
    assert not (project / "results/toy/ingest/pairs.parquet").exists()  # nothing that looks finished
    assert (project / "results/toy/.kept/ingest/pairs.parquet").read_bytes() == before  # and nothing lost
    assert "results/toy/.kept/ingest/pairs.parquet" in shown
    config = CONFIG | {"ingest": CONFIG["ingest"] | {"on_bad_row": "skip"}}
    (project / "toy.yaml").write_text(yaml.safe_dump(config))
    assert snakemake(project, "--until", "ingest").returncode == 0
    rejected = tables.read(project / "results/toy/ingest/rejected.parquet", "rejected").to_pylist()
    assert [row["source"] for row in rejected] == ["data/train.jsonl:51"]


def test_a_failed_training_loses_nothing_and_passes_for_nothing(project: Path) -> None:
    before = (project / "results/toy/train/model/model.safetensors").read_bytes()
    args = CONFIG["train"]["args"] | {"learning_rate": 1e30}
    config = CONFIG | {"train": CONFIG["train"] | {"args": args}, "variants": {}}
    (project / "toy.yaml").write_text(yaml.safe_dump(config))
    done = snakemake(project, "--until", "train")
    shown = done.stdout + done.stderr
    assert done.returncode != 0 and "the loss is nan at step" in shown and "data/train.jsonl:" in shown
    assert (project / "results/toy/.kept/train/model/model.safetensors").read_bytes() == before
    assert "train" in planned(project)  # the kept model is not taken for the new one


@pytest.mark.parametrize(
    ("lost", "whole", "jobs"),
    [
        ("toy/embed/base/texts-01-of-02", "toy/mine/pairs", {"embed": 1, "search": 1, "mine": 1}),
        ("toy/mine/found-00-of-02", "toy/mine/pairs", {"search": 1, "mine": 1}),
        ("toy.teacher/score/scores-01-of-02", "toy.teacher/score/pairs", {"scores": 1, "score": 1}),
    ],
)
def test_a_lost_shard_is_made_again_alone(project: Path, lost: str, whole: str, jobs: dict[str, int]) -> None:
    files = [project / f"results/{name}.parquet" for name in (lost, whole)]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    target = str(files[1].relative_to(project))
    assert counted(project, target) == jobs
    assert snakemake(project, "--", target).returncode == 0
    assert [file.read_bytes() for file in files] == before


def test_a_missing_file_is_named(project: Path) -> None:
    config = CONFIG | {"ingest": {"train": "data/none-*.jsonl"}}
    (project / "toy.yaml").write_text(yaml.safe_dump(config))
    done = snakemake(project, "--dry-run")
    assert done.returncode != 0 and "data/none-*.jsonl" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("form", ["zip", "html"])
def test_snakemakes_own_report_holds_the_same_pages(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody there: it needs no network
    done = snakemake(finished, "--report", str(tmp_path / f"report.{form}"))
    assert done.returncode == 0, done.stderr
    pages = [(finished / f"results/{run}/report/index.html").read_bytes() for run in ("toy", "toy.teacher")]
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "report.zip") as file:
            held = [file.read(name) for name in file.namelist() if name.endswith("/index.html")]
        assert sorted(held) == sorted(pages)
    else:
        text = (tmp_path / "report.html").read_bytes()
        assert all(base64.b64encode(page) in text for page in pages)


def test_the_report_tells_what_each_stage_did_in_its_time(finished: Path) -> None:
    for run in ("toy", "toy.teacher"):
        text = (finished / f"results/{run}/report/index.html").read_text()
        rows = dict(re.findall(r'<tr><th scope="row">(\w+)(.*?)</tr>', text))
        units = {"ingest": "rows", "split": "tokens", "embed": "tokens", "mine": "queries", "train": "tokens",
                 "evaluate": "queries"}  # fmt: skip
        units |= {"fit": "tokens", "scores": "pairs"} if run == "toy.teacher" else {}
        assert all(re.search(rf"[\d.,]+ {unit}/s", rows[stage]) for stage, unit in units.items()), rows


def test_lint_finds_nothing(finished: Path) -> None:
    done = snakemake(finished, "--lint")
    assert done.returncode == 0, done.stdout + done.stderr
