"""What merging does beside a model's own tensors: heads, modules, tied output heads, rerankers, tokenizers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_bert, tiny_decoder, tiny_reranker
from transformers import AutoModelForCausalLM

from retune.model import checkpoint
from retune.model.embedder import Embedder
from retune.model.mixture import mix
from retune.model.reranker import Reranker
from retune.runtime import UserError


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def change(folder: Path, by) -> None:
    tensors = state(folder)
    by(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def heads(folder: Path, seed: int, dtype=torch.float32, colbert: bool = True) -> Path:
    """BGE-M3's heads, as its checkpoints hold them."""
    torch.manual_seed(seed)
    torch.save(torch.nn.Linear(32, 1).to(dtype).state_dict(), folder / "sparse_linear.pt")
    if colbert:
        torch.save(torch.nn.Linear(32, 16).to(dtype).state_dict(), folder / "colbert_linear.pt")
    return folder


@pytest.fixture
def pair(tmp_path):
    return tiny_bert(tmp_path / "a", 1), tiny_bert(tmp_path / "b", 2)


# ---- heads and modules --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_heads_are_merged(pair, tmp_path, dtype):
    for seed, folder in enumerate(pair):
        heads(folder, seed, dtype)
    mix(pair, [0.25, 0.75], tmp_path / "out")
    for file in ("sparse_linear.pt", "colbert_linear.pt"):
        one, two, found = (torch.load(folder / file) for folder in (*pair, tmp_path / "out"))
        assert found.keys() == one.keys() == {"weight", "bias"}
        for name, tensor in found.items():
            assert tensor.dtype == dtype and tensor.shape == one[name].shape
            exact = 0.25 * one[name].double() + 0.75 * two[name].double()
            assert torch.allclose(tensor.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    before = (tmp_path / "out/colbert_linear.pt").read_bytes()
    mix(pair, [0.25, 0.75], tmp_path / "out")
    assert (tmp_path / "out/colbert_linear.pt").read_bytes() == before


def test_heads_of_a_model_with_itself_are_its_own(pair, tmp_path):
    heads(pair[0], 3)
    mix([pair[0], pair[0]], [0.3, 0.7], tmp_path / "out")
    one, found = (torch.load(folder / "colbert_linear.pt") for folder in (pair[0], tmp_path / "out"))
    assert all(torch.equal(one[name], found[name]) for name in one)


def test_heads_of_another_shape_or_none_are_told_with_everything_else(pair, tmp_path):
    heads(pair[0], 1, colbert=False)
    heads(pair[1], 2)
    change(pair[0], lambda tensors: tensors.pop("encoder.layer.0.output.dense.bias"))
    with pytest.raises(UserError) as error:
        mix(pair, [0.5, 0.5], tmp_path / "out")
    assert "3 differences" in str(error.value) and "colbert_linear.pt: weight: not in" in str(error.value)
    torch.save(torch.nn.Linear(32, 8).state_dict(), pair[0] / "colbert_linear.pt")
    with pytest.raises(UserError, match=r"colbert_linear\.pt: weight: \[8, 32\] in \S+a, \[16, 32\] in \S+b"):
        mix(pair, [0.5, 0.5], tmp_path / "out")


def test_heads_that_the_tuned_model_lacks_are_left_out_and_told(pair, tmp_path, caplog):
    heads(pair[0], 1)
    mix(pair, [0.5, 0.5], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.pt"))
    assert "left out" in caplog.text and "sparse_linear.pt, colbert_linear.pt" in caplog.text


def dense(folder: Path, seed: int | None, module: str = "2_Dense") -> Path:
    """A Dense module of sentence-transformers; without a seed one that keeps the first 16 dimensions."""
    (folder / module).mkdir()
    torch.manual_seed(seed or 0)
    weights = {"linear.weight": torch.eye(16, 32)} if seed is None else {"linear.weight": torch.randn(16, 32)}
    save_file(weights, folder / module / "model.safetensors")
    config = {"in_features": 32, "out_features": 16, "bias": False, "activation_function": "torch.nn.Identity"}
    (folder / module / "config.json").write_text(json.dumps(config))
    entries = json.loads((folder / "modules.json").read_text())
    entries.insert(2, {"idx": 2, "name": "2", "path": module, "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(entries))
    return folder


def test_modules_with_weights_are_merged(pair, tmp_path):
    for seed, folder in enumerate(pair, 1):
        dense(folder, seed)
    mix(pair, [0.5, 0.5], tmp_path / "out")
    one, two, found = (
        load_file(folder / "2_Dense/model.safetensors")["linear.weight"] for folder in (*pair, tmp_path / "out")
    )
    assert torch.equal(found, (0.5 * one.double() + 0.5 * two.double()).float())


def test_a_truncated_model_is_merged_with_its_whole_base(pair, tmp_path):
    dense(pair[1], None)
    mix(pair, [0.5, 0.5], tmp_path / "out")
    assert Embedder.load(tmp_path / "out").encode_passages(["ba co"]).shape == (1, 16)
    shutil.rmtree(pair[1] / "2_Dense")
    (pair[1] / "modules.json").write_text((pair[0] / "modules.json").read_text())
    dense(pair[1], 5)  # one that holds what was learnt cannot come from nowhere
    with pytest.raises(UserError, match=r"2_Dense/model\.safetensors: linear\.weight: not in"):
        mix(pair, [0.5, 0.5], tmp_path / "out")


# ---- decoders and rerankers ---------------------------------------------------------------------


def sharded(folder: Path) -> Path:
    """The same language model in many files."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize(("kind", "ties"), [("llama", False), ("gemma2", True), ("qwen3", True)])
def test_sharded_decoders_with_tied_and_untied_heads(tmp_path, kind, ties):
    a, b = (tiny_decoder(tmp_path / str(i), kind, i, tie_word_embeddings=ties) for i in (1, 2))
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (a, b))
    mix([sharded(a), sharded(b)], [0.7, 0.3], tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == ties
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, (0.7 * one[name].double() + 0.3 * two[name].double()).float()), name
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()


def test_a_copy_of_the_embeddings_as_head_is_no_difference(tmp_path):
    a, b = (tiny_decoder(tmp_path / str(i), "gemma2", i, tie_word_embeddings=True) for i in (1, 2))
    mix([a, b], [0.5, 0.5], tmp_path / "plain")
    change(b, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    for models in ([a, b], [b, a]):
        mix(models, [0.5, 0.5], tmp_path / "out")
        assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    change(b, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"lm_head\.weight: not in \S*1"):
        mix([a, b], [0.5, 0.5], tmp_path / "out")


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_rerankers(tmp_path, kind):
    a, b = (tiny_reranker(tmp_path / str(i), i, kind) for i in (1, 2))
    mix([a, b], [0.5, 0.5], tmp_path / "out")
    one, two, found = (state(folder) for folder in (a, b, tmp_path / "out"))
    assert found.keys() == one.keys() and any(name.startswith("classifier") for name in found)
    assert all(torch.equal(found[name], 0.5 * one[name] + 0.5 * two[name]) for name in one)
    assert np.isfinite(Reranker.load(tmp_path / "out").score([("bar", "cost din")])).all()
    mix([a, b], [1, 0], tmp_path / "first")
    assert (tmp_path / "first/model.safetensors").read_bytes() == (a / "model.safetensors").read_bytes()


def test_the_pooler_of_a_classifier_is_not_optional(tmp_path):
    a, b = (tiny_reranker(tmp_path / str(i), i, "bert") for i in (1, 2))
    change(a, lambda tensors: tensors.pop("bert.pooler.dense.weight"))
    with pytest.raises(UserError, match=r"bert\.pooler\.dense\.weight: not in"):
        mix([a, b], [0.5, 0.5], tmp_path / "out")


# ---- the donor, and tokenizers ------------------------------------------------------------------


@pytest.mark.parametrize(("donor", "expected"), [(None, "b"), (0, "a"), (1, "b")])
def test_the_donor_gives_what_is_no_weight(pair, tmp_path, donor, expected):
    for folder in pair:
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": folder.name}}))
    mix(pair, [0.5, 0.5], tmp_path / "out", donor=donor)
    assert checkpoint.card(tmp_path / "out").prompts == {"query": expected}
    for file in ("tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / expected / file).read_bytes()


def test_tokenizers_that_mean_other_words_are_told(pair, tmp_path, caplog):
    mix(pair, [0.5, 0.5], tmp_path / "out")
    assert "tokenizers differ" not in caplog.text
    said = json.loads((pair[0] / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    vocabulary["bar"], vocabulary["cost"] = vocabulary["cost"], vocabulary["bar"]
    (pair[0] / "tokenizer.json").write_text(json.dumps(said))
    mix(pair, [0.5, 0.5], tmp_path / "out")
    assert "their tokenizers differ in 2 tokens, such as" in caplog.text
