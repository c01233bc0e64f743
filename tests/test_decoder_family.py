"""Embedders made of language models: last token, texts ended, and the same vectors in every library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flagembedding import ask, needs_flagembedding
from plain import Plain
from sentence_transformers import SentenceTransformer
from test_train import job
from tiny import some_texts, tiny_bert, tiny_decoder
from toy import mrr, toy_tables

from retune import tables
from retune.cli import main
from retune.config import EmbedderConfig
from retune.model import backbone
from retune.model.embedder import Embedder
from retune.model.embedder_families import FAMILIES, detected
from retune.runtime import UserError
from retune.stages.train import train

KINDS = ("qwen2", "qwen3", "llama", "gemma2", "mistral")
TEXTS = [*some_texts(12, longest=20), "Is it?\n", "a", ""]
CPU = torch.device("cpu")
FORMAT = "Instruct: {}\nQuery: {}"


def load(model: Path | str, **settings) -> Embedder:
    return Embedder.load(EmbedderConfig(model=str(model), **settings), target=CPU)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_decoder(folder / kind, kind) for kind in KINDS}


def test_the_checkpoint_tells_the_family(models, tmp_path):
    assert {detected(folder) for folder in models.values()} == {"decoder"}
    assert detected(tiny_bert(tmp_path)) == "encoder"
    (tmp_path / "config.json").write_text('{"model_type": "new", "architectures": ["NewForCausalLM"]}')
    assert detected(tmp_path) == "decoder"


# ---- vectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_vectors_are_the_last_tokens_states_one_text_at_a_time(models, kind):
    """Against a decoder written out plainly, in float32, without batches, padding or transformers."""
    ours = load(models[kind])
    plain = Plain(models[kind], json.loads((models[kind] / "config.json").read_text()))
    tokens = ours.tokenize(TEXTS, "passage")
    parts = [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]
    assert {ids[-1] for ids in parts} == {ours.tokenizer.hf.eos_token_id}
    expected = torch.stack([torch.nn.functional.normalize(plain.states(ids)[-1], dim=-1) for ids in parts])
    np.testing.assert_allclose(ours.encode(tokens), expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_batches_and_padding_change_nothing(models, kind, budget):
    ours = load(models[kind], normalize=False)
    alone = []
    for text in TEXTS:
        ids = torch.tensor([ours.tokenize([text], "passage").ids.tolist()])
        alone.append(ours.backbone(input_ids=ids).last_hidden_state[0, -1].detach())
    np.testing.assert_allclose(ours.encode(ours.tokenize(TEXTS, "passage"), budget), torch.stack(alone), atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_padding_does_not_matter(models, side):
    ours = load(models["qwen3"])
    ours.tokenizer.hf.padding_side = side
    batch = ours.tokenizer.hf(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = ours(batch["input_ids"], batch["attention_mask"])
    np.testing.assert_allclose(found, ours.encode_passages(TEXTS), atol=1e-5)


def test_instructions_with_line_breaks(models):
    typed = load(models["llama"], query_instruction="Find", query_instruction_format="Instruct: {}\\nQuery: {}")
    real = load(models["llama"], query_instruction="Find", query_instruction_format=FORMAT)
    found = typed.encode_queries(["bar"])
    np.testing.assert_array_equal(found, real.encode_queries(["bar"]))
    np.testing.assert_array_equal(found, real.encode_passages(["Instruct: Find\nQuery: bar"]))


# ---- the end of a text --------------------------------------------------------------------------


def test_an_embedders_tokenizer_is_taken_as_it_is(models, tmp_path):
    """A text gets an end where the checkpoint's tokenizer gives it one; a bare language model's always does."""
    ours = load(models["qwen2"])
    end = ours.tokenizer.hf.eos_token_id
    assert ours.tokenize(["bar"], "query").ids[-1] == end
    ours.save(tmp_path / "ended")
    assert load(tmp_path / "ended").tokenize(["bar"], "query").ids.tolist().count(end) == 1
    plain = json.loads((models["qwen2"] / "tokenizer.json").read_text())["post_processor"]
    tokenizer = json.loads((tmp_path / "ended/tokenizer.json").read_text())
    (tmp_path / "ended/tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": plain}))
    config = json.loads((tmp_path / "ended/tokenizer_config.json").read_text())
    assert config["add_eos_token"] is True and config["add_bos_token"] is False
    assert load(tmp_path / "ended").tokenize(["bar"], "query").ids[-1] == end, "add_eos_token asks for it"
    (tmp_path / "ended/tokenizer_config.json").write_text(json.dumps(config | {"add_eos_token": False}))
    assert load(tmp_path / "ended").tokenize(["bar"], "query").ids[-1] != end


def test_cutting_keeps_the_end(models):
    ours = load(models["gemma2"], passage_max_length=8)
    ids = ours.tokenize([" ".join(["bar"] * 50)], "passage").ids
    assert len(ids) == 8 and ids[-1] == ours.tokenizer.hf.eos_token_id


# ---- what a checkpoint lacks --------------------------------------------------------------------


def test_flash_attention_that_is_not_there(models, monkeypatch):
    with pytest.raises(UserError, match=r"embedder\.use_flash_attn: flash-attn runs on GPUs alone"):
        load(models["llama"], use_flash_attn=True)
    monkeypatch.setattr(backbone.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backbone.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="flash-attn is not installed; pip install flash-attn"):
        load(models["llama"], use_flash_attn=True)


def test_a_tokenizer_without_an_end(models, tmp_path):
    folder = tiny_decoder(tmp_path, "llama")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no end-of-text token"):
        load(folder)


# ---- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory) -> Path:
    """A tuned Qwen3 with an instruction and a rotary base that is not transformers' default."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_decoder(folder / "base", "qwen3", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    asked = job(folder, base, toy_tables(folder / "tables"), {"num_train_epochs": 6, "learning_rate": 3e-3})
    asked["embedder"] = EmbedderConfig(model=str(base), query_instruction="Find", query_instruction_format=FORMAT)
    train(**asked)
    return folder


def test_training_lowers_the_loss_and_lifts_mrr(trained):
    losses = tables.read(trained / "history.parquet", "history")["loss"].to_pylist()
    assert losses[-1] < 0.5 * losses[0]
    asked = {"query_instruction": "Find", "query_instruction_format": FORMAT}
    before, after = mrr(load(trained / "base", **asked), trained), mrr(load(trained / "model"), trained)
    assert after > before + 0.2


def test_a_tuned_model_keeps_its_instruction_and_format(trained):
    ours = load(trained / "model")
    asked = load(trained / "model", query_instruction="Find", query_instruction_format=FORMAT)
    np.testing.assert_array_equal(ours.encode_queries(TEXTS), asked.encode_queries(TEXTS))
    own = ours.encode_queries(["bar"], ["Sort"])
    np.testing.assert_allclose(own, ours.encode_passages(["Instruct: Sort\nQuery: bar"]), atol=1e-6)


def test_sentence_transformers_gives_the_same_vectors(trained):
    ours, theirs = load(trained / "model"), SentenceTransformer(str(trained / "model"), device="cpu")
    np.testing.assert_allclose(ours.encode_queries(TEXTS), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours.encode_passages(TEXTS), theirs.encode_document(TEXTS), atol=1e-5)


THEIRS = """
import json, sys
import numpy as np
from FlagEmbedding import FlagLLMModel
folder, out, texts = json.loads(sys.stdin.read())
model = FlagLLMModel(
    folder, query_instruction_for_retrieval="Find", query_instruction_format="Instruct: {}\\nQuery: {}",
    use_fp16=False, devices="cpu",
)
np.savez(out, queries=model.encode_queries(texts), passages=model.encode_corpus(texts))
"""


@needs_flagembedding
def test_flagembedding_gives_the_same_vectors(trained, tmp_path):
    ask(THEIRS, str(trained / "model"), str(tmp_path / "out.npz"), TEXTS)
    theirs, ours = np.load(tmp_path / "out.npz"), load(trained / "model")
    np.testing.assert_allclose(ours.encode_queries(TEXTS), theirs["queries"], atol=1e-4)
    np.testing.assert_allclose(ours.encode_passages(TEXTS), theirs["passages"], atol=1e-4)


# ---- commands -----------------------------------------------------------------------------------


def test_embed_mine_and_train_by_command(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = some_texts(20, longest=12)
    rows = [{"query": f"is {text.split()[0]}?", "pos": [text], "neg": texts[:2]} for text in texts[4:]]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = ["--embedder_name_or_path", str(models["mistral"]), "--embedder_model_class", "decoder-only-base"]
    model += ["--query_instruction_for_retrieval", "Find", "--query_instruction_format_for_retrieval", "{}\\n{}"]
    assert (
        main(["embed", "--input_file", "texts.jsonl", "--output_file", "v.npy", "--vector_dtype", "float32", *model])
        == 0
    )
    np.testing.assert_allclose(np.load("v.npy"), load(models["mistral"]).encode_passages(texts), atol=1e-5)
    mine = ["mine", "--input_file", "rows.jsonl", "--output_file", "mined.jsonl", "--range_for_sampling", "0-8"]
    assert main([*mine, "--negative_number", "2", *model]) == 0
    assert all(len(json.loads(line)["neg"]) == 2 for line in Path("mined.jsonl").read_text().splitlines())
    given = ["--model_name_or_path", str(models["mistral"]), "--train_data", "mined.jsonl", "--output_dir", "out"]
    given += ["--family", "decoder", "--train_group_size", "2", "--max_steps", "1", "--use_flash_attn", "False"]
    given += ["--query_instruction_for_retrieval", "Find", "--query_instruction_format", "{}\\n{}"]
    assert main(["train", *given]) == 0
    assert load("out").card.family == "decoder" and load("out").card.pooling == "last_token"
    assert load("out").prompts["query"].prefix() == "Find\n"
    assert json.loads(Path("out/adapter/adapter_config.json").read_text())["r"] == 64  # as FlagEmbedding's trainer
    assert main(["train", *given, "--overwrite_output_dir", "--use_flash_attn"]) == 1


def test_every_family_has_a_row():
    assert set(FAMILIES) == set(EmbedderConfig.model_fields["family"].annotation.__args__[0].__args__)
