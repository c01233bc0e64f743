"""embed: shards put together are the whole; metadata says whose the vectors are; each query has its own prompt."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import some_texts, tiny_bert
from toy import toy_tables

from retune import tables
from retune.config import EmbedConfig, EmbedderConfig
from retune.data import search
from retune.model.embedder import Embedder
from retune.runtime import UserError
from retune.stages import embed as stage
from retune.stages.embed import embed, shard_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path, n = tmp_path_factory.mktemp("tables") / "texts.parquet", 103
    tables.write(path, "texts", {"text_id": range(n), "text": some_texts(n, longest=80), "key": [None] * n})
    return path


def run(table: Path, kind: str, model: Path, out: Path, shard=(0, 1), dtype="float32", **embedder) -> Path:
    embed(
        table=table, kind=kind, settings=EmbedConfig(dtype=dtype, max_tokens_per_batch=200),
        embedder=EmbedderConfig(model=str(model), **embedder), out=out, shard=shard,
    )  # fmt: skip
    return out


def column(path: Path, name: str) -> list:
    return pq.read_table(path, columns=[name])[name].to_pylist()


@pytest.mark.parametrize("n", [0, 1, 7, 100, 8_841_823])
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_shards_cover_all_rows_once_evenly(n, count):
    cuts = [shard_rows(n, index, count) for index in range(count)]
    assert cuts[0][0] == 0 and cuts[-1][1] == n
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
    sizes = [stop - start for start, stop in cuts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_put_together_are_the_whole(model, texts, tmp_path, monkeypatch, dtype, count):
    monkeypatch.setattr(stage, "BLOCK", 16)
    shards = [run(texts, "passage", model, tmp_path / f"{i}.parquet", (i, count), dtype) for i in range(count)]
    assert [i for shard in shards for i in column(shard, "id")] == list(range(103))
    found = np.concatenate([search.load(shard) for shard in shards])
    expected = Embedder.load(model, target=torch.device("cpu")).encode_passages(column(texts, "text"))
    np.testing.assert_allclose(found, expected, atol=1e-6 if dtype == "float32" else 5e-4)
    schema = pq.read_schema(shards[0])
    assert schema.field("vector").type == tables.embeddings_schema(32, dtype).field("vector").type


def test_the_same_bytes_twice(model, texts, tmp_path):
    one, two = (run(texts, "passage", model, tmp_path / name, dtype="float16") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_more_shards_than_rows(model, tmp_path):
    path = tmp_path / "texts.parquet"
    tables.write(path, "texts", {"text_id": [0], "text": ["bar"], "key": [None]})
    shards = [run(path, "passage", model, tmp_path / f"{i}.parquet", (i, 3)) for i in range(3)]
    assert sorted(search.count([shard]) for shard in shards) == [0, 0, 1]
    search.same_model(shards[0], shards)


def test_the_metadata_tells_models_and_prompts_apart(model, texts, tmp_path):
    path = run(texts, "passage", model, tmp_path / "v", passage_instruction="bar", passage_instruction_format="{}: {}")
    found = tables.metadata(path)
    assert found["model"] == str(model)
    assert (found["pooling"], found["normalize"], found["kind"]) == ("mean", "True", "passage")
    assert (found["prompt"], found["max_length"], found["dtype"]) == ("bar: {text}", "64", "torch.float32")


def test_a_querys_own_prompt_comes_before_the_common_one(model, tmp_path):
    own = ["fun: ", None] * 12
    queries = toy_tables(tmp_path, prompt=own)["queries"]
    found = search.load(run(queries, "query", model, tmp_path / "v", query_instruction="bar: "))
    ours = Embedder.load(model, target=torch.device("cpu"))
    full = [f"{prompt or 'bar: '}{text}" for prompt, text in zip(own, column(queries, "text"), strict=True)]
    np.testing.assert_allclose(found, ours.encode_queries(full), atol=1e-6)
    plain = search.load(run(queries, "query", model, tmp_path / "w"))
    full = [f"{prompt or ''}{text}" for prompt, text in zip(own, column(queries, "text"), strict=True)]
    np.testing.assert_allclose(plain, ours.encode_queries(full), atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_vector_that_is_not_finite_stops_and_leaves_nothing(model, texts, tmp_path, monkeypatch, value):
    forward = Embedder.forward
    unknown = 1  # [UNK]

    def broken(self, input_ids, attention_mask=None):
        out = forward(self, input_ids, attention_mask)
        out[(input_ids == unknown).any(1)] = value  # 1e6 fits float32, not float16
        return out

    monkeypatch.setattr(Embedder, "forward", broken)
    run(texts, "passage", model, tmp_path / "good", dtype="float16")
    table = pq.read_table(texts).to_pydict()
    table["text"][42] = "xyzzy"
    tables.write(tmp_path / "texts.parquet", "texts", table)
    with pytest.raises(UserError, match=r"texts\.parquet: row 42: its vector is not finite"):
        run(tmp_path / "texts.parquet", "passage", model, tmp_path / "out" / "v", dtype="float16")
    assert not list((tmp_path / "out").iterdir())
