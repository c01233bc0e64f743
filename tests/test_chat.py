"""Rerankers with a chat template: Qwen3-Reranker's numbers as its card computes them, and CrossEncoder's."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from plain import PAIRS, adapters
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from tiny import byte_tokenizer, some_texts, tiny_decoder, tiny_reranker
from transformers import AutoModelForCausalLM, AutoTokenizer

from retune.config import RerankerConfig
from retune.model.reranker import Reranker
from retune.runtime import UserError

CPU = torch.device("cpu")
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
ASKED = [(query + mark, passage) for (query, passage), mark in zip(PAIRS, ["?", "", ".", "?\n"] * 7, strict=False)]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("models") / "Qwen3-Reranker-tiny", "qwen3")


def load(model: Path, **settings) -> Reranker:
    return Reranker.load(RerankerConfig(model=str(model), **{"max_length": 500, **settings}), target=CPU)


def card_ids(tokenizer, query: str, passage: str, instruction: str = INSTRUCTION) -> list[int]:
    """A pair's tokens as the model card makes them: what stands between prefix and suffix is tokenised in one."""
    text = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}"
    return [
        token for part in (PREFIX, text, SUFFIX) for token in tokenizer(part, add_special_tokens=False)["input_ids"]
    ]


@torch.no_grad()
def card_logits(model: Path, pairs, instruction: str = INSTRUCTION) -> np.ndarray:
    """Logits of "no" and "yes" after each pair alone, float64 [n, 2]."""
    tokenizer, whole = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    answers = [tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]
    ids = [torch.tensor([card_ids(tokenizer, *pair, instruction)]) for pair in pairs]
    return np.stack([whole(input_ids=one).logits[0, -1, answers].double().numpy() for one in ids])


def test_qwen3_gives_the_cards_probability_and_its_log_odds(qwen, caplog):
    logits = card_logits(qwen, ASKED)
    odds = logits[:, 1] - logits[:, 0]
    assert np.ptp(odds) > 0.3
    with caplog.at_level(logging.WARNING, "retune"):
        ours = load(qwen)
    assert ours.family == "decoder-only-yes-no" and not caplog.text
    tokens = ours.tokenize(*zip(*ASKED, strict=True))
    for budget in (1, 1500, 100_000):
        np.testing.assert_allclose(ours.scores(tokens, budget), odds, atol=1e-4)
    probability = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
    np.testing.assert_allclose(load(qwen, normalize=True).score(ASKED), probability, atol=1e-4)


def test_qwen3_reads_the_tokens_of_the_whole(qwen):
    ours, tokenizer = load(qwen), AutoTokenizer.from_pretrained(qwen)
    tokens = ours.tokenize(*zip(*ASKED, strict=True))
    for row, pair in enumerate(ASKED):
        assert tokens.ids[slice(*tokens.offsets[row : row + 2])].tolist() == card_ids(tokenizer, *pair)
    stuck = tokenizer("?\n", add_special_tokens=False)["input_ids"]
    assert len(stuck) == 1 and stuck[0] in tokens.ids, "a token that reaches over the end of a query"


def test_the_instruction_is_the_users(qwen):
    logits = card_logits(qwen, ASKED, "Is it so?")
    found = load(qwen, query_instruction="Is it so?").score(ASKED)
    np.testing.assert_allclose(found, logits[:, 1] - logits[:, 0], atol=1e-4)
    with pytest.raises(UserError, match=r"reranker\.query_instruction_format: "):
        load(qwen, query_instruction="Is it so?", query_instruction_format="{} {}")


def test_a_query_that_is_cut_keeps_its_line_break_and_the_pair_its_end(qwen):
    ours, tokenizer = load(qwen, max_length=320, query_max_length=5), AutoTokenizer.from_pretrained(qwen)
    queries, passages = some_texts(30, 5, longest=12), some_texts(30, 6, longest=200)
    tokens = ours.tokenize(queries, passages)
    assert tokens.lengths.max() == 320
    end = tokenizer(SUFFIX, add_special_tokens=False)["input_ids"]
    cut = 0
    for row, (query, passage) in enumerate(zip(queries, passages, strict=True)):
        found = tokens.ids[slice(*tokens.offsets[row : row + 2])].tolist()
        assert found[-len(end) :] == end
        whole = card_ids(tokenizer, query, passage)[: -len(end)]
        cut += len(whole) > len(found) - len(end)
        asked = tokenizer("<Query>: " + query, add_special_tokens=False)["input_ids"]
        head = len(tokenizer(f"{PREFIX}<Instruct>: {INSTRUCTION}\n", add_special_tokens=False)["input_ids"])
        kept = len(tokenizer("<Query>: ", add_special_tokens=False)["input_ids"]) + 5
        shown = tokenizer.decode(found[head:])
        assert shown.startswith(tokenizer.decode(asked[:kept]).strip())
        assert shown.count("\n<Document>: ") == 1
    assert cut > 10


def test_a_template_that_fills_max_length_is_an_error(qwen):
    with pytest.raises(UserError, match=r"reranker\.max_length: the model's template alone has \d+ tokens"):
        load(qwen, max_length=40)


def test_a_decoder_by_another_name_is_asked_for_yes_unless_told(qwen, tmp_path):
    other = tiny_decoder(tmp_path / "mine", "qwen3")
    assert load(other).family == "decoder-only-base"
    assert load(qwen, family="decoder-only-base").family == "decoder-only-base"
    np.testing.assert_array_equal(load(other, family="decoder-only-yes-no").score(PAIRS), load(qwen).score(PAIRS))


def test_saved_gives_the_same_scores(qwen, tmp_path):
    expected = load(qwen).score(PAIRS)
    load(qwen).save(tmp_path)
    np.testing.assert_array_equal(load(tmp_path, family="decoder-only-yes-no").score(PAIRS), expected)


# ---- sentence-transformers' CrossEncoders --------------------------------------------------------

TEMPLATE = (
    "{% for m in messages if m['role'] == 'system' %}<|im_start|>system\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>user\n<Query>: {{ (messages | selectattr('role', 'eq', 'query') | first).content }}\n"
    "<Document>: {{ (messages | selectattr('role', 'eq', 'document') | first).content }}<|im_end|>\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def cross_encoder(folder: Path, words: tuple[str, ...], prompt: str | None = None, template: str = TEMPLATE) -> Path:
    """A CrossEncoder of a language model, saved by sentence-transformers."""
    model = tiny_decoder(folder / "model", "qwen3")
    tokenizer = byte_tokenizer(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    options = {"chat_template": {"add_generation_prompt": True}}
    transformer = Transformer(str(model), transformer_task="text-generation", processing_kwargs=options)
    head = LogitScore(*(tokenizer.convert_tokens_to_ids(word) for word in words))
    prompts = {"prompts": {"web": prompt}, "default_prompt_name": "web"} if prompt else {}
    CrossEncoder(modules=[transformer, head], device="cpu", **prompts).save_pretrained(str(folder / "saved"))
    return folder / "saved"


def theirs(model: Path, pairs=PAIRS, raw: bool = True) -> np.ndarray:
    identity = {"activation_fn": torch.nn.Identity()} if raw else {}
    return CrossEncoder(str(model), device="cpu").predict(pairs, show_progress_bar=False, **identity)


@pytest.mark.parametrize("words", [("yes", "no"), ("Yes",)])
@pytest.mark.parametrize("prompt", [None, "Is it so?"])
def test_logit_scores_equal_cross_encoders(tmp_path, words, prompt):
    folder = cross_encoder(tmp_path, words, prompt)
    ours = load(folder)
    assert ours.family == "decoder-only-yes-no"
    expected = theirs(folder)
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(ours.score(PAIRS), expected, atol=1e-4)
    np.testing.assert_allclose(load(folder, normalize=True).score(PAIRS), theirs(folder, raw=False), atol=1e-4)


def test_the_config_overrules_the_checkpoints_prompt(tmp_path):
    folder = cross_encoder(tmp_path, ("yes", "no"), "Is it so?")
    said = CrossEncoder(str(folder), device="cpu").predict(
        PAIRS, prompt="bar cost", activation_fn=torch.nn.Identity(), show_progress_bar=False
    )
    np.testing.assert_allclose(load(folder, query_instruction="bar cost").score(PAIRS), said, atol=1e-4)


def test_a_template_without_a_place_for_the_pair_is_an_error(tmp_path):
    folder = cross_encoder(tmp_path, ("yes", "no"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="its chat template does not show a query and a document"):
        load(folder)


def test_modules_that_are_not_known_are_an_error(tmp_path):
    folder = cross_encoder(tmp_path, ("yes", "no"))
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="a reranker of the modules Transformer, LogitScore, Dense is not supported"):
        load(folder)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma2"])
def test_classifiers_on_decoders_equal_cross_encoders(tmp_path, kind):
    folder = tiny_decoder(tmp_path, kind, labels=1)
    ours, expected = load(folder), theirs(folder, PAIRS[:24])
    assert ours.family == "encoder-only-base"
    for budget in (1, 300, 100_000):
        tokens = ours.tokenize(*zip(*PAIRS[:24], strict=True))
        np.testing.assert_allclose(ours.scores(tokens, budget), expected, atol=1e-4)


def test_a_prompt_of_an_encoder_goes_before_the_query(tmp_path):
    model = CrossEncoder(
        str(tiny_reranker(tmp_path / "model")), device="cpu", prompts={"web": "bar "}, default_prompt_name="web"
    )
    model.save_pretrained(str(tmp_path / "saved"))
    found = load(tmp_path / "saved", max_length=64).score(PAIRS)
    np.testing.assert_allclose(found, theirs(tmp_path / "saved"), atol=1e-4)


def test_adapters_of_a_classifier_are_folded_in(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    folder = tiny_decoder(tmp_path / "model", "llama", labels=1)
    lora = adapters(AutoModelForSequenceClassification.from_pretrained(folder), tmp_path / "lora")
    folded = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(folder), lora)
    byte_tokenizer(tmp_path / "whole")
    folded.merge_and_unload().save_pretrained(tmp_path / "whole")
    expected = theirs(tmp_path / "whole", PAIRS[:24])
    np.testing.assert_allclose(load(folder, peft_path=str(lora)).score(PAIRS[:24]), expected, atol=1e-4)


def test_an_activation_that_is_not_applied_is_told_of(tmp_path, caplog):
    folder = tiny_reranker(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for name, told in (("Identity", False), ("Sigmoid", False), ("Tanh", True)):
        said = {"sentence_transformers": {"activation_fn": f"torch.nn.modules.activation.{name}"}}
        (folder / "config.json").write_text(json.dumps(config | said))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "retune"):
            load(folder, max_length=64)
        assert ("puts Tanh on its scores" in caplog.text) == told
