"""Decoders score as one pair at a time does, unpadded, in float32, through the whole head; and as published."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from plain import PAIRS, SHORT, Plain, adapters, tokens_of
from safetensors.torch import load_file
from tiny import DECODERS, byte_tokenizer, some_texts, tiny_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer

from retune.config import RerankerConfig
from retune.model.reranker import Reranker
from retune.runtime import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {kind: tiny_decoder(tmp_path_factory.mktemp(kind), kind) for kind in DECODERS}


def load(model: Path, **settings) -> Reranker:
    return Reranker.load(RerankerConfig(model=str(model), **{"max_length": 200, **settings}), target=CPU)


@torch.no_grad()
def one_by_one(model: Path, pairs, layer: int | None = None, **options) -> np.ndarray:
    """Logits of "Yes" by transformers: one pair at a time, no padding, the whole vocabulary."""
    tokenizer, whole = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).float()
    yes = tokenizer("Yes", add_special_tokens=False)["input_ids"][0]
    found = []
    for query, passage in pairs:
        ids = torch.tensor([tokens_of(tokenizer, query, passage, **options)[0]])
        out = whole(input_ids=ids, output_hidden_states=True)
        logits = out.logits if layer is None else whole.lm_head(whole.model.norm(out.hidden_states[layer]))
        if layer is not None and (cap := getattr(whole.config, "final_logit_softcapping", None)):
            logits = cap * torch.tanh(logits / cap)
        found.append(float(logits[0, -1, yes]))
    return np.array(found)


# ---- the logit of "Yes" -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("budget", [1, 700, 100_000])
def test_base_equals_one_pair_at_a_time_whatever_the_budget_and_order(models, kind, budget):
    ours = load(models[kind])
    assert ours.family == "decoder-only-base"
    expected = one_by_one(models[kind], PAIRS)
    assert np.ptp(expected) > 0.3
    order = np.random.default_rng(budget).permutation(len(PAIRS))
    tokens = ours.tokenize([PAIRS[row][0] for row in order], [PAIRS[row][1] for row in order])
    np.testing.assert_allclose(ours.scores(tokens, budget), expected[order], atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_right_padding_without_a_mask_equals_left_padding_with_one(models, kind):
    ours = load(models[kind])
    texts = ours.tokenize(*zip(*PAIRS, strict=True))
    whole = AutoModelForCausalLM.from_pretrained(models[kind])
    width = int(texts.lengths.max())
    ids, mask = torch.zeros(len(PAIRS), width, dtype=torch.long), torch.zeros(len(PAIRS), width, dtype=torch.long)
    for row in range(len(PAIRS)):
        one = torch.from_numpy(texts.ids[slice(*texts.offsets[row : row + 2])].astype(np.int64))
        ids[row, width - len(one) :], mask[row, width - len(one) :] = one, 1
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = whole(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -1]
    yes = ours.tokenizer.hf("Yes", add_special_tokens=False)["input_ids"][0]
    np.testing.assert_allclose(ours.scores(texts, 100_000), logits[:, yes], atol=1e-4)


@pytest.mark.parametrize("query_max_length", [None, 6, 60])
def test_query_and_passage_are_cut_as_the_published_models_want_it(models, query_max_length):
    ours = load(models["llama"], max_length=40, query_max_length=query_max_length)
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    queries, passages = some_texts(40, 3, longest=40), some_texts(40, 4, longest=60)
    tokens, cut = ours.tokenize(queries, passages), 0
    for row, (query, passage) in enumerate(zip(queries, passages, strict=True)):
        expected, start, end = tokens_of(tokenizer, query, passage, max_length=40, query_max_length=query_max_length)
        assert tokens.ids[slice(*tokens.offsets[row : row + 2])].tolist() == expected
        cut += end - start < len(tokenizer(f"B: {passage}", add_special_tokens=False)["input_ids"])
    assert cut > 10


def test_the_question_can_be_another(models):
    prompt = "Is it so?"
    expected = one_by_one(models["llama"], PAIRS, prompt=prompt)
    np.testing.assert_allclose(load(models["llama"], prompt=prompt).score(PAIRS), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"query_instruction": "bar ", "passage_instruction": "fun "}, ("bar {}", "fun {}")),
        ({"query_instruction": "bar", "query_instruction_format": "{}: {}"}, ("bar: {}", "{}")),
        ({"query_instruction": "A: ", "passage_instruction": "B: "}, ("{}", "{}")),  # as the incumbent's flags have it
    ],
)
def test_instructions_follow_the_letters(models, settings, form):
    pairs = [(form[0].format(query), form[1].format(passage)) for query, passage in PAIRS]
    np.testing.assert_allclose(
        load(models["llama"], **settings).score(PAIRS), one_by_one(models["llama"], pairs), atol=1e-4
    )


def test_a_tokenizer_without_bos_gets_none(models, tmp_path):
    tiny_decoder(tmp_path, "qwen3")
    byte_tokenizer(tmp_path, bos=False)
    ours = load(tmp_path)
    assert ours.tokenize(["bar"], ["fun"]).ids[0] == ours.tokenizer.hf("A", add_special_tokens=False)["input_ids"][0]


def test_normalize_is_the_sigmoid(models):
    logits = load(models["gemma"]).score(PAIRS)
    found = load(models["gemma"], normalize=True).score(PAIRS)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits.astype(np.float64))), rtol=1e-5)


def test_16_bits_give_float32_logits(models):
    exact = load(models["llama"]).score(PAIRS)
    half = Reranker.load(RerankerConfig(model=str(models["llama"]), max_length=200), torch.bfloat16, CPU)
    found = half.score(PAIRS)
    assert found.dtype == np.float32 and half.dtype == torch.bfloat16
    assert len(np.unique(found)) > len(np.unique(torch.from_numpy(found).bfloat16().float()))  # not rounded to 8 bits
    np.testing.assert_allclose(found, exact, atol=0.4)


def test_saved_gives_the_same_scores(models, tmp_path):
    ours = load(models["gemma2"])
    expected = ours.score(PAIRS)
    ours.save(tmp_path)
    np.testing.assert_array_equal(load(tmp_path).score(PAIRS), expected)
    np.testing.assert_array_equal(ours.score(PAIRS), expected)
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(
        load_file(models["gemma2"] / "model.safetensors")
    )


def test_gradients_reach_the_head_and_the_layers(models):
    ours = load(models["llama"])
    tokens = ours.tokenize(["bar"], ["fun"])
    ours(input_ids=torch.from_numpy(tokens.ids.astype(np.int64))[None]).sum().backward()
    head = ours.backbone.get_output_embeddings().head.weight.grad
    assert (head.abs().sum(1) > 0).nonzero().tolist() == [[ours.backbone.get_output_embeddings().ids.item()]]
    assert ours.backbone.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_a_tokenizer_without_yes_is_an_error(tmp_path):
    from tiny import tiny_tokenizer

    tiny_decoder(tmp_path, "llama")
    (tmp_path / "tokenizer.json").unlink()
    tiny_tokenizer(tmp_path)
    with pytest.raises(UserError, match="its tokenizer has no token 'Yes'"):
        load(tmp_path)


# ---- adapters -----------------------------------------------------------------------------------


def test_adapters_are_folded_in(models, tmp_path):
    from peft import PeftModel

    folder = adapters(AutoModelForCausalLM.from_pretrained(models["llama"]), tmp_path / "lora")
    folded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["llama"]), folder)
    AutoTokenizer.from_pretrained(models["llama"]).save_pretrained(tmp_path / "whole")
    folded.merge_and_unload().save_pretrained(tmp_path / "whole")
    expected = one_by_one(tmp_path / "whole", PAIRS)
    assert np.abs(expected - one_by_one(models["llama"], PAIRS)).max() > 0.1
    for settings in ({}, {"family": "decoder-only-layerwise"}):
        found = load(models["llama"], peft_path=str(folder), **settings).score(PAIRS)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_adapters_that_are_not_there_or_do_not_fit_are_errors(models, tmp_path):
    with pytest.raises(UserError, match=r"reranker\.peft_path: .*: no adapters there"):
        load(models["llama"], peft_path=str(tmp_path))
    folder = adapters(AutoModelForCausalLM.from_pretrained(models["gemma"]), tmp_path / "lora")
    with pytest.raises(UserError, match=r"reranker\.peft_path: "):
        load(models["llama"], peft_path=str(folder))


# ---- by layers, plain architectures -------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("layer", [1, 3, None])
def test_layerwise_reads_a_layer_through_norm_and_head(models, kind, layer):
    ours = load(models[kind], family="decoder-only-layerwise", cutoff_layers=layer)
    expected = one_by_one(models[kind], PAIRS, layer if layer else None)
    np.testing.assert_allclose(ours.score(PAIRS), expected, atol=1e-4)
    assert len(ours.backbone.model.layers) == (layer or 4), "what lies above is not kept"


def test_several_layers_give_their_mean(models):
    found = load(models["llama"], family="decoder-only-layerwise", cutoff_layers=[4, 2]).score(PAIRS)
    two, four = (one_by_one(models["llama"], PAIRS, layer) for layer in (2, None))
    np.testing.assert_allclose(found, (two + four) / 2, atol=1e-4)


@pytest.mark.parametrize("layers", [0, [5]])
def test_a_layer_that_is_not_there_is_an_error(models, layers):
    with pytest.raises((UserError, ValueError), match="cutoff_layers"):
        load(models["llama"], family="decoder-only-layerwise", cutoff_layers=layers)


def test_an_architecture_of_another_build_is_an_error(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    fast = byte_tokenizer(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(fast), n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    assert np.isfinite(load(tmp_path).score(PAIRS)).all(), "it can be asked, though"
    with pytest.raises(UserError, match="an architecture such as gpt2 cannot be read by layers"):
        load(tmp_path, family="decoder-only-layerwise")


def test_a_model_read_by_layers_cannot_be_saved(models, tmp_path):
    with pytest.raises(UserError, match="can score, but not be saved"):
        load(models["llama"], family="decoder-only-layerwise").save(tmp_path)


@pytest.mark.parametrize(("ratio", "layers"), [(1, None), (2, [1]), (4, [1, 3]), (8, [2])])
def test_lightweight_on_a_plain_gemma2_merges_the_passages_tokens(models, ratio, layers):
    ours = load(
        models["gemma2"], family="decoder-only-lightweight", compress_ratio=ratio, compress_layers=layers,
        cutoff_layers=[3, 4],
    )  # fmt: skip
    config = json.loads((models["gemma2"] / "config.json").read_text())
    plain, tokenizer = Plain(models["gemma2"], config), AutoTokenizer.from_pretrained(models["gemma2"])
    yes = plain.weights["model.embed_tokens.weight"][tokenizer("Yes", add_special_tokens=False)["input_ids"][0]]
    expected = []
    for query, passage in PAIRS:
        ids, start, end = tokens_of(tokenizer, query, passage, SHORT)
        states = plain.states(ids, start, end, layers or [], ratio)
        scores = [30 * torch.tanh(states[k] @ yes / 30) for k in (3, 4)]
        expected.append(float(sum(scores) / 2))
    tokens = ours.tokenize(*zip(*PAIRS, strict=True))
    for budget in (1, 700, 100_000):
        np.testing.assert_allclose(ours.scores(tokens, budget), expected, atol=1e-4)


def test_settings_of_other_families_are_told_of(models, caplog):
    with caplog.at_level(logging.WARNING, "retune"):
        load(models["llama"], cutoff_layers=2, compress_ratio=2)
    assert "reranker.cutoff_layers: means nothing to" in caplog.text
    assert "reranker.compress_ratio: means nothing to" in caplog.text
