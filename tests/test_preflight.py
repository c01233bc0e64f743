"""What is said before the first step, and when nothing is."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import WORDS, some_texts, tiny_bert, tiny_tokenizer
from toy import toy_tables

from retune.config import EmbedderConfig, TrainConfig
from retune.data import candidates
from retune.data.lengths import counter
from retune.model import trainable
from retune.model.embedder import Embedder
from retune.runtime import UserError
from retune.stages.train import _collate
from retune.training import preflight


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "base")


def of_lengths(*lengths: int) -> list[str]:
    """Texts with so many tokens, [CLS] and [SEP] included."""
    return [" ".join(WORDS[: length - 2]) for length in lengths]


# ---- lengths ------------------------------------------------------------------------------------


def model_with(base: Path, **settings) -> Embedder:
    return Embedder.load(EmbedderConfig(model=str(base), **settings))


def test_the_share_of_texts_that_are_cut_is_told(base, caplog):
    """Of 16 queries 4 have 10 tokens or more, which is the limit, and 3 are longer."""
    model = model_with(base, query_max_length=10, passage_max_length=12)
    texts = of_lengths(*[5] * 12, 10, 11, 12, 30)
    with caplog.at_level(logging.WARNING, "retune"):
        tokens = preflight.tokenized(model, texts, "query")
    assert tokens.lengths.tolist() == [5] * 12 + [10] * 4
    assert [record.getMessage() for record in caplog.records] == [
        "embedder.query_max_length: 19% of 16 queries are longer than 10 tokens, and cut there; "
        "raise it (the model takes 64)"
    ]


def test_at_the_models_own_limit_raising_it_is_no_advice(base, caplog):
    model = model_with(base)
    with caplog.at_level(logging.WARNING, "retune"):
        preflight.tokenized(model, [" ".join(WORDS * 2)] * 2 + ["bar"] * 18, "passage")
    assert "10% of 20 passages are longer than 64 tokens" in caplog.text
    assert "64 is the model's own limit: cut the texts up, leave long ones out (split.drop_longer_than)" in caplog.text


@pytest.mark.parametrize(
    "lengths",
    [[10] * 20, [5] * 19 + [11], [5]],
    ids=["just as long", "a twentieth", "short"],
)
def test_nothing_is_said_of_texts_that_fit(base, caplog, lengths):
    with caplog.at_level(logging.WARNING, "retune"):
        preflight.tokenized(model_with(base, query_max_length=10), of_lengths(*lengths), "query")
    assert caplog.text == ""


def test_instructions_count(base, caplog):
    model = model_with(base, query_max_length=10)
    texts = of_lengths(*[9] * 10)
    with caplog.at_level(logging.WARNING, "retune"):
        preflight.tokenized(model, texts, "query", [f"{WORDS[0]} "] * 10)
        assert caplog.text == ""
        preflight.tokenized(model, texts, "query", [None] * 5 + [f"{WORDS[0]} {WORDS[1]} {WORDS[2]} "] * 5)
    assert "50% of 10 queries" in caplog.text


def test_a_sample_stands_for_many(base, monkeypatch):
    """The share in a sample of 50 is near that of all 900 texts that are as long as the limit."""
    monkeypatch.setattr(preflight, "SAMPLE", 50)
    model = model_with(base, query_max_length=10)
    lengths = np.where(np.random.default_rng(0).permutation(900) < 600, 11, 10)
    texts = of_lengths(*lengths, *[4] * 100)
    found = preflight.cut_share(model, model.tokenize(texts, "query"), texts, "query", None)
    assert abs(found - 0.6) < 0.15


def test_training_tells_of_queries_and_passages_apart(base, tmp_path, caplog):
    paths = toy_tables(tmp_path, 8)
    data = candidates.load(**paths, group_size=3, seed=0)
    settings = TrainConfig(train_group_size=3)
    with caplog.at_level(logging.WARNING, "retune"):
        _collate(model_with(base, passage_max_length=12), data, paths["texts"], settings, False, None, 0)
    assert "passage_max_length" in caplog.text and "query_max_length" not in caplog.text


def test_texts_may_be_shorter_in_training_than_the_model_reads_them(base, tmp_path, caplog):
    paths = toy_tables(tmp_path, 8)
    data = candidates.load(**paths, group_size=3, seed=0)
    model, settings = model_with(base), TrainConfig(train_group_size=3, passage_max_length=9, query_max_length=1000)
    with caplog.at_level(logging.WARNING, "retune"):
        lengths = _collate(model, data, paths["texts"], settings, False, None, 0).chunker.tokens.lengths
    plain = _collate(model, data, paths["texts"], TrainConfig(train_group_size=3), False, None, 0).chunker.tokens
    n = len(data)  # queries come first
    assert (lengths[:n] == plain.lengths[:n]).all() and (lengths[n:] == np.minimum(plain.lengths[n:], 9)).all()
    assert plain.lengths[n:].max() > 9
    assert "train.passage_max_length: 88% of" in caplog.text and "embedder." not in caplog.text
    assert model.max_lengths == {"query": 64, "passage": 64}


# ---- padding, positions, what lies elsewhere ----------------------------------------------------


def collate(base: Path, folder: Path, **settings):
    paths = toy_tables(folder, 8)
    data = candidates.load(**paths, group_size=3, seed=0)
    return _collate(
        model_with(base), data, paths["texts"], TrainConfig(train_group_size=3, **settings), False, None, 0
    ).chunker


def test_lengths_are_padded_to_a_multiple(base, tmp_path):
    plain, padded = collate(base, tmp_path), collate(base, tmp_path, pad_to_multiple_of=16)
    rows = np.arange(len(plain.tokens))
    widths = [[chunk["input_ids"].shape[1] for chunk in chunker(rows)[0]["chunks"]] for chunker in (plain, padded)]
    assert any(width % 16 for width in widths[0]) and not any(width % 16 for width in widths[1])


def test_padding_beyond_the_models_positions_is_refused(base, tmp_path):
    with pytest.raises(UserError, match=r"train\.pad_to_multiple_of: .* padded to 100, .* positions for 64; set a div"):
        collate(base, tmp_path, pad_to_multiple_of=100)


@pytest.mark.parametrize("lora", [{}, {"use_lora": True, "modules_to_save": ["embeddings"]}])
def test_position_embeddings_are_fixed(base, lora):
    for fixed in (False, True):
        training = TrainConfig(fix_position_embedding=fixed, **lora)
        model = trainable.load(EmbedderConfig(model=str(base)), training, seed=0)
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        assert any("position_embeddings" in name for name in trained) is not fixed
        assert any("word_embeddings" in name for name in trained)


def test_positions_that_are_not_there_are_told_of(base, caplog):
    model = model_with(base)
    model.backbone.embeddings.position_embeddings = None
    with caplog.at_level(logging.WARNING, "retune"):
        trainable._fix_positions(model.backbone)
    assert "train.fix_position_embedding: the model has no position embeddings" in caplog.text


def test_a_config_from_elsewhere_holds(base, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    config.hidden_dropout_prob, config.layer_norm_eps = 0.37, 0.5
    config.save_pretrained(tmp_path)
    model = model_with(base, config_name=str(tmp_path))
    assert model.backbone.embeddings.dropout.p == 0.37
    texts = some_texts(3)
    assert np.abs(model.encode_queries(texts) - model_with(base).encode_queries(texts)).max() > 1e-3
    weight = load_file(base / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(model.backbone.get_input_embeddings().weight, weight)


def test_a_tokenizer_from_elsewhere_is_used_and_saved(base, tmp_path):
    fast = tiny_tokenizer(tmp_path)
    fast.add_special_tokens({"pad_token": WORDS[5]})  # a word of the vocabulary, which then is never split
    fast.backend_tokenizer.normalizer = None
    fast.save_pretrained(tmp_path)
    text = f"{WORDS[1].upper()} {WORDS[2]}"
    model = model_with(base, tokenizer_name=str(tmp_path))
    assert model.tokenize([text], "query").ids.tolist() == [2, 1, 7, 3]  # no lower case: an unknown word
    assert model_with(base).tokenize([text], "query").ids.tolist() == [2, 6, 7, 3]
    model.save(tmp_path / "saved")
    assert model_with(tmp_path / "saved").tokenize([text], "query").ids.tolist() == [2, 1, 7, 3]
    settings = {"model": str(base), "tokenizer_name": str(tmp_path)}
    import pyarrow as pa

    fast.backend_tokenizer.post_processor = None
    fast.save_pretrained(tmp_path)
    assert counter(settings, 1)(pa.array([text])).tolist() == [2], "lengths are those of the same tokenizer"


def test_a_tokenizer_that_is_not_there_or_does_not_fit(base, tmp_path):
    with pytest.raises(UserError, match=r"embedder\.tokenizer_name: .*: no tokenizer there"):
        model_with(base, tokenizer_name=str(tmp_path))
    fast = tiny_tokenizer(tmp_path)
    fast.add_tokens(["<q>"])
    fast.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer_name: its 70 tokens are more than the 69 that .* has vectors for"):
        model_with(base, tokenizer_name=str(tmp_path))
