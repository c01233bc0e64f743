"""retune embed: a row a vector, the same as the embedder's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import some_texts, tiny_bert

from retune import tables
from retune.cli import main
from retune.commands import vectors
from retune.data.search import load
from retune.model.embedder import Embedder

TEXTS = some_texts(12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny_bert(tmp_path_factory.mktemp("model") / "tiny")
    prompts = {"prompts": {"query": "ba co ", "document": "di "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return str(folder)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def embed(model: str, source: Path, output: Path, *flags: object) -> int:
    words = ["--input_file", source, "--output_file", output, "--model_name_or_path", model, *flags]
    return main(["embed", *map(str, words)])


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_vectors_are_the_embedders(tmp_path: Path, model: str, suffix: str) -> None:
    rows = [{"text": text} for text in [*TEXTS, TEXTS[0]]]  # a text that is there twice has two vectors
    output = tmp_path / f"v{suffix}"
    assert embed(model, write(tmp_path / "a.jsonl", rows), output, "--vector_dtype", "float32") == 0
    found = np.load(output) if suffix == ".npy" else load(output)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, Embedder.load(model).encode_passages([*TEXTS, TEXTS[0]]), atol=1e-6)
    if suffix == ".parquet":
        about = tables.metadata(output)
        assert (about["model"], about["kind"], about["prompt"]) == (model, "passage", "di {text}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", output.name]


@pytest.mark.parametrize(
    ("rows", "flags", "kind"),
    [
        ([{"query": text, "pos": ["x"]} for text in TEXTS], [], "query"),
        ([{"text": text} for text in TEXTS], ["--kind", "query"], "query"),
        ([{"_id": "7", "title": "", "text": text} for text in TEXTS], [], "passage"),
        ([{"text": text, "query": "ba"} for text in TEXTS], ["--kind", "passage"], "passage"),
    ],
)
def test_kinds_of_rows(tmp_path: Path, model: str, rows: list, flags: list, kind: str) -> None:
    assert embed(model, write(tmp_path / "a.jsonl", rows), tmp_path / "v.npy", *flags) == 0
    embedder = Embedder.load(model)
    wanted = embedder.encode_queries(TEXTS) if kind == "query" else embedder.encode_passages(TEXTS)
    found = np.load(tmp_path / "v.npy")
    assert found.dtype == np.float16
    np.testing.assert_allclose(found.astype(np.float32), wanted, atol=2e-3)


def test_titles_and_instructions_of_rows(tmp_path: Path, model: str) -> None:
    embedder = Embedder.load(model)
    source = write(tmp_path / "a.jsonl", [{"title": "ba", "text": "co"}, {"text": ""}])
    assert embed(model, source, tmp_path / "v.npy", "--vector_dtype", "float32") == 0
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), embedder.encode_passages(["ba co", ""]), atol=1e-6)
    source = write(tmp_path / "q.jsonl", [{"query": "co", "prompt": "di "}, {"query": "co"}])
    assert embed(model, source, tmp_path / "q.npy", "--vector_dtype", "float32") == 0
    wanted = embedder.encode_queries(["co", "co"], ["di ", None])
    np.testing.assert_allclose(np.load(tmp_path / "q.npy"), wanted, atol=1e-6)


def test_model_flags_reach_the_model(tmp_path: Path, model: str) -> None:
    source = write(tmp_path / "a.jsonl", [{"query": text} for text in TEXTS])
    flags = ["--pooling_method", "cls", "--normalize_embeddings", "False", "--embedder_query_max_length", "8"]
    flags += ["--query_instruction_for_retrieval", "hi", "--query_instruction_format_for_retrieval", "{}: {}"]
    assert embed(model, source, tmp_path / "v.npy", "--vector_dtype", "float32", *flags, "--devices", "cpu") == 0
    from retune.config import EmbedderConfig

    settings = EmbedderConfig(
        model=model, pooling="cls", normalize=False, query_max_length=8, query_instruction="hi",
        query_instruction_format="{}: {}",
    )  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), Embedder.load(settings).encode_queries(TEXTS), atol=1e-5)


def test_shards_are_put_together(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    assert embed(model, source, tmp_path / "one.parquet") == 0
    assert embed(model, source, tmp_path / "three.parquet", "--shards", 3) == 0
    monkeypatch.setattr(vectors, "SHARD", 5)
    assert embed(model, source, tmp_path / "kept.parquet", "--work_dir", tmp_path / "work") == 0
    assert len(list((tmp_path / "work/embed").iterdir())) == 3
    first = load(tmp_path / "one.parquet")
    for name in ("three", "kept"):
        np.testing.assert_array_equal(load(tmp_path / f"{name}.parquet"), first)
        assert tables.metadata(tmp_path / f"{name}.parquet") == tables.metadata(tmp_path / "one.parquet")


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"text": "a"}, {"text": 1}], [], "a.jsonl:2: text: expected a string, found a number"),
        ([{"query": "a"}, {"q": "b"}], [], "a.jsonl:2: query: expected a string"),
        ([{"query": "a", "prompt": 3}], [], "a.jsonl:1: prompt: expected a string, found 3"),
        ([{"text": "a"}, "{"], [], "a.jsonl:2: row: invalid JSON"),
        (["[1]"], ["--kind", "query"], "a.jsonl:1: row: expected one JSON object a line, found a list"),
        ([], [], "a.jsonl: no rows"),
        ([{"text": "a"}], ["--output_file", "v.txt"], "v.txt: expected a name that ends in .parquet or .npy"),
        ([{"text": "a"}], ["--kind", "both"], "--kind: expected one of query, passage; found 'both'"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], rows, flags, message) -> None:
    (tmp_path / "v.npy").write_text("earlier")
    assert embed(model, write(tmp_path / "a.jsonl", rows), tmp_path / "v.npy", *flags) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert (tmp_path / "v.npy").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "v.npy"]
