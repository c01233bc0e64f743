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
from retune.data import encode, search
from retune.model.embedder import Embedder
from retune.runtime import UserError
from retune.stages.embed import embed, shard_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path, n = tmp_path_factory.mktemp("tables") / "texts.parquet", 103
    tables.write(path, "texts", {"text_id": range(n), "text": some_texts(n, longest=80), "key": [None] * n})
    return path


def run(
    table: Path, kind: str, model: Path, out: Path, shard=(0, 1), dtype="float32", cache=None, devices=(), **embedder
) -> Path:
    embed(
        table=table, kind=kind, settings=EmbedConfig(dtype=dtype, max_tokens_per_batch=200),
        embedder=EmbedderConfig(model=str(model), **embedder), out=out, shard=shard, cache=cache, devices=devices,
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
    monkeypatch.setattr(encode, "BLOCK", 16)
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
    encode_texts = Embedder.encode_texts

    def broken(self, texts, *args):
        out = encode_texts(self, texts, *args)
        out[["xyzzy" in text for text in texts]] = value  # 1e6 fits float32, not float16
        return out

    monkeypatch.setattr(Embedder, "encode_texts", broken)
    run(texts, "passage", model, tmp_path / "good", dtype="float16")
    table = pq.read_table(texts).to_pydict()
    table["text"][42] = "xyzzy"
    tables.write(tmp_path / "texts.parquet", "texts", table)
    with pytest.raises(UserError, match=r"texts\.parquet: row 42: its vector is not finite"):
        run(tmp_path / "texts.parquet", "passage", model, tmp_path / "out" / "v", dtype="float16")
    assert not list((tmp_path / "out").iterdir())


# ---- the cache ----------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The texts that a model really reads, prompts included, in any order."""
    seen, tokenize = [], Embedder.tokenize

    def counted(self, texts, kind, instructions=None):
        seen.extend(self.prompts[kind].apply(texts, instructions))
        return tokenize(self, texts, kind, instructions)

    monkeypatch.setattr(Embedder, "tokenize", counted)
    return seen


def corpus(path: Path, texts: list[str]) -> Path:
    tables.write(path, "texts", {"text_id": range(len(texts)), "text": texts, "key": [None] * len(texts)})
    return path


@pytest.fixture(scope="module")
def many() -> list[str]:
    """Texts that differ before they are cut to the model's length."""
    return list(dict.fromkeys(some_texts(400, seed=5, longest=50)))[:120]


def test_of_a_grown_corpus_only_the_new_texts_are_read(model, many, tmp_path, read, caplog):
    cache = tmp_path / "cache"
    run(corpus(tmp_path / "old", many[:100]), "passage", model, tmp_path / "v", cache=cache)
    assert sorted(read) == sorted(many[:100])
    before = search.load(tmp_path / "v")
    read.clear()
    order = [*many[110:], *many[50:100], *many[:50], *many[100:110]]  # another order, new ones at both ends
    with caplog.at_level("INFO", "retune"):
        grown = run(corpus(tmp_path / "new", order), "passage", model, tmp_path / "v", cache=cache)
    assert sorted(read) == sorted(many[100:]) and "100 of 120 vectors taken from the cache" in caplog.text
    found = search.load(grown)
    np.testing.assert_array_equal(found[10:110], np.concatenate([before[50:], before[:50]]))
    fresh = run(tmp_path / "new", "passage", model, tmp_path / "fresh")
    np.testing.assert_allclose(found, search.load(fresh), atol=1e-6)
    assert column(grown, "id") == list(range(120)) and tables.metadata(grown) == tables.metadata(fresh)
    assert len([path for path in cache.glob("*/*") if path.is_dir()]) == 1  # the older is in the newer


@pytest.mark.parametrize("block", [7, 32768])
def test_from_one_shard_to_two_and_back_nothing_is_read(model, many, tmp_path, read, monkeypatch, block):
    monkeypatch.setattr(encode, "BLOCK", block)
    cache, table = tmp_path / "cache", corpus(tmp_path / "texts", many)
    whole = run(table, "passage", model, tmp_path / "whole", cache=cache, dtype="float16")
    read.clear()
    parts = [run(table, "passage", model, tmp_path / f"{i}", (i, 2), cache=cache, dtype="float16") for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([search.load(part) for part in parts]), search.load(whole))
    again = run(table, "passage", model, tmp_path / "again", cache=cache, dtype="float16")
    assert read == [] and again.read_bytes() == whole.read_bytes()


def test_what_decides_a_vector_decides_what_is_taken(model, many, tmp_path, read):
    cache, table = tmp_path / "cache", corpus(tmp_path / "texts", many[:20])

    def newly_read(model: Path = model, **changed) -> int:
        read.clear()
        run(table, "passage", model, tmp_path / "v", cache=cache, **changed)
        return len(read)

    assert newly_read() == 20 and newly_read() == 0
    for changed in (
        {"pooling": "cls"}, {"normalize": False}, {"passage_max_length": 8}, {"truncate_dim": 16},
        {"dtype": "float16"}, {"passage_instruction": "bar: "},
    ):  # fmt: skip
        assert newly_read(**changed) == 20, changed
        assert newly_read(**changed) == 0, changed
    assert newly_read(query_instruction="bar: ") == 0  # nothing to passages
    assert newly_read(tiny_bert(tmp_path / "other", seed=1)) == 20
    assert newly_read() == 0


def test_a_model_that_was_trained_again_in_its_place_is_another(many, tmp_path, read):
    cache, table = tmp_path / "cache", corpus(tmp_path / "texts", many[:20])
    model = tiny_bert(tmp_path / "model")
    old = search.load(run(table, "passage", model, tmp_path / "v", cache=cache))
    tiny_bert(model, seed=1)  # files of the same names and sizes
    read.clear()
    new = search.load(run(table, "passage", model, tmp_path / "v", cache=cache))
    assert len(read) == 20 and np.abs(new - old).max() > 1e-2
    np.testing.assert_allclose(new, search.load(run(table, "passage", model, tmp_path / "w")), atol=1e-6)


def test_queries_and_passages_share_only_what_the_model_reads_alike(model, tmp_path, read):
    cache, own = tmp_path / "cache", ["fun: ", None] * 12
    queries = toy_tables(tmp_path, prompt=own)["queries"]
    texts = corpus(
        tmp_path / "texts", [*column(queries, "text"), *(f"fun: {text}" for text in column(queries, "text"))]
    )
    passages = search.load(run(texts, "passage", model, tmp_path / "p", cache=cache))
    read.clear()
    plain = search.load(run(queries, "query", model, tmp_path / "q", cache=cache))
    assert read == []  # with and without a prompt, each is one of the passages
    np.testing.assert_array_equal(plain, np.where(np.arange(24)[:, None] % 2, passages[:24], passages[24:]))
    other = search.load(run(queries, "query", model, tmp_path / "q", cache=cache, query_instruction="bar: "))
    assert sorted(read) == sorted(f"bar: {text}" for text in column(queries, "text")[1::2])
    np.testing.assert_array_equal(other[::2], plain[::2])
    assert np.abs(other[1::2] - plain[1::2]).max(1).min() > 1e-4


def test_an_interrupted_job_leaves_the_cache_as_it_was(model, many, tmp_path, monkeypatch, read):
    cache = tmp_path / "cache"
    run(corpus(tmp_path / "old", many[:50]), "passage", model, tmp_path / "v", cache=cache)
    before = sorted(path for path in cache.rglob("*") if ".checkpoints" not in path.parts)
    monkeypatch.setattr(encode, "BLOCK", 40)
    encode_texts = Embedder.encode_texts

    def interrupted(self, texts, *args):
        if many[100] in texts:
            raise KeyboardInterrupt
        return encode_texts(self, texts, *args)

    monkeypatch.setattr(Embedder, "encode_texts", interrupted)
    table = corpus(tmp_path / "new", many)
    with pytest.raises(KeyboardInterrupt):
        run(table, "passage", model, tmp_path / "v2", cache=cache)
    assert sorted(path for path in cache.rglob("*") if ".checkpoints" not in path.parts) == before
    assert not (tmp_path / "v2").exists()
    monkeypatch.setattr(Embedder, "encode_texts", encode_texts)
    read.clear()
    run(table, "passage", model, tmp_path / "v2", cache=cache)
    assert sorted(read) == sorted(many[50:])


def test_without_a_cache_nothing_is_kept(model, texts, tmp_path, read):
    for _ in range(2):
        run(texts, "passage", model, tmp_path / "out/v")
    assert len(read) == 206 and [path.name for path in (tmp_path / "out").iterdir()] == ["v"]


def test_no_rows_are_no_entry(model, tmp_path):
    empty = run(corpus(tmp_path / "texts", []), "passage", model, tmp_path / "v", cache=tmp_path / "cache")
    assert tables.n_rows(empty) == 0
    assert not [path for path in (tmp_path / "cache").glob("*/*") if path.is_dir()]


# ---- several devices ----------------------------------------------------------------------------


def test_two_devices_give_what_one_gives(model, many, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "WORTH_A_DEVICE", 10)
    monkeypatch.setattr(encode, "DEALT", 16)
    monkeypatch.setattr(encode, "BLOCK", 50)
    cache, table = tmp_path / "cache", corpus(tmp_path / "texts", many)
    run(corpus(tmp_path / "some", many[30:45]), "passage", model, tmp_path / "u", cache=cache)
    found = run(table, "passage", model, tmp_path / "out/v", cache=cache, devices=["cpu", "cpu"])
    np.testing.assert_allclose(search.load(found), search.load(run(table, "passage", model, tmp_path / "w")), atol=1e-6)
    assert column(found, "id") == list(range(120)) and [path.name for path in (tmp_path / "out").iterdir()] == ["v"]


def test_few_texts_are_not_worth_a_second_process(model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(encode.processes, "working", None)  # not called
    assert search.count([run(texts, "passage", model, tmp_path / "v", devices=["cpu", "cpu"])]) == 103


def test_a_process_that_fails_is_one_clear_error(model, many, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "WORTH_A_DEVICE", 10)
    monkeypatch.setattr(encode, "DEALT", 16)
    table = corpus(tmp_path / "texts", many)
    with pytest.raises(UserError, match="device cuda:7: "):
        run(table, "passage", model, tmp_path / "out/v", devices=["cpu", "cuda:7"])
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UserError, match="device gpu: "):
        run(table, "passage", model, tmp_path / "out/v", devices=["gpu"])
