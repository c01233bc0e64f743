"""Readers, file patterns and text equality: what lines, rows and files come out of raw forms."""

from __future__ import annotations

import gzip
import json
import math
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retune.data import files, sources
from retune.data.rows import Row, check, check_document
from retune.data.text import digest, digests, normalise
from retune.runtime import UserError

GOOD = {"query": "q", "pos": ["p"], "neg": ["n"]}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_lines_of_a_file_are_the_same_whatever_the_compression_and_chunk(tmp_path, monkeypatch, suffix, chunk):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    content = b"one\n\nthree is long\nlast without an end"
    path = tmp_path / f"a.jsonl{suffix}"
    with pa.output_stream(str(path), compression={"": None, ".gz": "gzip", ".zst": "zstd"}[suffix]) as out:
        out.write(content)
    read = []
    assert list(sources.lines(path, read.append)) == list(enumerate(content.split(b"\n"), 1))
    assert sum(read) == path.stat().st_size


def test_rows_keep_line_numbers_over_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\n')
    assert [(raw.line, raw.value) for raw in sources.rows(path)] == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"query": "a"', "unexpected end of data"),
        (b'{"query": "\xff"}', "not UTF-8 (byte 12"),
        (b'{"query": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "depth limit exceeded"),
    ],
)
def test_a_line_that_is_no_json_says_why_and_the_next_is_read(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b'\n{"a": 1}\n')
    bad, good = sources.rows(path)
    assert isinstance(bad.value, sources.Unreadable)
    assert reason in bad.value.reason
    assert (good.line, good.value) == (2, {"a": 1})


@pytest.mark.parametrize("indent", [None, 1])
def test_one_array_of_rows_is_told_from_rows(tmp_path, indent):
    """Other tools read such a file too, so that users have some."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, GOOD], indent=indent))
    with pytest.raises(UserError, match=r"rows\.json: one JSON array; expected one object a line, as `jq"):
        list(sources.rows(path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_told_once_and_not_of_each_line(tmp_path, encoding):
    path = tmp_path / "a.jsonl"
    path.write_bytes(("\ufeff" if encoding == "utf-16-be" else "").encode(encoding) + '{"a": 1}\n'.encode(encoding))
    with pytest.raises(UserError, match=r"a\.jsonl: UTF-16; expected UTF-8, as `iconv"):
        list(sources.rows(path))


def test_parquet_and_jsonl_hold_the_same_rows(tmp_path):
    rows = [GOOD | {"pos_scores": [1.5], "neg_scores": [0.25]}, GOOD | {"pos_scores": None, "neg_scores": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = []
    assert [raw.value for raw in sources.rows(tmp_path / "a.parquet", read.append)] == rows
    assert sum(read) == (tmp_path / "a.parquet").stat().st_size


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "missing.jsonl", "missing.parquet"])
def test_a_broken_or_missing_file_is_named(tmp_path, name):
    path = tmp_path / name
    if name.startswith("a."):
        path.write_bytes(gzip.compress(random.Random(0).randbytes(5000))[:-100])
    if name == "a.jsonl.zst":
        path.write_bytes(b"no zstandard at all")
    with pytest.raises(UserError, match=f"{name}: "):
        list(sources.rows(path))


def test_expand_sorts_naturally_and_looks_into_folders(tmp_path):
    for name in ["part-10.jsonl", "part-2.jsonl", "sub/x.parquet", "sub/y.json.gz", "README.md", ".hidden.jsonl"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = ["part-2.jsonl", "part-10.jsonl", "sub/x.parquet", "sub/y.json.gz"]
    assert files.expand([str(tmp_path)], "key") == [tmp_path / name for name in names]
    # a file behind two patterns is read once, at its first place
    assert files.expand([f"{tmp_path}/part-10*", f"{tmp_path}/part-*"], "key") == [
        tmp_path / "part-10.jsonl",
        tmp_path / "part-2.jsonl",
    ]


def test_a_name_with_glob_characters_is_a_file_first(tmp_path):
    (tmp_path / "a[1].jsonl").touch()
    assert files.expand([f"{tmp_path}/a[1].jsonl"], "key") == [tmp_path / "a[1].jsonl"]


def test_a_pattern_without_a_file_names_the_key(tmp_path):
    with pytest.raises(UserError, match=r"ingest\.train\.nq\.path: nothing/\*\.jsonl: no such file"):
        files.expand(["nothing/*.jsonl"], "ingest.train.nq.path")
    with pytest.raises(UserError, match=r"no file in this folder ends in \.jsonl"):
        files.expand([str(tmp_path)], "key")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos": "p"}, "pos: expected a list of strings, found a string"),
        ({"pos": None}, "pos: expected a list of strings, found null"),
        ({"pos": ["p", 3]}, "pos: expected a list of strings, found a number at place 2"),
        ({"pos": []}, "pos: expected at least one positive, found an empty list"),
        ({"pos": ["p", " \t"]}, "pos: empty string, at place 2 of 2"),
        ({"pos": ["q"]}, 'pos: a positive equals the query, "q"'),
        ({"neg": "n"}, "neg: expected a list of strings, found a string"),
        ({"neg": ["n", "p"]}, 'neg: a positive of the row is also given as negative, "p"'),
        ({"query": ["q"]}, "query: expected a string, found a list"),
        ({"query": ""}, "query: empty string"),
        ({"prompt": 1}, "prompt: expected a string, found a number"),
        ({"type": True}, "type: expected a string, found a truth value"),
        ({"pos_scores": [1.0]}, "neg_scores: expected scores, as the row has pos_scores"),
        ({"neg_scores": [1.0]}, "pos_scores: expected scores, as the row has neg_scores"),
        ({"pos_scores": [1, 2], "neg_scores": [1]}, "pos_scores: expected one score a text, found 2 for 1"),
        ({"pos_scores": ["1"], "neg_scores": [1]}, "pos_scores: expected a list of numbers, found a string"),
        ({"pos_scores": [True], "neg_scores": [1]}, "pos_scores: expected a list of numbers, found a truth value"),
        ({"pos_scores": 1, "neg_scores": [1]}, "pos_scores: expected a list of numbers, found a number"),
        ({"pos_scores": [math.nan], "neg_scores": [1]}, "pos_scores: expected finite numbers, found nan"),
        ({"pos_scores": [1], "neg_scores": [1e39]}, "neg_scores: expected finite numbers, found 1e+39"),
    ],
)
def test_each_mistake_of_a_row_is_named(change, message):
    row, mistakes = check(GOOD | change)
    assert row is None
    assert [str(mistake) for mistake in mistakes] == [message]


def test_all_mistakes_of_a_row_are_found_at_once():
    _, mistakes = check({"query": 1, "pos": "p", "neg": [None]})
    assert [mistake.column for mistake in mistakes] == ["query", "pos", "neg"]


def test_a_missing_column_is_told_from_a_wrong_one():
    assert str(check({"pos": ["p"]})[1][0]) == "query: expected a string, the column is missing, found `pos`"
    assert str(check({})[1][0]) == "query: expected a string, the column is missing, found none"
    many = check({"query": "q", "positive": ["p"]} | {f"c{i}": i for i in range(9)})[1][0]
    assert str(many).endswith("the column is missing, found `query`, `positive`, `c0`, `c1`, `c2`, `c3`, `c4`, `c5`, …")


def test_within_a_row_the_first_of_equal_texts_stays_with_its_score():
    row, _ = check(
        {"query": "q", "pos": ["p"], "neg": ["a", "b", "a"], "pos_scores": [10**20], "neg_scores": [1, 2, 3]}
    )
    assert row == Row("q", ["p"], ["a", "b"], [1e20], [1, 2], None, None)


def test_no_negatives_need_no_scores():
    assert check({"query": "q", "pos": ["p"], "pos_scores": [1]})[0].neg_scores == []


def test_a_document_has_its_title_in_front():
    assert check_document({"title": "T", "text": "x"}) == ("T x", [])
    assert check_document({"title": "", "text": " x "}) == (" x ", [])
    assert check_document({"title": None, "text": ""}) == ("", [])
    assert str(check_document({"text": 1})[1][0]) == "text: expected a string, found a number"


def test_normalise_by_hand():
    assert normalise("  Ｆｕｌｌ \n WIDTH ﬁne Straße\u00a0x") == "full width fine strasse x"
    assert normalise("A\tb  C") == "a b c"


@given(st.text())
def test_normalise_is_stable_and_blind_to_case_of_ascii(text):
    once = normalise(text)
    assert normalise(once) == once
    swapped = "".join(c.swapcase() if c.isascii() else c for c in text)
    assert normalise(f" {swapped}\n") == once


@given(st.lists(st.text()))
def test_digests_are_those_of_each_text(texts):
    assert digests(texts) == [digest(text) for text in texts]
