"""The table of known checkpoints fills what a checkpoint leaves unsaid, and nothing else."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny import some_texts, tiny_bert, tiny_decoder, tiny_m3
from transformers import AutoConfig, AutoModel

from retune.config import EmbedderConfig
from retune.model.embedder import Embedder
from retune.model.embedder_families import FAMILIES
from retune.model.known import KNOWN, known
from retune.model.pooling import POOLINGS

CPU = torch.device("cpu")
TEXTS = some_texts(9, longest=12)
# the last part of hub ids → family, pooling
NAMES = {
    "BAAI/bge-base-en-v1.5": ("encoder", "cls"), "BAAI/bge-large-zh": ("encoder", "cls"),
    "thenlper/gte-base": ("encoder", "mean"), "thenlper/gte-large": ("encoder", "mean"),
    "intfloat/e5-base-v2": ("encoder", "mean"), "intfloat/multilingual-e5-large": ("encoder", "mean"),
    "infgrad/stella-base-en-v2": ("encoder", "mean"),
    "sentence-transformers/all-mpnet-base-v2": ("encoder", "mean"),
    "sentence-transformers/all-MiniLM-L6-v2": ("encoder", "mean"), "BAAI/bge-m3": ("m3", "cls"),
    "BAAI/bge-multilingual-gemma2": ("decoder", "last_token"),
    "intfloat/e5-mistral-7b-instruct": ("decoder", "last_token"),
    "Qwen/Qwen3-Embedding-0.6B": ("decoder", "last_token"),
    "Alibaba-NLP/gte-Qwen2-7B-instruct": ("decoder", "last_token"),
    "BAAI/bge-en-icl": ("icl", "last_token"), "nomic-ai/nomic-embed-text-v1.5": ("encoder", "mean"),
    "Alibaba-NLP/gte-modernbert-base": ("encoder", "cls"), "nomic-ai/modernbert-embed-base": ("encoder", "mean"),
}  # fmt: skip


def load(model: Path | str, **settings) -> Embedder:
    return Embedder.load(EmbedderConfig(model=str(model), **settings), target=CPU)


def silent(folder: Path) -> Path:
    """A BERT that says nothing of pooling, prompts or lengths, as one that FlagEmbedding trained."""
    tiny_bert(folder)
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_names_are_known(name, tmp_path):
    row = known(name)
    assert (row.family, row.pooling) == NAMES[name]
    snapshot = f"/cache/hub/models--{name.replace('/', '--')}/snapshots/0123abc"
    assert known(f"/models/{name.split('/')[1]}/") == known(snapshot) == row


def test_rows_are_of_the_tables():
    assert {row.family for row in KNOWN.values()} <= set(FAMILIES)
    assert {row.pooling for row in KNOWN.values()} <= {*POOLINGS, None}
    assert known("my-tuned-model") is None and known("bge-base-en-v1.5-tuned") is None and known("variant:bge") is None


def test_what_is_unsaid_is_filled(tmp_path):
    model = load(silent(tmp_path / "e5-base-v2"))
    assert model.card.pooling == "mean" and model.card.normalize
    expected = load(tmp_path / "e5-base-v2", query_instruction="passage: ").encode_queries(TEXTS)
    np.testing.assert_allclose(model.encode_passages(TEXTS), expected, atol=1e-6)
    assert [model.prompts[kind].prefix() for kind in ("query", "passage")] == ["query: ", "passage: "]
    model.save(tmp_path / "saved")
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(model.encode_queries(TEXTS), theirs.encode_query(TEXTS), atol=1e-5)
    assert load(silent(tmp_path / "bge-small-en-v1.5")).card.pooling == "cls"


def test_what_is_said_holds(tmp_path, caplog):
    folder = tiny_bert(tmp_path / "bge-base-en-v1.5")
    with caplog.at_level(logging.WARNING, "retune"):
        assert load(folder).card.pooling == "mean"
    assert "it says pooling 'mean', but is known for 'cls'; its own word holds" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "retune"):
        asked = load(silent(tmp_path / "gte-base"), pooling="cls", query_instruction="find: ", family="encoder")
    assert asked.card.pooling == "cls" and asked.prompts["query"].prefix() == "find: "
    assert "embedder.pooling: 'cls' is asked for, but the checkpoint says 'mean'" in caplog.text
    said = json.dumps({"prompts": {"query": "ask: "}})
    (tmp_path / "gte-base/config_sentence_transformers.json").write_text(said)
    shutil.copytree(tmp_path / "gte-base", tmp_path / "e5-small")
    assert load(tmp_path / "e5-small").prompts["query"].prefix() == "ask: "
    assert load(tmp_path / "e5-small").prompts["passage"].prefix() == ""


def test_decoders_and_their_formats(tmp_path):
    tiny_decoder(tmp_path / "bge-multilingual-gemma2", "gemma2")
    asked = load(tmp_path / "bge-multilingual-gemma2", query_instruction="Find")
    assert asked.read(["co"], "query") == ["<instruct>Find\n<query>co"]
    own = load(tmp_path / "bge-multilingual-gemma2", query_instruction="Find", query_instruction_format="{}: {}")
    assert own.read(["co"], "query") == ["Find: co"]
    tiny_decoder(tmp_path / "bge-en-icl", "mistral")
    assert load(tmp_path / "bge-en-icl").read(["co"], "query") == ["co\n<response>"]
    assert load(tiny_m3(tmp_path / "bge-m3", colbert_dim=8)).heads is not None


def test_a_decoder_that_looks_both_ways(tmp_path):
    """The first token's state depends on the last; so do the vectors, there and in what is saved."""
    folder = tiny_decoder(tmp_path / "gte-Qwen2-1.5B-instruct", "qwen2")
    shutil.copytree(folder, tmp_path / "plain")
    ours, plain = load(folder), load(tmp_path / "plain", query_instruction_format="Instruct: {}\nQuery: {}")
    ids = ours.tokenize(["bar co di"], "passage").ids.tolist()
    first = [
        [model.backbone(input_ids=torch.tensor([[*ids, last]])).last_hidden_state[0, 0] for last in (40, 41)]
        for model in (ours, plain)
    ]
    assert not torch.allclose(*first[0], atol=1e-4) and torch.allclose(*first[1], atol=1e-6)
    config = AutoConfig.from_pretrained(folder)
    config.is_causal = False
    eager = AutoModel.from_pretrained(folder, config=config, attn_implementation="eager")
    alone = []
    for text in TEXTS:
        ids = torch.tensor([ours.tokenize([text], "passage").ids.tolist()])
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1])  # nothing is hidden
        states = eager(input_ids=ids, attention_mask={"full_attention": mask}).last_hidden_state
        alone.append(torch.nn.functional.normalize(states[0, -1].detach(), dim=-1))
    np.testing.assert_allclose(ours.encode_passages(TEXTS), torch.stack(alone), atol=1e-5)
    ours.save(tmp_path / "saved")
    np.testing.assert_allclose(load(tmp_path / "saved").encode_passages(TEXTS), ours.encode_passages(TEXTS), atol=1e-6)
