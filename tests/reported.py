"""A run that is made up: tables, metrics and costs of every stage, as a report reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from retune import tables
from retune.stages.metrics import metrics as write_metrics

EVIL = "<script>alert('x')</script> & \"quoted\" <b>bold</b>"
GUARDS = ["guard"]


def write_texts(path: Path, texts: list[str]) -> None:
    tables.write(path, "texts", {"text_id": range(len(texts)), "text": texts, "key": [None] * len(texts)})


def write_queries(path: Path, texts: list[str], dev: int = 0) -> None:
    n = len(texts)
    tables.write(path, "queries", {
        "query_id": range(n), "dataset": ["docs" if i % 3 else "notes" for i in range(n)], "text": texts,
        "key": [None] * n, "prompt": [None] * n, "type": [None] * n, "in_batch_negatives": [True] * n,
        "batch_size": [None] * n, "split": ["dev" if i < dev else "train" for i in range(n)],
        "source": [f"train.jsonl:{i + 1}" for i in range(n)],
    })  # fmt: skip


def write_pairs(path: Path, rows: list[tuple]) -> None:
    names = ("query_id", "text_id", "label", "origin", "similarity", "score")
    tables.write(path, "pairs", dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def write_run(path: Path, ranked: dict[int, list[int]]) -> None:
    rows = [(query, text, rank, 1.0 / rank) for query, found in ranked.items() for rank, text in enumerate(found, 1)]
    tables.write(
        path,
        "run",
        dict(zip(("query_id", "text_id", "rank", "score"), map(list, zip(*rows, strict=True)), strict=True)),
    )


def write_history(path: Path, steps: int) -> None:
    grid = range(10, 10 * steps + 1, 10)
    absent = {field.name: [None] * steps for field in tables.TABLES["history"] if field.nullable}
    tables.write(path, "history", absent | {
        "step": list(grid), "epoch": [step / 100 for step in grid], "loss": [3 * 0.97**i for i in range(steps)],
        "learning_rate": [2e-5 * (1 - i / steps) for i in range(steps)], "grad_norm": [1.0] * steps,
        "positive_similarity": [0.8] * steps, "negative_similarity": [0.3] * steps, "accuracy": [0.9] * steps,
        "tokens_per_second": [1e4] * steps, "padding": [0.05] * steps,
    })  # fmt: skip


def ranking(rng: np.random.Generator, n: int, own: int, good: float) -> list[int]:
    """Twelve of `n` passages, with a query's own one high up with probability `good`."""
    others = [int(i) for i in rng.permutation(n) if i != own][:11]
    others.insert(int(rng.integers(2) if rng.random() < good else rng.integers(3, 12)), own)
    return others


def make_benchmark(folder: Path, seed: int, quality: dict[str, float], n: int = 60) -> tuple[dict, dict]:
    """Tables and runs of a benchmark in which each query's passage has the query's number."""
    rng = np.random.default_rng(seed)
    files = {name: folder / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
    write_texts(files["texts"], [f"Passage {i} says a little about topic {i}. {EVIL}" for i in range(n)])
    write_queries(files["queries"], [f"Which passage is on topic {i}? {EVIL}" for i in range(n)])
    write_pairs(files["pairs"], [(i, i, 1, "given", None, None) for i in range(n)])
    runs = {model: folder / f"{model}.run.parquet" for model in quality}
    for model, good in quality.items():
        write_run(runs[model], {i: ranking(rng, n, i, good) for i in range(n)})
    return files, runs


def make_training(folder: Path, n: int = 300) -> dict[str, Path]:
    """Tables of ingest, split, mine and score."""
    rng = np.random.default_rng(7)
    files = {name: folder / f"{name}.parquet" for name in ("texts", "queries", "pairs", "rejected", "lengths", "bins")}
    write_texts(files["texts"], [f"Text {i}" for i in range(n)])
    write_queries(files["queries"], [f"Query {i}" for i in range(n)], dev=20)
    rows = []
    for i in range(n):
        rows.append((i, i, 1, "given", float(rng.normal(0.6, 0.1)), float(rng.normal(3, 1))))
        rows += [(i, int(j), 0, "mined" if j % 9 else "random", float(rng.normal(0.45, 0.08)), float(rng.normal(-2, 2)))
                 for j in rng.integers(0, n, 7)]  # fmt: skip
    write_pairs(files["pairs"], rows)
    reasons = ["pos: expected a list of strings, found a string"] * 3 + [f"query: empty {EVIL}"]
    tables.write(files["rejected"], "rejected", {
        "dataset": ["docs"] * 4, "source": [f"train.jsonl:{i}" for i in (17, 18, 90, 4)], "reason": reasons,
        "row": ["{}"] * 4,
    })  # fmt: skip
    tokens = np.minimum(rng.lognormal(4.3, 0.6, n), 900).astype(np.int32)
    tables.write(files["lengths"], "lengths", {"text_id": range(n), "n_tokens": tokens})
    bins = ["len-0-500" if t < 500 else "len-500-inf" for t in tokens]
    tables.write(files["bins"], "bins", {"query_id": range(n), "n_tokens": tokens, "length_bin": bins})
    return files


def make_metrics(folder: Path, found: dict[str, tuple[dict, dict]]) -> Path:
    out = folder / "metrics.parquet"
    runs = {(name, model): path for name, (_, paths) in found.items() for model, path in paths.items()}
    files = {name: tables_of for name, (tables_of, _) in found.items()}
    write_metrics(runs=runs, benchmarks=files, cutoffs=[1, 10, 100], seed=1, out=out)
    return out


def write_costs(folder: Path, jobs: dict[str, str]) -> None:
    """Benchmark files as Snakemake writes them: seconds, the same on a clock, and memory in MiB."""
    folder.mkdir()
    for name, cells in jobs.items():
        (folder / f"{name}.tsv").write_text(f"s\th:m:s\tmax_rss\n{cells}\n")


def make_run(folder: Path) -> dict:
    """Inputs of a report with every section."""
    inputs: dict = make_training(folder)
    quality = {"base": 0.4, "tuned": 0.95, "merged": 0.7}
    found = {name: make_benchmark(folder / name, seed, quality) for seed, name in enumerate(("target", "guard"))}
    other = make_benchmark(folder / "other", 0, {"base": 0.4, "tuned": 0.45, "merged": 0.7})
    write_history(folder / "history.parquet", 50)
    write_history(folder / "teacher.parquet", 9)
    cells = {"train": "421.5\t0:07:01\t2210.4", "embed.base.queries": "8.1\t0:00:08\tNA",
             "embed.base.texts-00-of-01": "31\t0:00:31\t900", "mine": "broken"}  # fmt: skip
    write_costs(folder / "costs", cells)
    (folder / "config.yaml").write_text(f"name: demo\nembedder: {{model: org/model}}\n# {EVIL}\n")
    return inputs | {
        "history": folder / "history.parquet", "teacher_history": folder / "teacher.parquet",
        "metrics": make_metrics(folder, found), "benchmarks": {name: files for name, (files, _) in found.items()},
        "runs": {name: runs for name, (_, runs) in found.items()}, "config": folder / "config.yaml",
        "variants": {"demo.no-teacher": make_metrics(folder / "other", {"target": other})},
        "costs": [folder / "costs", folder / "absent"],
    }  # fmt: skip
