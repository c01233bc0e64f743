"""Benchmarks in the forms that others have: judged by text, as TREC has them, in files or on the hub."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ir_measures
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hub import Hub, running
from reported import make_metrics, make_training, write_run

from retune import tables
from retune.config import BenchmarkConfig, ReportConfig
from retune.data.hub import PINNED, _chosen, parse
from retune.experiment import ConfigError, load
from retune.runtime import UserError
from retune.stages.ingest import benchmark
from retune.stages.report import report

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
NAMES = ("texts", "queries", "pairs")


def write(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(folder: Path, **settings) -> SimpleNamespace:
    out = {name: folder / f"out/{name}.parquet" for name in NAMES}
    benchmark(BenchmarkConfig(**settings), out, "set")
    return seen(folder)


def seen(folder: Path) -> SimpleNamespace:
    """Texts and queries as (text, key), and judgments as (query, text, label)."""
    found = {name: tables.read(folder / f"out/{name}.parquet", name).to_pylist() for name in NAMES}
    return SimpleNamespace(
        texts=[(row["text"], row["key"]) for row in found["texts"]],
        queries=[(row["text"], row["key"]) for row in found["queries"]],
        pairs=[(row["query_id"], row["text_id"], row["label"]) for row in found["pairs"]],
    )


# ---- judged by text -----------------------------------------------------------------------------

PASSAGES = [{"content": text} for text in ("A is a", "B is b", "C is c", "also A", "B is b", "C is c")]
ASKED = [{"query": "A?", "positive": ["A is a", "also A"]}, {"query": "C?", "positive": ["C is c"], "id": 7}]


def msmarco(folder: Path, corpus=PASSAGES, queries=ASKED, **settings) -> SimpleNamespace:
    files = {"corpus": write(folder / "corpus.json", corpus), "queries": write(folder / "queries.json", queries)}
    return read(folder, format="msmarco", **files, **settings)


def test_msmarco_by_hand(tmp_path: Path) -> None:
    found = msmarco(tmp_path)
    # the second "C is c" is a copy of a judged passage; the second "B is b" stays
    assert found.texts == [("A is a", "0"), ("B is b", "1"), ("C is c", "2"), ("also A", "3"), ("B is b", "4")]
    assert found.queries == [("A?", "0"), ("C?", "1")]
    assert found.pairs == [(0, 0, 1), (0, 3, 1), (1, 2, 1)]


def test_a_positive_that_is_part_of_a_passage_is_not_found(tmp_path: Path, caplog) -> None:
    found = msmarco(tmp_path, queries=[{"query": "b", "positive": ["B is b", "B is"]}, {"query": "x", "positive": "C"}])
    assert found.queries == [("b", "0")] and found.pairs == [(0, 1, 1)]
    assert f"2 of 3 positives are not here: {tmp_path}/queries.json:1, {tmp_path}/queries.json:2" in caplog.text
    assert "1 of 2 queries are left out" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": [{"query": "A?", "positive": ["none"]}]}, r"corpus\.json: 1 of 1 positives are not here"),
        ({"queries": [{"query": "A?", "answer": ["A is a"]}]},
         r"queries\.json:1: positive: the column is missing, found `query`, `answer`"),
        ({"queries": [{"query": "A?", "positive": [1]}]}, r"queries\.json:1: positive: expected a list of strings"),
        ({"queries": [{"query": " ", "positive": ["A is a"]}]}, r"queries\.json:1: query: empty string"),
        ({"queries": [{"query": "A?", "positive": []}]}, r"queries\.json:1: positive: expected at least one positive"),
        ({"queries": ["{"]}, r"queries\.json:1: row: invalid JSON"),
        ({"queries": []}, r"queries\.json: no rows"),
        ({"corpus": []}, r"corpus\.json: no passages"),
        ({"corpus": [*PASSAGES, {"passage": "D"}]}, r"corpus\.json:7: content: the column is missing, found `passage`"),
        ({"n_passages": 7}, r"corpus\.json: 6 passages, but evaluate\.benchmarks\.set\.n_passages says 7"),
        ({"n_queries": 3}, r"queries\.json: 2 queries with a positive, but .*n_queries says 3: another"),
    ],
)  # fmt: skip
def test_msmarco_mistakes(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        msmarco(tmp_path, **change)
    assert not list(tmp_path.glob("out/*"))


def test_counts_that_hold_pass(tmp_path: Path) -> None:
    assert msmarco(tmp_path, n_passages=6, n_queries=2).queries


def test_intel_by_hand(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c.jsonl", [{"context": ["a", "b"]}, {"context": ["a, b"]}, {"context": "c"}])
    queries = write(tmp_path / "q.jsonl", [{"query": "?", "pos": ["a, b"]}, {"query": "!", "pos": ["b", "c"]}])
    found = read(tmp_path, format="intel", corpus=corpus, queries=queries)
    assert [text for text, _ in found.texts] == ["a", "b", "a, b", "c"]  # each string is a passage of its own
    assert found.pairs == [(0, 2, 1), (1, 1, 1), (1, 3, 1)]


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is absent")
def test_intels_own_example(tmp_path: Path) -> None:
    files = {"corpus": str(DATA / "intel/candidate_context.jsonl"), "queries": str(DATA / "intel/example.jsonl")}
    found = read(tmp_path, format="intel", **files, n_queries=10, n_passages=50)
    assert len(found.pairs) == 10


# ---- TREC ---------------------------------------------------------------------------------------


def test_tsv_and_trec_qrels(tmp_path: Path, caplog) -> None:
    """MS MARCO's own files: collection.tsv, queries.tsv and judgments in TREC's form."""
    files = {
        "corpus": write(tmp_path / "collection.tsv", ["11\tone", "12\ttwo", "13\tthree"]),
        "queries": write(tmp_path / "queries.tsv", ["q2\tsecond", "q1\tfirst", "q3\tunjudged"]),
        "qrels": write(tmp_path / "2019qrels-pass.txt", ["q1 Q0 13 3", "q1 Q0 11 0", "q2 Q0 12 1", "q2 Q0 99 2"]),
    }
    found = read(tmp_path, **files)
    assert found.texts == [("one", "11"), ("two", "12"), ("three", "13")]
    assert found.queries == [("second", "q2"), ("first", "q1")]
    assert sorted(found.pairs) == [(0, 1, 1), (1, 0, 0), (1, 2, 3)]
    assert '1 of 4 judged documents are not here: "99"' in caplog.text
    with pytest.raises(UserError, match=r"queries\.tsv:2: expected an id, a tab and a text, found 1 columns"):
        read(tmp_path, **files | {"queries": write(tmp_path / "queries.tsv", ["q2\tx", "q1 first"])})


def beir(folder: Path, qrels: list[str]) -> SimpleNamespace:
    """Two documents, three queries and these judgments."""
    write(folder / "held/corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(2)])
    write(folder / "held/queries.jsonl", [{"_id": f"q{i}", "text": f"query {i}"} for i in range(3)])
    write(folder / "held/qrels/test.tsv", ["query-id\tcorpus-id\tscore", *qrels])
    return read(folder, path=str(folder / "held"))


def test_queries_whose_positives_are_not_in_the_corpus_are_named(tmp_path: Path, caplog) -> None:
    found = beir(tmp_path, ["q0\td0\t1", "q1\td1\t0", "q1\td8\t1", "q2\td9\t1", "q2\td1\t1"])
    assert found.queries == [("query 0", "q0"), ("query 2", "q2")]
    assert '2 of 4 judged documents are not here: "d8", "d9"' in caplog.text
    assert '1 of 3 queries are left out, as no positive of theirs is here: "q1"' in caplog.text


def test_passages_that_are_not_in_the_corpus_make_no_denominator(tmp_path: Path) -> None:
    """What the page on evaluation says: with a corpus that is not whole, more than trec_eval gives for the file."""
    beir(tmp_path, ["q0\td0\t1", "q0\td8\t1", "q0\td9\t1", "q1\td9\t1"])
    made = {name: tmp_path / f"out/{name}.parquet" for name in NAMES}
    write_run(tmp_path / "run.parquet", {0: [1, 0]})  # d0 comes second
    table = make_metrics(tmp_path, {"set": (made, {"base": tmp_path / "run.parquet"})})
    means = pl.read_parquet(table).filter(pl.col("query_id").is_null(), pl.col("cutoff") == 10)
    ours = dict(means.select("measure", "value").iter_rows())
    qrels = list(ir_measures.read_trec_qrels(str(write(tmp_path / "qrels", ["q0 0 d0 1", "q0 0 d8 1", "q0 0 d9 1",
                                                                           "q1 0 d9 1"]))))  # fmt: skip
    run = [ir_measures.ScoredDoc("q0", "d1", 2.0), ir_measures.ScoredDoc("q0", "d0", 1.0)]
    names = {"nDCG": "nDCG@10", "Recall": "R@10", "MAP": "AP@10", "MRR": "RR@10"}

    def theirs(of: list) -> dict[str, float]:
        found = ir_measures.calc_aggregate([ir_measures.parse_measure(name) for name in names.values()], of, run)
        return {name: found[ir_measures.parse_measure(other)] for name, other in names.items()}

    held = theirs([judgment for judgment in qrels if (judgment.query_id, judgment.doc_id) == ("q0", "d0")])
    assert {name: ours[name] for name in names} == pytest.approx(held, abs=1e-9)
    whole = theirs(qrels)  # q0 has three positives, and q1, which has none here, counts as 0
    assert whole == pytest.approx({"nDCG": held["nDCG"] / (1 + held["nDCG"] + 0.5) / 2, "Recall": held["Recall"] / 6,
                                   "MAP": held["MAP"] / 6, "MRR": held["MRR"] / 2})  # fmt: skip


def test_positives_none_of_which_is_in_the_corpus_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus\.jsonl: 0 of 2 positives are here, only documents judged 0"):
        beir(tmp_path, ["q0\td0\t0", "q0\td8\t1", "q1\td9\t1"])
    with pytest.raises(UserError, match=r"corpus\.jsonl: 2 of 2 judged documents are not here"):
        beir(tmp_path, ["q0\td8\t1", "q1\td9\t1"])
    with pytest.raises(UserError, match=r"no query of .*queries\.jsonl has a positive judgment"):
        beir(tmp_path, ["q0\td0\t0"])
    assert not list(tmp_path.glob("out/*"))


# ---- the hub ------------------------------------------------------------------------------------


def test_references() -> None:
    assert parse("hub:me/set@v1:data/*.parquet") == ("me/set", "v1", "data/*.parquet")
    assert parse("hub:me/set:train") == ("me/set", None, "train")
    files = BenchmarkConfig(path="hub:BeIR/msmarco", split="dev").files()
    assert files == {
        "queries": "hub:BeIR/msmarco:queries", "corpus": "hub:BeIR/msmarco:corpus",
        "qrels": "hub:BeIR/msmarco-qrels:dev",
    }  # fmt: skip
    pinned = {"path": "hub:BeIR/msmarco@abc", "qrels": "hub:BeIR/msmarco-qrels@def"}
    assert BenchmarkConfig(**pinned, split="dev").files() == {
        "queries": "hub:BeIR/msmarco@abc:queries", "corpus": "hub:BeIR/msmarco@abc:corpus",
        "qrels": "hub:BeIR/msmarco-qrels@def:dev",
    }  # fmt: skip
    found = BenchmarkConfig(format="msmarco", queries="hub:a/b", corpus="hub:a/c@1", split="dev").files()
    assert found == {"queries": "hub:a/b:dev", "corpus": "hub:a/c@1:train"}
    for wrong in ("hub:", "hub:set", "hub:a/b/c", "hub:a/b@"):
        with pytest.raises(ValueError, match="expected hub:<owner>/<name>"):
            BenchmarkConfig(format="msmarco", queries=wrong, corpus="c")


def test_what_the_examples_take_from_the_hub_is_counted(tmp_path: Path) -> None:
    """No commit is named there, so the counts are what another state is noticed by."""
    configs = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs").glob("*.yaml"))]
    found = {name: one for config in configs for name, one in config["evaluate"]["benchmarks"].items()
             if any(str(place).startswith("hub:") for place in one.values())}  # fmt: skip
    assert {"dev", "nfcorpus"} <= found.keys()
    assert [name for name, one in found.items() if not {"n_queries", "n_passages"} <= one.keys()] == []
    if DATA.exists():
        read(tmp_path, **found["nfcorpus"] | {"path": str(DATA / "nfcorpus")})


TWO = {"queries": "q.jsonl", "corpus": "c.jsonl"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "msmarco", "path": "set"} | TWO, "path: nothing is read from there with format msmarco"),
        ({"format": "intel", "qrels": "qrels.tsv"} | TWO, "qrels: nothing is read from there with format intel"),
        ({"format": "flag", "queries": "q.jsonl", "path": "set"}, "path: nothing is read from there with format flag"),
        ({"path": "set", "qrels": "qrels.tsv"} | TWO, "path: nothing is read from there beside `queries`, `corpus`"),
        ({"path": "hub:BeIR/x:sub"}, "path: a whole data set, without files; `queries`, `corpus` and"),
        ({"path": "hub:BeIR/x@abc:sub", "qrels": "qrels.tsv"}, "path: a whole data set, without files"),
        ({"path": "hub:BeIR/x@abc"}, "path: the judgments have a revision of their own; expected `qrels` too: "
         "hub:BeIR/x-qrels@<revision>"),
    ],
)  # fmt: skip
def test_places_that_say_too_much_or_too_little(given: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load({"embedder": {"model": "m"}, "ingest": {"train": "a.jsonl"}, "evaluate": {"benchmarks": {"set": given}}})
    [line] = error.value.lines
    assert line.startswith("evaluate.benchmarks.set: ") and message in line


@pytest.mark.parametrize(
    ("word", "files"),
    [
        ("train", ["data/train-2-of-10.parquet", "data/train-10-of-10.parquet"]),  # natural order, the better form
        ("dev", ["validation.tsv"]),
        ("test", ["test/a.jsonl.gz"]),
        ("data/*.parquet", ["data/train-2-of-10.parquet", "data/train-10-of-10.parquet"]),
        ("rain", []),
    ],
)
def test_files_of_a_word(word: str, files: list[str]) -> None:
    names = ["README.md", "train.md", "train.jsonl", "data/train-10-of-10.parquet", "data/train-2-of-10.parquet"]
    assert _chosen([*names, "test/a.jsonl.gz", "validation.tsv", "trainer.jsonl"], word) == files


@pytest.fixture
def hub(tmp_path: Path):
    with running(tmp_path / "home") as hub:
        yield hub


ASK = """
import json, logging, sys
from test_benchmarks import UserError, Path, read
logging.basicConfig(level="INFO", format="%(message)s")
try:
    read(Path(sys.argv[1]), **json.loads(sys.argv[2]))
except UserError as error:
    print("UserError:", error)
"""


def ask(hub: Hub, folder: Path, settings: dict, **more: str) -> str:
    """Read a benchmark in a process of its own; returns what it says."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(folder), json.dumps(settings)], env=hub.environment | more, text=True,
        capture_output=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_msmarco_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    corpus, queries = tmp_path / "corpus", tmp_path / "queries"
    (corpus / "data").mkdir(parents=True)
    for part in range(2):
        rows = PASSAGES[3 * part : 3 * part + 3]
        pq.write_table(pa.Table.from_pylist(rows), corpus / f"data/train-0000{part}-of-00002.parquet")
    write(corpus / "README.md", ["how to train"])
    write(queries / "dev.jsonl", ASKED)
    write(queries / "train.jsonl", ["{"])
    commit = hub.add("namespace-Pt/msmarco-corpus", "v1", corpus)
    hub.add("namespace-Pt/msmarco", "v1", queries)
    settings = {"format": "msmarco", "split": "dev", "n_passages": 6, "n_queries": 2}
    settings |= {"queries": "hub:namespace-Pt/msmarco@v1", "corpus": "hub:namespace-Pt/msmarco-corpus"}
    said = ask(hub, tmp_path, settings)
    assert f"to pin it, write hub:namespace-Pt/msmarco-corpus@{commit}:train" in said
    assert vars(seen(tmp_path)) == vars(msmarco(tmp_path / "files"))
    assert sorted(name for name in hub.asked if "README" not in name) == [  # several are fetched at a time
        "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "dev.jsonl"
    ]  # fmt: skip
    hub.asked.clear()
    ask(hub, tmp_path, settings)  # nothing is downloaded twice
    assert hub.asked == []
    # another state of the data set has another number of rows
    fewer = tmp_path / "fewer/train.jsonl"
    write(fewer, PASSAGES[:4])
    hub.add("namespace-Pt/msmarco-corpus", "v2", fewer.parent)
    assert "4 passages, but evaluate.benchmarks.set.n_passages says 6" in ask(hub, tmp_path, settings)
    pinned = settings | {"corpus": f"hub:namespace-Pt/msmarco-corpus@{commit}"}
    assert "UserError" not in ask(hub, tmp_path, pinned)
    assert "UserError" not in ask(hub, tmp_path, pinned, HF_HUB_OFFLINE="1")


def test_beir_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name, rows in (("corpus", [("d1", "one"), ("d2", "two")]), ("queries", [("q1", "first"), ("q2", "second")])):
        (folder / name).mkdir(parents=True)
        columns = [{"_id": key, "title": "", "text": text} for key, text in rows]
        pq.write_table(pa.Table.from_pylist(columns), folder / f"{name}/{name}-00000-of-00001.parquet")
    write(tmp_path / "qrels/validation.tsv", ["query-id\tcorpus-id\tscore", "q2\td1\t1"])
    write(tmp_path / "qrels/test.tsv", ["q1 0 d2 2"])
    commit, judged = hub.add("BeIR/tiny", "v1", folder), hub.add("BeIR/tiny-qrels", "v1", tmp_path / "qrels")
    ask(hub, tmp_path, {"path": "hub:BeIR/tiny", "split": "dev"})
    assert vars(seen(tmp_path)) == {
        "texts": [("one", "d1"), ("two", "d2")], "queries": [("second", "q2")], "pairs": [(0, 0, 1)]
    }  # fmt: skip
    ask(hub, tmp_path, {"path": "hub:BeIR/tiny"})
    assert seen(tmp_path).pairs == [(0, 1, 2)]
    # each table says which commits it is of, and so does the report
    pinned = {
        "queries": f"hub:BeIR/tiny@{commit}:queries", "corpus": f"hub:BeIR/tiny@{commit}:corpus",
        "qrels": f"hub:BeIR/tiny-qrels@{judged}:test",
    }  # fmt: skip
    made = {name: tmp_path / f"out/{name}.parquet" for name in NAMES}
    assert [json.loads(tables.metadata(path)[PINNED]) for path in made.values()] == [pinned] * 3
    write_run(tmp_path / "base.parquet", {0: [1, 0]})
    told = {"metrics": make_metrics(tmp_path, {"tiny": (made, {"base": tmp_path / "base.parquet"})})}
    told |= make_training(tmp_path, 30) | {"benchmarks": {"tiny": made}}
    report(run="x", inputs=told, out=tmp_path / "x.html", settings=ReportConfig())
    shown = re.sub(r"</?code>", "", (tmp_path / "x.html").read_text())
    said = ", ".join(f"{role} {reference}" for role, reference in pinned.items())
    assert f"Read from the hub: {said}." in shown
    # what they name is what is read again
    again = {role: reference.rpartition(":")[0] for role, reference in pinned.items()}
    ask(hub, tmp_path, {"path": again["corpus"], "qrels": again["qrels"]})
    assert seen(tmp_path).pairs == [(0, 1, 2)]
    assert [json.loads(tables.metadata(path)[PINNED]) for path in made.values()] == [pinned] * 3


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    write(tmp_path / "set/test.jsonl", [{}])
    hub.add("me/set", "v1", tmp_path / "set")
    settings = {"format": "msmarco", "corpus": "hub:me/set", "queries": "hub:me/set:dev"}
    assert "hub:me/set:dev: no such file among those of the data set: test.jsonl" in ask(hub, tmp_path, settings)
    for lost in ("hub:me/other", "hub:me/set@v9"):
        said = ask(hub, tmp_path, settings | {"queries": lost})
        assert f"UserError: {lost}:test: not to be had from the hub (" in said and "Traceback" not in said
    hub.endpoint = "http://127.0.0.1:9"
    said = ask(hub, tmp_path, settings | {"queries": "hub:me/unseen"})
    assert "UserError: hub:me/unseen:test: not to be had from the hub (" in said and "Traceback" not in said
