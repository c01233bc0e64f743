"""Rows on their way out: what is not replaced keeps its spelling, and files are whole or absent."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from retune.data import jsonl, sources

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def test_columns_keep_their_spelling() -> None:
    row = ' {"query" : "\\u00e9 \\"}",\t"n":1.10, "big": 123456789012345678901234567890,"neg":[ ], "x": {"neg": 1E5}} '
    assert jsonl.columns(row) == [
        ("query", '"query"', '"\\u00e9 \\"}"'), ("n", '"n"', "1.10"),
        ("big", '"big"', "123456789012345678901234567890"), ("neg", '"neg"', "[ ]"), ("x", '"x"', '{"neg": 1E5}'),
    ]  # fmt: skip
    found = jsonl.with_columns(row, {"neg": '["a"]', "new": "1", "n": None})
    assert found == (
        '{"query": "\\u00e9 \\"}", "big": 123456789012345678901234567890, "neg": ["a"], "x": {"neg": 1E5}, "new": 1}'
    )
    assert jsonl.columns("{}") == [] and jsonl.with_columns("{ }", {"a": "1"}) == '{"a": 1}'


def test_a_column_that_is_there_twice_is_replaced_once() -> None:
    assert jsonl.with_columns('{"neg": 1, "a": 2, "neg": 3}', {"neg": "4"}) == '{"neg": 4, "a": 2}'


@given(
    row=st.dictionaries(st.text(max_size=4), VALUES, max_size=5),
    new=st.dictionaries(st.text(max_size=4), st.none() | VALUES, max_size=3),
    ascii_only=st.booleans(), indent=st.sampled_from([None, 0, 2]),
)  # fmt: skip
def test_replacing_is_what_a_dictionary_does(row, new, ascii_only, indent) -> None:
    text = json.dumps(row, ensure_ascii=ascii_only, indent=indent)
    spelled = {name: None if value is None else json.dumps(value) for name, value in new.items()}
    wanted = row | new
    gone = {name for name, value in new.items() if value is None}
    wanted = {name: value for name, value in wanted.items() if name not in gone}
    found = json.loads(jsonl.with_columns(text, spelled))
    assert found == wanted and list(found) == list(wanted)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=10), max_size=4))
def test_texts_are_a_list_on_one_line(values) -> None:
    assert json.loads(jsonl.texts(values)) == values and "\n" not in jsonl.texts(values)


@pytest.mark.parametrize(
    ("name", "opened"), [("a.jsonl", open), ("a.jsonl.gz", gzip.open), ("a.jsonl.zst", zstandard.open)]
)
def test_files_are_compressed_by_their_name(tmp_path: Path, name: str, opened) -> None:
    lines = [json.dumps({"text": "é" * n}).encode() for n in range(2000)]
    with jsonl.writer(tmp_path / name) as write:
        for line in lines:
            write(line)
    with opened(tmp_path / name, "rb") as file:
        assert file.read() == b"\n".join(lines) + b"\n"
    assert [raw.raw for raw in sources.rows(tmp_path / name)] == lines


def test_an_error_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("earlier")
    with pytest.raises(ValueError), jsonl.writer(path) as write:
        write(b"new")
        raise ValueError
    assert path.read_text() == "earlier" and [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]
