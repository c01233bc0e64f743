"""What benchmarks and training data share is counted and named, and left out where that is wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retune import tables
from retune.config import BenchmarkConfig, IngestConfig
from retune.experiment import ConfigError, load
from retune.report.leaks import leaks
from retune.stages.ingest import benchmark, ingest
from retune.stages.leakage import leakage

NAMES = ("texts", "queries", "pairs")
TRAIN = [
    {"query": "Who  is ADA?", "pos": ["Ada is a language"], "neg": ["Babbage built engines"]},
    {"query": "who is ada?", "pos": ["Countess of Lovelace"]},
    {"query": "what is a loom", "pos": ["a LOOM weaves"], "neg": ["unjudged", "graded 0"]},
    {"query": "something else", "pos": ["unjudged passage"], "neg": ["babbage  built engines"]},
    {"query": "unrelated", "pos": ["nothing shared"]},
]
CORPUS = {"d1": "A loom weaves", "d2": "Babbage built engines", "d3": "unjudged passage", "d4": "graded 0"}
QUERIES = {"q1": "who is Ada?", "q2": "who built engines", "q3": "unjudged query"}
QRELS = [("q1", "d1", 1), ("q1", "d4", 0), ("q2", "d2", 2)]


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Data:
    """Training rows and a benchmark in a folder, read and compared."""

    def __init__(self, folder: Path, rows: list[dict] = TRAIN) -> None:
        self.folder, self.source = folder, write(folder / "train.jsonl", rows)
        write(folder / "set/corpus.jsonl", [{"_id": key, "text": text} for key, text in CORPUS.items()])
        write(folder / "set/queries.jsonl", [{"_id": key, "text": text} for key, text in QUERIES.items()])
        (folder / "set/qrels").mkdir()
        (folder / "set/qrels/test.tsv").write_text("".join(f"{q}\t{d}\t{grade}\n" for q, d, grade in QRELS))
        self.test = {name: folder / f"test/{name}.parquet" for name in NAMES}
        benchmark(BenchmarkConfig(path=str(folder / "set")), self.test, "set")

    def ingest(self, **settings) -> dict[str, Path]:
        out = {name: self.folder / f"{name}.parquet" for name in (*NAMES, "rejected")}
        ingest(IngestConfig(train=self.source, **settings), out, 0, benchmarks={"set": self.test})
        return out

    def leaks(self, **settings) -> list[dict]:
        train, out = self.ingest(**settings), self.folder / "leakage.parquet"
        leakage(train={name: train[name] for name in NAMES}, benchmarks={"set": self.test}, out=out)
        return tables.read(out, "leakage").to_pylist()


def test_by_hand(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "retune")
    data = Data(tmp_path)
    source = data.source
    assert [tuple(row.values()) for row in data.leaks()] == [
        ("set", "query", 0, "Who  is ADA?", 2, f"{source}:1"),
        ("set", "positive", 0, "a LOOM weaves", 1, f"{source}:3"),
        ("set", "negative", 1, "Babbage built engines", 1, f"{source}:1"),
        ("set", "negative", 1, "babbage  built engines", 1, f"{source}:4"),
    ]
    assert f'set: 1 of 2 queries stand in the training data, for example "Who is ADA?" ({source}:1)' in caplog.text
    assert "set: 1 of 2 relevant passages as positives stand in the training data" in caplog.text


def test_nothing_shared(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "retune")
    data = Data(tmp_path, TRAIN[-1:])
    assert data.leaks() == []
    assert "nothing of set stands in the training data" in caplog.text
    assert "No query or relevant passage of set stands in the training data." in leaks(tmp_path / "leakage.parquet")


@pytest.mark.parametrize(("exclude", "left"), [(True, ["something else", "unrelated"]),
                                               ("queries", ["what is a loom", "something else", "unrelated"]),
                                               (False, [row["query"] for row in TRAIN])])  # fmt: skip
def test_rows_that_give_the_benchmark_away_are_left_out(tmp_path: Path, caplog, exclude, left) -> None:
    caplog.set_level("INFO", "retune")
    data = Data(tmp_path)
    found = data.leaks(exclude_benchmarks=exclude)
    assert tables.read(tmp_path / "queries.parquet", "queries")["text"].to_pylist() == left
    rejected = tables.read(tmp_path / "rejected.parquet", "rejected").to_pylist()
    reasons = {row["source"]: row["reason"] for row in rejected}
    query, pos = "query: also a query of the benchmark set", "pos: also a relevant passage of the benchmark set"
    expected = {f"{data.source}:1": query, f"{data.source}:2": query, f"{data.source}:3": pos}
    if exclude == "queries":
        del expected[f"{data.source}:3"]
    assert reasons == (expected if exclude else {})
    assert [json.loads(row["row"]) for row in rejected] == TRAIN[: len(rejected)]
    kinds = {row["kind"] for row in found}
    assert ("query" in kinds) == (not exclude) and ("positive" in kinds) == (exclude is not True)
    if exclude:
        assert f"ingest.exclude_benchmarks: 2 rows are left out: {query}" in caplog.text


def test_nothing_to_exclude_is_a_mistake() -> None:
    raw = {"embedder": {"model": "m"}, "ingest": {"train": "a", "exclude_benchmarks": True}}
    with pytest.raises(ConfigError, match=r"ingest\.exclude_benchmarks: expected benchmarks in the section `evaluate`"):
        load(raw)


def test_the_report_counts_and_names(tmp_path: Path) -> None:
    Data(tmp_path).leaks()
    page = leaks(tmp_path / "leakage.parquet")
    assert "test queries that are training queries" in page and "50.0%" in page
    assert "Who is ADA?" in page and "train.jsonl:1" in page


def test_same_input_same_bytes(tmp_path: Path) -> None:
    data = Data(tmp_path)
    data.leaks()
    first = (tmp_path / "leakage.parquet").read_bytes()
    data.leaks()
    assert (tmp_path / "leakage.parquet").read_bytes() == first
