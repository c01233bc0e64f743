"""ingest: what the tables hold, what bad rows get, the dev split; and benchmarks by the same door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retune import tables
from retune.config import BenchmarkConfig, IngestConfig
from retune.data import benchmarks, store
from retune.data.groups import Groups, choose_dev
from retune.data.text import normalise
from retune.runtime import UserError
from retune.stages.ingest import benchmark, ingest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
NAMES = ("texts", "queries", "pairs", "rejected")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent")


def outputs(folder: Path, names=NAMES) -> dict[str, Path]:
    return {name: folder / f"{name}.parquet" for name in names}


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(tmp_path: Path, seed: int = 1, **config) -> dict[str, pl.DataFrame]:
    out = outputs(tmp_path / "out")
    ingest(IngestConfig(**config), out, seed)
    return {name: pl.from_arrow(tables.read(path, name)) for name, path in out.items()}


def test_tables_by_hand(tmp_path):
    rows = [
        {"query": "q0", "pos": ["a", "b", "a"], "neg": ["c"], "pos_scores": [3, 2, 1], "neg_scores": [0.5]},
        {"query": "q1", "pos": ["c"], "neg": None, "prompt": "own: ", "type": "sts", "category": "unknown column"},
        {"query": "q0", "pos": ["q1"]},
    ]
    path = write(tmp_path / "train.jsonl", rows)
    corpus = write(tmp_path / "corpus.jsonl", [{"text": "a"}, {"title": "T", "text": "x"}, {"text": " "}])
    options = {"path": str(path), "prompt": "given: ", "batch_size": 4}
    found = run(tmp_path, train={"mine": options}, corpus=str(corpus))

    texts = enumerate(["a", "b", "c", "q1", "T x"])
    assert found["texts"].rows() == [(id, text, None, None) for id, text in texts]
    assert found["queries"].rows() == [
        (0, "mine", "q0", None, "given: ", None, True, 4, "train", f"{path}:1", None),
        (1, "mine", "q1", None, "own: ", "sts", True, 4, "train", f"{path}:2", "unknown column"),
        (2, "mine", "q0", None, "given: ", None, True, 4, "train", f"{path}:3", None),
    ]
    assert found["pairs"].rows() == [
        (0, 0, 1, "given", None, 3.0),
        (0, 1, 1, "given", None, 2.0),
        (0, 2, 0, "given", None, 0.5),
        (1, 2, 1, "given", None, None),
        (2, 3, 1, "given", None, None),
    ]
    assert found["rejected"].height == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(f"{name}.parquet" for name in NAMES)


def test_batches_do_not_show(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [
        {"query": f"q{i}", "pos": [f"p{i}"], "neg": sorted({f"n{j}" for j in rng.integers(0, 30, rng.integers(0, 5))})}
        for i in range(200)
    ]
    write(tmp_path / "a.jsonl", rows)
    whole = run(tmp_path, train=str(tmp_path / "a.jsonl"), dev_fraction=0.2)
    monkeypatch.setattr(store, "ROWS", 7)
    parts = run(tmp_path, train=str(tmp_path / "a.jsonl"), dev_fraction=0.2)
    for name in NAMES:
        assert whole[name].equals(parts[name]), name


def test_the_same_input_gives_the_same_bytes(tmp_path):
    rows = [{"query": f"q{i % 40}", "pos": [f"p{i}"], "neg": ["n"]} for i in range(60)]
    write(tmp_path / "a.jsonl", rows)
    found = []
    for name in "xy":
        out = outputs(tmp_path / name)
        ingest(IngestConfig(train=str(tmp_path / "a.jsonl"), dev_fraction=0.3), out, 5)
        found.append([path.read_bytes() for path in out.values()])
    assert found[0] == found[1]


BAD = [
    {"query": "q", "pos": "p"},
    '{"query": "q", "pos": ["p"]',
    {"query": "ok", "pos": ["p"], "neg": ["n", "m"]},
    {"query": "q", "pos": ["p"], "neg": ["p"]},
    {"query": "ok", "pos": ["p"], "neg": ["m", "n"]},
    {"query": "", "pos": [""]},
]


def test_every_mistake_is_shown_and_nothing_written(tmp_path):
    path = write(tmp_path / "train.jsonl", BAD)
    out = outputs(tmp_path / "out")
    for file in out.values():
        file.parent.mkdir(exist_ok=True)
        file.write_text("an earlier result")
    with pytest.raises(UserError) as error:
        ingest(IngestConfig(train=str(path)), out, 1)
    assert str(error.value).splitlines()[:6] == [
        f"{path}:1: pos: expected a list of strings, found a string",
        f"{path}:2: row: invalid JSON, unexpected end of data (character 28)",
        f'{path}:4: neg: a positive of the row is also given as negative, "p"',
        f"{path}:5: row: duplicate row, the same as {path}:3",
        f"{path}:6: query: empty string",
        f"{path}:6: pos: empty string, at place 1 of 1",
    ]
    assert "in all 6 mistakes in 5 rows" in str(error.value)
    assert [file.read_text() for file in (tmp_path / "out").iterdir()] == ["an earlier result"] * 4


def test_skip_sets_bad_rows_aside_and_their_texts_with_them(tmp_path):
    path = write(tmp_path / "train.jsonl", [*BAD[:3], {"query": "r", "pos": ["only here"], "neg": ["only here"]}])
    found = run(tmp_path, train=str(path), on_bad_row="skip")
    assert found["queries"]["text"].to_list() == ["ok"]
    assert found["texts"]["text"].to_list() == ["p", "n", "m"]
    assert found["rejected"]["source"].to_list() == [f"{path}:{line}" for line in (1, 2, 4)]
    assert found["rejected"]["reason"][0] == "pos: expected a list of strings, found a string"
    assert json.loads(found["rejected"]["row"][0]) == BAD[0]
    assert found["rejected"]["row"][1] == BAD[1]


def test_ten_mistakes_are_shown_the_first_of_each_kind_and_all_counted(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"query": "q", "pos": "p"}] * 500 + [{"query": "q", "pos": [""]}] * 3)
    with pytest.raises(UserError) as error:
        ingest(IngestConfig(train=str(path)), outputs(tmp_path / "out"), 1)
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines[:11]] == [*map(str, range(1, 11)), "501"]
    assert "503 mistakes in 503 rows: 500 × pos: expected a list of strings; 3 × pos: empty string" in lines[11]


def test_rows_with_other_prompts_or_negatives_are_no_duplicates(tmp_path):
    base = {"query": "q", "pos": ["p"], "neg": ["n"]}
    rows = [base, base | {"prompt": "x"}, base | {"neg": ["n", "m"]}, base | {"pos": ["p", "n"], "neg": []}]
    assert run(tmp_path, train=str(write(tmp_path / "t.jsonl", rows)))["queries"].height == 4


def test_no_good_row_is_an_error(tmp_path):
    path = write(tmp_path / "t.jsonl", ["", ""])
    with pytest.raises(UserError, match=r"ingest\.train: no good row"):
        run(tmp_path, train=str(path))


def test_max_examples_takes_the_first_rows_over_files(tmp_path):
    for name in "ab":
        write(tmp_path / f"d/{name}.jsonl", [{"query": f"{name}{i}", "pos": [f"p{name}{i}"]} for i in range(3)])
    found = run(tmp_path, train={"d": {"path": str(tmp_path / "d"), "max_examples": 4}})
    assert found["queries"]["text"].to_list() == ["a0", "a1", "a2", "b0"]


def test_a_folder_name_opts_out_of_in_batch_negatives(tmp_path):
    write(tmp_path / "x-no_in_batch_neg/a.jsonl", [{"query": "q", "pos": ["p"]}])
    write(tmp_path / "y/a.jsonl", [{"query": "r", "pos": ["p"]}])
    off = {"path": str(tmp_path / "y/a.jsonl"), "in_batch_negatives": False}
    named = run(tmp_path, train=[str(tmp_path / "x-no_in_batch_neg"), str(tmp_path / "y")])
    assert named["queries"]["in_batch_negatives"].to_list() == [False, True]
    assert run(tmp_path, train={"y": off})["queries"]["in_batch_negatives"].to_list() == [False]


@pytest.mark.parametrize(("name", "takes"), [("a_no_in_batch_neg.jsonl", False), ("no_in_batch_neg_a.jsonl", True)])
def test_a_file_name_opts_out_of_in_batch_negatives(tmp_path, name, takes):
    write(tmp_path / name, [{"query": "q", "pos": ["p"]}])
    assert run(tmp_path, train=str(tmp_path / name))["queries"]["in_batch_negatives"].to_list() == [takes]


# ---- dev split ----------------------------------------------------------------------------------

WORDS = st.sampled_from(["a", "A", "b", "B ", "c", "d", "e", "f", "ﬁ", "fi", "g", "h"])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=2))), st.floats(0, 0.9), st.integers(0, 9))
def test_no_text_stands_on_both_sides(rows, fraction, seed):
    groups = Groups()
    for query, positives in rows:
        groups.add(query, positives)
    group = groups.of_queries()
    dev = choose_dev(group, fraction, seed)
    sides = [set(), set()]
    for (query, positives), side in zip(rows, dev, strict=True):
        sides[int(side)] |= {normalise(text) for text in (query, *positives)}
    assert not sides[0] & sides[1]
    if fraction > 0 and len(set(group.tolist())) > 1:
        assert 0 < dev.sum() < len(dev)
    else:
        assert not dev.any()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=2)), max_size=12))
def test_groups_are_the_connected_components(rows):
    groups = Groups()
    for query, positives in rows:
        groups.add(query, positives)
    # plainly: put together whatever shares a text until nothing changes
    label = list(range(len(rows)))
    texts = [{normalise(text) for text in (query, *positives)} for query, positives in rows]
    for _ in rows:
        for i in range(len(rows)):
            for j in range(len(rows)):
                if texts[i] & texts[j]:
                    label[i] = label[j] = min(label[i], label[j])
    first_seen = {name: number for number, name in enumerate(dict.fromkeys(label))}
    assert groups.of_queries().tolist() == [first_seen[name] for name in label]


def test_the_share_of_dev_queries_is_kept_and_follows_the_seed():
    groups = np.repeat(np.arange(400), 2)
    one, other = choose_dev(groups, 0.1, 1), choose_dev(groups, 0.1, 2)
    assert one.sum() == other.sum() == 80
    assert not np.array_equal(one, other)
    assert np.array_equal(one, choose_dev(groups, 0.1, 1))


def test_dev_reaches_the_table(tmp_path):
    rows = [{"query": f"q{i}", "pos": [f"p{i // 2}"]} for i in range(100)]
    found = run(tmp_path, train=str(write(tmp_path / "t.jsonl", rows)), dev_fraction=0.1)["queries"]
    dev = found.filter(pl.col("split") == "dev")["query_id"].to_numpy()
    assert len(dev) == 10
    assert (dev.reshape(5, 2) // 2 == dev.reshape(5, 2)[:, :1] // 2).all()


# ---- benchmarks ---------------------------------------------------------------------------------


def beir(folder: Path, corpus=None, queries=None, qrels="query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n") -> dict:
    write(folder / "corpus.jsonl", corpus or [{"_id": "d1", "title": "T", "text": "x"}, {"_id": "d2", "text": ""}])
    write(folder / "queries.jsonl", queries or [{"_id": "q0", "text": "zero"}, {"_id": "q1", "text": "one"}])
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels/test.tsv").write_text(qrels)
    out = outputs(folder / "out", NAMES[:3])
    benchmark(BenchmarkConfig(path=str(folder)), out, "tiny")
    return {name: tables.read(path, name).to_pylist() for name, path in out.items()}


def test_beir_by_hand(tmp_path):
    found = beir(tmp_path)
    assert [(row["text"], row["key"]) for row in found["texts"]] == [("T x", "d1"), ("", "d2")]
    assert [(row["query_id"], row["text"], row["key"], row["source"]) for row in found["queries"]] == [
        (0, "one", "q1", f"{tmp_path}/queries.jsonl:2")
    ]
    assert [(row["query_id"], row["text_id"], row["label"]) for row in found["pairs"]] == [(0, 0, 2), (0, 1, 0)]


@pytest.mark.parametrize(
    "text", ["q1\td1\t2\nq1\td2\t0\n", "q1 0 d1 2\r\nq1 0 d2 0\r\n", "q1\tQ0\td1\t2\nq1\tQ0\td2\t0"]
)
def test_judgments_with_or_without_header_and_as_trec(tmp_path, text):
    assert beir(tmp_path, qrels=text)["pairs"] == beir(tmp_path)["pairs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qrels": "q1\tx\t1\n"}, r'corpus\.jsonl: 1 of 1 judged documents are not here: "x"'),
        ({"qrels": "q9\td1\t1\n"}, r'queries\.jsonl: 1 of 1 judged queries are not here: "q9"'),
        ({"qrels": "q1\td1\t0\n"}, "no query of .* has a positive judgment"),
        ({"qrels": "q1\td1\t1\nq1\td1\t2\n"}, r'test\.tsv:2: "d1" for query "q1" is graded 2 here, 1 before'),
        ({"qrels": "q1\td1\t1\nq1\td1\tx\n"}, r"test\.tsv:2: score: expected a whole number"),
        ({"qrels": "q1\td1\t1\nd1\t1\n"}, r"test\.tsv:2: expected query, document and score, found 2 columns"),
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, r"test\.tsv: no judgments"),
        ({"corpus": [{"_id": "d1", "text": "a"}] * 2}, r'corpus\.jsonl:2: _id: "d1" is already on line 1'),
        ({"corpus": [{"text": "a"}]}, r"corpus\.jsonl:1: _id: expected a string"),
        ({"corpus": [{"_id": "d1", "text": 1}]}, r"corpus\.jsonl:1: text: expected a string, found a number"),
        ({"queries": [{"_id": "q1", "text": "a"}] * 2}, r'queries\.jsonl:2: _id: "q1" is already on line 1'),
        ({"queries": [{"_id": "q1", "text": ""}]}, r"queries\.jsonl:1: text: expected a string that is not empty"),
        ({"queries": ["{"]}, r"queries\.jsonl:1: row: invalid JSON"),
    ],
)
def test_beir_mistakes(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        beir(tmp_path, **change)
    assert not list(tmp_path.glob("out/*"))


def test_hashes_that_meet_are_no_twins_unless_the_ids_are(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "_hash", lambda key: 7)
    assert len(beir(tmp_path)["texts"]) == 2


def test_some_missing_documents_are_a_warning(tmp_path, caplog):
    found = beir(tmp_path, qrels="q1\td1\t1\nq1\tx\t1\nq0\ty\t1\n")
    assert [row["key"] for row in found["queries"]] == ["q1"]
    assert '2 of 3 judged documents are not here: "x", "y"' in caplog.text


def test_flag_by_hand(tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "a"}])
    rows = write(tmp_path / "q.jsonl", [{"query": "b", "pos": ["b"], "neg": ["c", "a"]}, {"query": "r", "pos": ["c"]}])
    out = outputs(tmp_path, NAMES[:3])
    benchmark(BenchmarkConfig(format="flag", queries=str(rows), corpus=str(corpus)), out, "mine")
    texts, queries, pairs = (tables.read(out[name], name).to_pylist() for name in NAMES[:3])
    assert [(row["text"], row["key"]) for row in texts] == [("a", "0"), ("b", "1"), ("c", "2")]
    assert [(row["text"], row["key"], row["dataset"]) for row in queries] == [("b", "0", "mine"), ("r", "1", "mine")]
    found = [(row["query_id"], row["text_id"], row["label"]) for row in pairs]
    assert found == [(0, 1, 1), (0, 2, 0), (0, 0, 0), (1, 2, 1)]


# ---- real data ----------------------------------------------------------------------------------


@needs_data
def test_flagembedding_examples_come_through_whole(tmp_path):
    folders = [DATA / "flagembedding" / name for name in ("retrieval", "clustering-no_in_batch_neg")]
    found = run(tmp_path, train={"all": {"path": [str(folder) for folder in folders]}})
    raw = [json.loads(line) for folder in folders for path in folder.iterdir() for line in path.open()]
    rows = {row["query"]: row for row in raw}
    text = found["texts"]["text"].to_list()
    assert found["queries"].height == len(raw) == len(rows)
    for query_id, pairs in found["pairs"].group_by("query_id", maintain_order=True):
        row = rows[found["queries"]["text"][query_id[0]]]
        given = [(text[i], label) for i, label in zip(pairs["text_id"], pairs["label"], strict=True)]
        assert given == [(t, 1) for t in dict.fromkeys(row["pos"])] + [(t, 0) for t in dict.fromkeys(row["neg"])]
        assert pairs["score"].is_null().all() == ("pos_scores" not in row)
    opted_out = found["queries"].filter(~pl.col("in_batch_negatives"))["type"].unique().to_list()
    assert opted_out == ["symmetric_clustering"]


@needs_data
@pytest.mark.parametrize(("name", "counts"), [("cranfield", (1400, 67)), ("nfcorpus", (3633, 323))])
def test_beir_benchmarks(tmp_path, name, counts):
    out = outputs(tmp_path, NAMES[:3])
    benchmark(BenchmarkConfig(path=str(DATA / name)), out, name)
    assert (tables.n_rows(out["texts"]), tables.n_rows(out["queries"])) == counts
    judged = pl.read_csv(
        DATA / name / "qrels/test.tsv", separator="\t", schema_overrides=[pl.String, pl.String, pl.Int8]
    )
    keys = {key: pl.read_parquet(out[key])["key"] for key in ("texts", "queries")}
    pairs = pl.read_parquet(out["pairs"])
    found = set(zip(keys["queries"][pairs["query_id"]], keys["texts"][pairs["text_id"]], pairs["label"], strict=True))
    assert found == set(judged.iter_rows())


def test_a_large_dev_fraction_leaves_something_to_train_on() -> None:
    for sizes, fraction in (([1, 1], 0.75), ([3, 1], 0.9), ([1, 2, 3], 0.99)):
        groups = np.repeat(np.arange(len(sizes)), sizes)
        for seed in range(5):
            dev = choose_dev(groups, fraction, seed)
            assert 0 < dev.sum() < len(dev)


def test_a_beir_folder_is_training_data(tmp_path: Path) -> None:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    documents = [("d1", "One", "first"), ("d2", "", "second"), ("d3", "", ""), ("d4", "", "fourth")]
    rows = [{"_id": key, "title": title, "text": text} for key, title, text in documents]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"_id": "q1", "text": "who"}, {"_id": "q2", "text": "unjudged"}, {"_id": "q3", "text": "where"}]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "qrels/train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq3\td4\t2\nq1\td2\t1\nq1\td3\t1\nq1\td4\t0\nq1\td1\t1\n"
    )
    settings = IngestConfig.model_validate({"train": {"b": {"path": str(folder), "format": "beir"}}})
    out = {name: tmp_path / f"{name}.parquet" for name in ("texts", "queries", "pairs", "rejected")}
    ingest(settings, out, 42)
    queries = tables.read(out["queries"], "queries").to_pydict()
    assert queries["text"] == ["who", "where"]
    assert queries["source"] == [f"{folder / 'queries.jsonl'}:{line}" for line in (1, 3)]
    texts = tables.read(out["texts"], "texts")["text"].to_pylist()
    pairs = tables.read(out["pairs"], "pairs").to_pylist()
    assert [(pair["query_id"], texts[pair["text_id"]], pair["label"]) for pair in pairs] == [
        (0, "second", 1), (0, "One first", 1), (0, "fourth", 0), (1, "fourth", 1)
    ]  # fmt: skip
