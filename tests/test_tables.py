"""Tables: columns are checked at every read and write, writes are whole or not at all."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retune import tables
from retune.runtime import UserError

TEXTS = {"text_id": [0, 1], "text": ["a", "b"], "key": [None, "k"], "body": [None, 2]}


def test_round_trip_keeps_order_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "deep/texts.parquet"
    tables.write(path, "texts", TEXTS, {"made": "by hand"})
    assert tables.read(path, "texts").to_pydict() == TEXTS
    assert tables.read(path, "texts", ["text"]).column_names == ["text"]
    assert tables.metadata(path)["made"] == "by hand" and tables.n_rows(path) == 2
    assert [batch.num_rows for batch in tables.batches(path, "texts", rows=1)] == [1, 1]


def test_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tables.write(tmp_path / name, "texts", TEXTS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text_id": [0], "text": ["a"]}, "expected columns"),
        (TEXTS | {"more": [1, 2]}, "expected columns"),
        (TEXTS | {"text": ["a", None]}, "column text: 1 nulls"),
    ],
)
def test_wrong_rows_are_refused_and_nothing_is_written(tmp_path: Path, rows: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables.write(tmp_path / "t.parquet", "texts", rows)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_earlier_table(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    tables.write(path, "texts", TEXTS)
    with pytest.raises(RuntimeError), tables.writer(path, "texts") as out:
        out.write({"text_id": [7], "text": ["new"], "key": [None]})
        raise RuntimeError
    assert tables.read(path, "texts").to_pydict() == TEXTS and len(list(tmp_path.iterdir())) == 1


def test_unreadable_tables_are_one_line(tmp_path: Path) -> None:
    whole, cut, other = tmp_path / "whole", tmp_path / "cut", tmp_path / "other"
    tables.write(whole, "texts", TEXTS)
    cut.write_bytes(whole.read_bytes()[:-20])
    pq.write_table(pa.table({"text_id": [0.5], "text": ["a"], "key": ["k"]}), other)
    for path, message in ((tmp_path / "none", "no such table"), (cut, "not a whole Parquet file"), (other, "text_id")):
        with pytest.raises(UserError, match=message) as error:
            tables.read(path, "texts")
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="not a table of pairs"):
        tables.read(whole, "pairs")


@given(st.integers(0, 5), st.integers(1, 9), st.sampled_from(["float16", "float32"]))
def test_vectors_round_trip(tmp_path_factory: pytest.TempPathFactory, n: int, dim: int, dtype: str) -> None:
    path = tmp_path_factory.mktemp("v") / "vectors.parquet"
    values = np.random.default_rng(n).normal(size=(n, dim)).astype(dtype)
    with tables.writer(path, tables.embeddings_schema(dim, dtype)) as out:
        out.write({"id": np.arange(n), "vector": tables.vector_array(values)})
    found = tables.vectors(pq.read_table(path))
    assert found.dtype == dtype and np.array_equal(found, values)
