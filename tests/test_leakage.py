"""What benchmarks and training data share is counted and named, and left out where that is wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retune import tables
from retune.config import BenchmarkConfig, IngestConfig
from retune.experiment import ConfigError, load
from retune.plan import Node, Plan
from retune.report.leaks import leaks
from retune.runtime import UserError
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

    def __init__(self, folder: Path, rows: list[dict] = TRAIN, titles: dict[str, str] | None = None) -> None:
        self.folder, self.source = folder, write(folder / "train.jsonl", rows)
        corpus = [{"_id": key, "title": (titles or {}).get(key, ""), "text": text} for key, text in CORPUS.items()]
        write(folder / "set/corpus.jsonl", corpus)
        write(folder / "set/queries.jsonl", [{"_id": key, "text": text} for key, text in QUERIES.items()])
        (folder / "set/qrels").mkdir()
        (folder / "set/qrels/test.tsv").write_text("".join(f"{q}\t{d}\t{grade}\n" for q, d, grade in QRELS))
        self.test = {name: folder / f"test/{name}.parquet" for name in NAMES}
        benchmark(BenchmarkConfig(path=str(folder / "set")), self.test, "set")

    def ingest(self, level: int = 1, **settings) -> dict[str, Path]:
        out = {name: self.folder / f"{name}.parquet" for name in (*NAMES, "rejected")}
        levels = {"set": level}
        ingest(IngestConfig(train=self.source, **settings), out, 0, benchmarks={"set": self.test}, levels=levels)
        return out

    def leaks(self, level: int = 1, **settings) -> list[dict]:
        train, out = self.ingest(level, **settings), self.folder / "leakage.parquet"
        files = {name: train[name] for name in NAMES}
        leakage(train=files, benchmarks={"set": self.test}, out=out, levels={"set": level})
        return tables.read(out, "leakage").to_pylist()

    def negatives(self) -> dict[str, list[tuple[str, float | None]]]:
        """{query: its negatives and their scores} of what was read in."""
        texts, queries, pairs = (tables.read(self.folder / f"{name}.parquet", name).to_pylist() for name in NAMES)
        found: dict[str, list] = {row["text"]: [] for row in queries}
        for pair in pairs:
            if not pair["label"]:
                query, text = queries[pair["query_id"]]["text"], texts[pair["text_id"]]["text"]
                found[query].append((text, pair["score"]))
        return found


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
    # one passage, although it is written in two ways
    assert "set: 1 of 2 relevant passages as negatives stand in the training data" in caplog.text


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


def test_a_passage_counts_without_its_title_too(tmp_path: Path) -> None:
    row = {"query": "what is a loom", "pos": ["a LOOM weaves"], "neg": ["Engines Babbage built engines"]}
    data = Data(tmp_path, [row], {"d1": "Looms", "d2": "Engines"})
    corpus = tables.read(data.test["texts"], "texts").to_pylist()
    assert [row["text"] for row in corpus[:2]] == ["Looms A loom weaves", "Engines Babbage built engines"]
    assert [(row["kind"], row["id"]) for row in data.leaks()] == [("positive", 0), ("negative", 1)]
    with pytest.raises(UserError, match="no good row"):  # its only row is left out
        data.ingest(exclude_benchmarks=True)


def test_negatives_that_are_right_answers_of_a_benchmark_leave_their_row(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "retune")
    rows = [
        {"query": "a", "pos": ["one"], "neg": ["Babbage built engines", "two", "graded 0"], "pos_scores": [9],
         "neg_scores": [1, 2, 3]},
        {"query": "b", "pos": ["three"], "neg": ["babbage  built engines"]},
        {"query": "b", "pos": ["three"]},  # the same as the row before once its negative is gone, and no mistake
    ]  # fmt: skip
    data = Data(tmp_path, rows)
    data.ingest(exclude_benchmarks=True)
    assert data.negatives() == {"a": [("two", 2), ("graded 0", 3)], "b": []}
    assert tables.n_rows(tmp_path / "queries.parquet") == 3 and tables.n_rows(tmp_path / "rejected.parquet") == 0
    assert "2 negatives of rows are left out: also relevant passages of the benchmark set" in caplog.text
    for exclude in ("queries", False):
        data.ingest(exclude_benchmarks=exclude)
        assert data.negatives()["a"] == [("Babbage built engines", 1), ("two", 2), ("graded 0", 3)]


def test_the_candidate_pool(tmp_path: Path, caplog) -> None:
    """Right answers in the pool are a kind of their own, and kept out of it where benchmarks are excluded."""
    caplog.set_level("INFO", "retune")
    data = Data(tmp_path, TRAIN[-1:])
    pool = write(tmp_path / "pool.jsonl", [{"text": "BABBAGE built engines"}, {"text": "graded 0"}, {"text": "other"}])
    found = data.leaks(corpus=[pool])
    assert found == [{"benchmark": "set", "kind": "pool", "id": 1, "text": "BABBAGE built engines", "n_rows": 0,
                      "source": None}]  # fmt: skip
    assert 'set: 1 of 2 relevant passages stand in the candidate pool alone, for example "BABBAGE built engines"\n' in (
        caplog.text
    )
    page = leaks(tmp_path / "leakage.parquet")
    assert "relevant passages that are in the candidate pool alone" in page and "50.0%" in page
    assert "keeps it out of the pool" in page and "learnt by heart" not in page
    assert data.leaks(corpus=[pool], exclude_benchmarks="queries") == found
    assert data.leaks(corpus=[pool], exclude_benchmarks=True) == []
    texts = tables.read(tmp_path / "texts.parquet", "texts")["text"].to_pylist()
    assert texts == ["nothing shared", "graded 0", "other"]
    assert "1 passages of ingest.corpus are left out: also relevant passages of the benchmark set" in caplog.text


def test_relevant_is_what_the_benchmark_says(tmp_path: Path) -> None:
    """With relevant_from 2 a passage of grade 1 is no right answer: not counted, and left where it is."""
    data = Data(tmp_path)
    assert [(row["kind"], row["id"]) for row in data.leaks(2)] == [("query", 0), ("negative", 1), ("negative", 1)]
    assert json.loads(tables.metadata(tmp_path / "leakage.parquet")["totals"]) == {"set": [2, 1]}
    data.ingest(2, exclude_benchmarks=True)
    queries = tables.read(tmp_path / "queries.parquet", "queries")["text"].to_pylist()
    assert queries == ["what is a loom", "something else", "unrelated"]


def test_jobs_get_the_grades(tmp_path: Path) -> None:
    held = {"path": "held", "relevant_from": 2}
    raw = {"name": "x", "embedder": {"model": "m"}, "ingest": {"train": "a.jsonl"},
           "evaluate": {"benchmarks": {"held": held}},
           "variants": {"clean": {"ingest": {"exclude_benchmarks": True}}, "lax": {
               "evaluate": {"benchmarks": {"held": {"relevant_from": 1}}}}}}  # fmt: skip
    plan = Plan(load(raw))
    assert plan.settings(Node("x", "leakage")) == {"levels": {"held": 2}}
    assert plan.settings(Node("x", "ingest"))["levels"] == {}
    assert plan.settings(Node("x.clean", "ingest"))["levels"] == {"held": 2}
    assert plan.home(Node("x.lax", "ingest")) == "x" and plan.home(Node("x.lax", "leakage")) == "x.lax"


def test_nothing_to_exclude_is_a_mistake() -> None:
    raw = {"embedder": {"model": "m"}, "ingest": {"train": "a", "exclude_benchmarks": True}}
    with pytest.raises(ConfigError, match=r"ingest\.exclude_benchmarks: expected benchmarks in the section `evaluate`"):
        load(raw)


def test_the_report_counts_and_names(tmp_path: Path) -> None:
    Data(tmp_path).leaks()
    page = leaks(tmp_path / "leakage.parquet")
    assert "test queries that are training queries" in page and "50.0%" in page
    assert "Who is ADA?" in page and "train.jsonl:1" in page
    assert "learnt by heart" in page and "takes it out of the row" in page and "of the pool" not in page


def test_same_input_same_bytes(tmp_path: Path) -> None:
    data = Data(tmp_path)
    data.leaks()
    first = (tmp_path / "leakage.parquet").read_bytes()
    data.leaks()
    assert (tmp_path / "leakage.parquet").read_bytes() == first
