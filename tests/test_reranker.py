"""The reranker gives CrossEncoder's logits, whatever the batches; only the passage is cut."""

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder
from tiny import some_texts, tiny_bert, tiny_reranker

from retune.config import RerankerConfig
from retune.model.reranker import Reranker
from retune.runtime import UserError

CPU = torch.device("cpu")
KINDS = ["bert", "xlm-roberta"]
SPECIALS = {"bert": 3, "xlm-roberta": 4}
PAIRS = list(zip(some_texts(60, 1, longest=10), some_texts(60, 2, longest=40), strict=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {kind: tiny_reranker(tmp_path_factory.mktemp(kind), kind=kind) for kind in KINDS}


def load(model: Path, **settings) -> Reranker:
    return Reranker.load(RerankerConfig(model=str(model), **{"max_length": 64, **settings}), target=CPU)


def logits_of(model: Path, pairs) -> np.ndarray:
    theirs = CrossEncoder(str(model), device="cpu", max_length=64)
    return theirs.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 150, 100_000])
def test_logits_equal_those_of_cross_encoder_whatever_the_budget(models, kind, budget):
    ours = load(models[kind])
    tokens = ours.tokenize([query for query, _ in PAIRS], [passage for _, passage in PAIRS])
    expected = logits_of(models[kind], PAIRS)
    assert np.ptp(expected) > 0.1, "a model to which all pairs are the same would prove nothing"
    np.testing.assert_allclose(ours.scores(tokens, budget), expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_joined_tokens_equal_the_tokenizers_own(models, kind):
    ours = load(models[kind])
    queries, passages = [query for query, _ in PAIRS], [passage for _, passage in PAIRS]
    expected = ours.tokenizer.hf(queries, passages)
    found = ours.tokenize(queries, passages)
    for row in range(len(PAIRS)):
        where = slice(*found.offsets[row : row + 2])
        assert found.ids[where].tolist() == expected["input_ids"][row]
        if kind == "bert":
            assert found.type_ids[where].tolist() == expected["token_type_ids"][row]
    assert (found.type_ids is None) == (kind != "bert")


def test_normalize_is_the_sigmoid(models):
    logits = load(models["bert"]).score(PAIRS)
    np.testing.assert_allclose(load(models["bert"], normalize=True).score(PAIRS), 1 / (1 + np.exp(-logits)), rtol=1e-5)


def test_the_sigmoid_of_a_large_logit_does_not_overflow(models, monkeypatch):
    ours = load(models["bert"], normalize=True)
    monkeypatch.setattr(ours, "forward", lambda **batch: torch.tensor([-200.0, 0.0, 200.0]))
    monkeypatch.setattr(Reranker, "__call__", lambda self, **batch: self.forward(**batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ours.score([("bar", "fun")] * 3)
    np.testing.assert_allclose(found, [0, 0.5, 1], atol=1e-30)


def test_instructions_come_before_the_texts(models):
    ours = load(models["bert"], query_instruction="bar", query_instruction_format="{} : {}", passage_instruction="fun ")
    expected = logits_of(models["bert"], [(f"bar : {query}", f"fun {passage}") for query, passage in PAIRS])
    np.testing.assert_allclose(ours.score(PAIRS), expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("query_max_length", [None, 5, 200])
def test_only_the_passage_is_cut_beyond_the_querys_own_limit(models, kind, query_max_length):
    ours = load(models[kind], max_length=24, query_max_length=query_max_length)
    room = 24 - SPECIALS[kind]
    limit = min(query_max_length or 24 * 3 // 4, room)
    queries = some_texts(40, 3, longest=40)
    passages = some_texts(40, 4, longest=40)
    tokens = ours.tokenize(queries, passages)
    ids = [ours.tokenizer.hf(texts, add_special_tokens=False)["input_ids"] for texts in (queries, passages)]
    cut = 0
    for row, (query, passage) in enumerate(zip(*ids, strict=True)):
        query = query[:limit]
        passage, cut = passage[: room - len(query)], cut + (len(query) + len(passage) > room)
        expected = ours.tokenizer.hf.decode(query), ours.tokenizer.hf.decode(passage)
        found = tokens.ids[slice(*tokens.offsets[row : row + 2])]
        plain = [number for number in found.tolist() if number > 4]
        assert plain == [*query, *passage], expected
        assert len(found) == len(query) + len(passage) + SPECIALS[kind] <= 24
    assert cut > 5
    assert np.isfinite(ours.scores(tokens)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_pair_fits_the_models_positions(models, kind, caplog):
    long = " ".join(["bar"] * 500)
    with caplog.at_level(logging.WARNING, "retune"):
        ours = load(models[kind], max_length=512, query_max_length=500)
    assert "reranker.max_length: the model takes 64 tokens at most" in caplog.text
    assert f"reranker.query_max_length: at most {64 - SPECIALS[kind]} tokens fit max_length" in caplog.text
    assert ours.tokenize([long], [long]).lengths.tolist() == [64]
    assert np.isfinite(ours.score([(long, long), ("", "")])).all()
    tight = load(models[kind], max_length=8)
    assert tight.tokenize([long], [long]).lengths.tolist() == [8]


def test_a_pair_is_read_in_its_order(models):
    ours = load(models["bert"])
    assert np.abs(ours.score([("bar cost", "fun")]) - ours.score([("fun", "bar cost")])).max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_saved_gives_the_same_logits_here_and_in_cross_encoder(models, tmp_path, kind):
    ours = load(models[kind])
    expected = ours.score(PAIRS)
    ours.save(tmp_path)
    np.testing.assert_array_equal(load(tmp_path).score(PAIRS), expected)
    theirs = CrossEncoder(str(tmp_path), device="cpu").predict(PAIRS, show_progress_bar=False)
    np.testing.assert_allclose(theirs, expected, atol=1e-4)


# ---- a new head, and mistakes -------------------------------------------------------------------


def test_a_new_head_on_an_encoder_depends_on_the_seed_alone(tmp_path):
    encoder = tiny_bert(tmp_path)
    settings = RerankerConfig(model=str(encoder), max_length=64)
    torch.manual_seed(1)
    one = Reranker.start(settings, 7, CPU).score(PAIRS)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == after, "the global generator is left alone"
    np.testing.assert_array_equal(Reranker.start(settings, 7, CPU).score(PAIRS), one)
    assert np.abs(Reranker.start(settings, 8, CPU).score(PAIRS) - one).max() > 1e-4
    started, weights = Reranker.start(settings, 7, CPU), load_file(encoder / "model.safetensors")
    own = started.backbone.bert.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in weights.items())


def test_an_encoder_is_no_reranker(tmp_path):
    encoder = tiny_bert(tmp_path)
    with pytest.raises(UserError, match="it has 2 labels; a reranker has one logit"):
        load(encoder)
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "score"}, "label2id": {"score": 0}}))
    with pytest.raises(UserError, match=r"2 weights are missing, such as classifier\.bias: is it a reranker"):
        load(encoder)


def test_three_labels_are_no_reranker(tmp_path):
    with pytest.raises(UserError, match="it has 3 labels"):
        load(tiny_reranker(tmp_path, labels=3))
