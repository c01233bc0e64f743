"""The caches in real runs: Snakemake's between workflows, and that of vectors as a corpus grows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_workflow import ROOT, jsonl
from tiny import WORDS, tiny_bert

from retune.data import search

CONFIG = {
    "name": "first",
    "embedder": {"model": "model"},
    "ingest": {"train": "data/train.jsonl"},
    "mine": None,
    "train": None,
    "merge": None,
    "evaluate": {"benchmarks": {"held": {"path": "data/held"}}, "models": ["base"], "k": 5, "cutoffs": [1]},
}
TARGETS = ["held/texts-00-of-01.parquet", "queries.parquet", "texts-00-of-01.parquet"]


def workflow(folder: Path, config: dict, source: Path = ROOT) -> Path:
    """A copy of the project's code beside a tiny model and tiny data."""
    for name in ("retune", "workflow", "profiles", "envs"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "Snakefile", folder)
    tiny_bert(folder / "model")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 8)) for _ in range(12)]
    jsonl(folder / "data/train.jsonl", [{"query": text.split()[0], "pos": [text]} for text in texts[:6]])
    jsonl(folder / "data/held/corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    jsonl(folder / "data/held/queries.jsonl", [{"_id": "q0", "text": texts[0]}])
    (folder / "data/held/qrels").mkdir()
    (folder / "data/held/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def embed(project: Path, store: Path | None, *args: str) -> str:
    """Make the vectors of the run's own texts and the benchmark's; returns what Snakemake said."""
    name = yaml.safe_load((project / "config.yaml").read_text())["name"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"SNAKEMAKE_OUTPUT_CACHE": str(store)} if store else {}
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *args, *(["--cache", "embed"] if store else [])]
    command += ["--", *(f"results/{name}/embed/base/{target}" for target in TARGETS)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def planned(project: Path, store: Path) -> list[str]:
    """The files that a dry run would take from the cache."""
    said = embed(project, store, "--dry-run")
    found = {
        kind: re.findall(rf"Output file results/\w+/embed/base/(\S+) will be {kind} global", said)
        for kind in ("obtained from", "written to")
    }
    assert sorted(found["obtained from"] + found["written to"]) == TARGETS
    return sorted(found["obtained from"])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A workflow that has filled a cache, and the cache."""
    store = tmp_path_factory.mktemp("store")
    project = workflow(tmp_path_factory.mktemp("first"), CONFIG)
    assert embed(project, store).count("Moving output file") == len(TARGETS) == len(list(store.iterdir()))
    return project, store


def test_another_workflow_is_served(first, tmp_path: Path) -> None:
    project, store = first
    other = workflow(tmp_path, CONFIG | {"name": "second"}, project)
    said = embed(other, store)
    assert said.count("Symlinking output file") == len(TARGETS) and "Moving output file" not in said
    for target in TARGETS:
        ours, theirs = other / "results/second/embed/base" / target, project / "results/first/embed/base" / target
        assert ours.resolve() == theirs.resolve()
        assert len(search.load(ours)) == {"queries.parquet": 6, "texts-00-of-01.parquet": 6}.get(target, 12)
    logs = list((other / "logs/second").glob("embed.*"))
    assert len(logs) == len(TARGETS) and not any(log.stat().st_size for log in logs)  # nothing ran


def changed_weights(project: Path) -> None:
    tiny_bert(project / "model", seed=1)


def changed_pooling(project: Path) -> None:
    file = project / "model/1_Pooling/config.json"
    file.write_text(file.read_text().replace("mean_tokens", "cls_token"))


def changed_prompt(project: Path) -> None:
    config = CONFIG | {"embedder": {"model": "model", "passage_instruction": "bar: "}}
    (project / "config.yaml").write_text(yaml.safe_dump(config))


def changed_corpus(project: Path) -> None:
    jsonl(project / "data/held/corpus.jsonl", [{"_id": "d0", "text": "bar bast"}])


def changed_code(project: Path) -> None:
    file = project / "retune/model/pooling.py"
    file.write_text(file.read_text() + "\nEDITED = True\n")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda project: None, TARGETS),
        (changed_weights, []),
        (changed_pooling, []),
        (changed_code, []),
        (changed_prompt, ["queries.parquet"]),  # the prompt of passages is nothing to queries
        (changed_corpus, ["queries.parquet", "texts-00-of-01.parquet"]),
    ],
)
def test_only_the_same_vectors_are_taken(first, tmp_path: Path, change, same: list[str]) -> None:
    other = workflow(tmp_path, CONFIG, first[0])
    change(other)
    assert planned(other, first[1]) == same


def test_a_run_without_the_cache_knows_nothing_of_it(first) -> None:
    said = embed(first[0], None, "--dry-run")
    assert "Nothing to be done" in said  # though its vectors were made with the cache, and have no benchmark
    assert "cach" not in said


def test_of_a_grown_corpus_only_the_new_text_is_embedded(first, tmp_path: Path) -> None:
    project = shutil.copytree(first[0], tmp_path / "project", symlinks=True)
    file = project / "data/held/corpus.jsonl"
    file.write_text(file.read_text() + '{"_id": "new", "text": "bar bast"}\n')
    embed(project, None)
    log = (project / "logs/first/embed.base.held.texts-00-of-01.log").read_text()
    assert "12 of 13 vectors taken from the cache" in log
