"""Adapters of an embedder: trained alone, saved so that everyone loads them, started from, with new tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import WORDS, tiny_bert
from toy import toy_tables

from retune import tables
from retune.config import EmbedderConfig, TrainConfig
from retune.model import adapters, trainable
from retune.model.embedder import Embedder
from retune.model.engine import pad
from retune.model.vocabulary import grow
from retune.objective import gradcache
from retune.runtime import UserError
from retune.stages.train import train
from retune.training.tasks import Task
from retune.training.trainer import GroupTrainer

ARGS = {"learning_rate": 1e-2, "num_train_epochs": 4, "per_device_train_batch_size": 8, "save_steps": 3}
LORA = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8}
TEXTS = [" ".join(WORDS[start : start + 9]) for start in range(0, 54, 6)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "base", dropout=0.0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    return toy_tables(tmp_path_factory.mktemp("tables"))


def run(folder: Path, base: Path, paths: dict[str, Path], args: dict | None = None, embedder=None, **settings) -> Path:
    """Train on 24 queries in batches of 8, 12 steps; returns the folder of the model."""
    settings = {"train_group_size": 3, "temperature": 0.05} | LORA | settings
    train(
        **paths, bins=None, settings=TrainConfig(args=ARGS | (args or {}), **settings), seed=1, drop_longer_than=None,
        embedder=EmbedderConfig(model=str(base), **(embedder or {})), state=folder / "state",
        model_out=folder / "model", history_out=folder / "history.parquet",
    )  # fmt: skip
    return folder / "model"


def losses(model: Path) -> list[float]:
    return tables.read(model.parent / "history.parquet", "history")["loss"].to_pylist()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, paths) -> Path:
    return run(tmp_path_factory.mktemp("trained"), base, paths)


def vectors(model: Path | str, **settings) -> np.ndarray:
    return Embedder.load(EmbedderConfig(model=str(model), **settings)).encode_passages(TEXTS)


def by_peft(base: Path, folder: Path) -> np.ndarray:
    """Mean-pooled and normalised by hand, of the base with the adapters put on it by peft."""
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(folder)
    grow(model, 69, len(tokenizer))
    wrapped = PeftModel.from_pretrained(model, str(folder)).eval()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = wrapped(**inputs).last_hidden_state  # [n, L, D]
    mask = inputs["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()


# ---- what is saved ------------------------------------------------------------------------------


def test_only_adapters_are_trained_and_folded_into_a_plain_checkpoint(trained, base):
    before, after = load_file(base / "model.safetensors"), load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if name.startswith("encoder.") and before[name].dim() == 2}
    assert changed == linear, "every linear layer, and nothing else: no pooler, no embeddings, no norms"
    assert losses(trained)[-1] < 0.7 * losses(trained)[0]
    for name in sorted(linear)[:3]:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), atol=1e-4) <= 4


def test_the_model_and_its_adapters_load_everywhere(trained, base):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    ours = vectors(trained)
    assert np.abs(ours - vectors(base)).max() > 0.01
    np.testing.assert_allclose(SentenceTransformer(str(trained), device="cpu").encode(TEXTS), ours, atol=1e-5)
    assert not [name for name in AutoModel.from_pretrained(trained).state_dict() if "lora" in name]
    np.testing.assert_allclose(by_peft(base, trained / "adapter"), ours, atol=1e-5)
    np.testing.assert_allclose(vectors(base, peft_path=str(trained / "adapter")), ours, atol=1e-5)
    said = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(base) and said["r"] == 4 and said["lora_alpha"] == 8


def test_adapters_alone_are_a_model_too(trained, base, paths, tmp_path):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    alone = run(tmp_path, base, paths, save_merged_lora_model=False)
    assert [path.name for path in alone.glob("*.safetensors")] == ["adapter_model.safetensors"]
    np.testing.assert_allclose(vectors(alone), vectors(trained), atol=1e-5)
    np.testing.assert_allclose(SentenceTransformer(str(alone), device="cpu").encode(TEXTS), vectors(trained), atol=1e-5)
    assert [name for name in AutoModel.from_pretrained(alone).state_dict() if "lora" in name]


# ---- in training --------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_from_what_is_trained_alone(trained, base, paths, tmp_path, monkeypatch):
    plain = GroupTrainer.compute_loss

    def until_step_8(self, *given, **named):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return plain(self, *given, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GroupTrainer, "compute_loss", until_step_8)
        run(tmp_path, base, paths)
    held = load_file(tmp_path / "state" / "checkpoints" / "checkpoint-6" / "model.safetensors")
    assert held and all("lora_" in name for name in held)
    again = run(tmp_path, base, paths)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (again / file).read_bytes() == (trained / file).read_bytes()
    assert losses(again) == losses(trained)


def test_two_processes_equal_one_with_the_doubled_batch(base, paths, tmp_path):
    common = {"negatives_cross_device": True, "lora_dropout": 0.0, "modules_to_save": "word_embeddings"}
    args = {"logging_steps": 1, "num_train_epochs": 1}
    two = run(
        tmp_path / "two", base, paths, args | {"per_device_train_batch_size": 4}, nproc_per_node=2,
        additional_special_tokens=["<q>"], **common,
    )  # fmt: skip
    one = run(tmp_path / "one", base, paths, args, additional_special_tokens=["<q>"], **common)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)
    for name, weight in load_file(one / "adapter" / "adapter_model.safetensors").items():
        found = load_file(two / "adapter" / "adapter_model.safetensors")[name]
        torch.testing.assert_close(found, weight, atol=2e-3, rtol=0, msg=name)  # Adam turns rounding into steps
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


def wrapped(base: Path, dropout: float = 0.0, **settings) -> Embedder:
    """A model as training loads it, with adapters that do something already."""
    training = TrainConfig(**LORA | {"lora_dropout": dropout, "dropout": dropout} | settings)
    model = trainable.load(EmbedderConfig(model=str(base)), training, seed=3).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(len(name)))  # zero at first
    return model


def gradients(model: Embedder, keep: int | None) -> dict[str, torch.Tensor]:
    tokens = model.tokenize(TEXTS, "passage")
    chunks = [pad(tokens, np.arange(start, start + 3), model.pad_token_id) for start in (0, 3, 6)]
    torch.manual_seed(5)
    out = torch.cat(gradcache.outputs(model, chunks, keep))
    (out @ out.T).tril(-1).square().sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("lora", [True, False], ids=["adapters", "all weights"])
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradcache_and_gradient_checkpointing_change_no_gradient(base, options, lora):
    """With dropout on; under adapters the embedding layer is frozen, so that no gradient comes in from below."""
    settings = {"dropout": 0.3, "use_lora": lora}
    plain = gradients(wrapped(base, **settings), None)
    moved = {name for name, grad in plain.items() if grad is not None and grad.norm() > 0}
    assert moved and moved == {name for name in plain if "lora_" in name} if lora else len(moved) > 30
    model = wrapped(base, **settings)
    if options:
        Task(model).activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        assert model.backbone.is_gradient_checkpointing
    cached = gradients(model, 0)
    for name, grad in plain.items():
        torch.testing.assert_close(cached[name], grad, atol=1e-6, rtol=1e-6)


def test_the_same_seed_gives_the_same_adapters(base):
    first, again = (
        trainable.load(EmbedderConfig(model=str(base)), TrainConfig(**LORA), seed).state_dict() for seed in (1, 1)
    )
    other = trainable.load(EmbedderConfig(model=str(base)), TrainConfig(**LORA), 2).state_dict()
    drawn = [name for name in first if "lora_A" in name]
    assert drawn and all(torch.equal(first[name], again[name]) for name in drawn)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_chosen_layers_and_modules(base):
    model = wrapped(base, target_modules=["query", "dense"], modules_to_save=["LayerNorm"])
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    with_adapters = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names if "lora_" in name}
    assert with_adapters == {"query", "dense"} and not [name for name in names if "pooler" in name]
    assert all("lora_" in name or "LayerNorm.modules_to_save" in name for name in names)
    assert [name for name in names if "LayerNorm.modules_to_save" in name]


# ---- started from -------------------------------------------------------------------------------


def test_adapters_are_trained_further(trained, base, paths, tmp_path):
    start = str(trained / "adapter")
    args = {"max_steps": 1, "learning_rate": 1e-4}
    model = run(tmp_path, base, paths, args, {"peft_path": start}, continue_adapters=True, lora_rank=7)
    before, after = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (start, model / "adapter"))
    assert before.keys() == after.keys()
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < moved < 1.1e-4, "one step of Adam from where they were, with their own rank"
    np.testing.assert_allclose(vectors(base, peft_path=str(model / "adapter")), vectors(model), atol=1e-5)


def test_adapters_of_a_pooler_that_nothing_goes_through_stay_as_they_are(base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    config = LoraConfig(r=2, target_modules=["dense"], task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(base), config).save_pretrained(tmp_path)
    settings = EmbedderConfig(model=str(base), peft_path=str(tmp_path))
    model = trainable.load(settings, TrainConfig(use_lora=True, continue_adapters=True), seed=0)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert names and all("dense.lora_" in name and "pooler" not in name for name in names)


@pytest.mark.parametrize("use_lora", [True, False])
def test_folded_adapters_are_where_training_starts(trained, base, paths, tmp_path, use_lora, caplog):
    args = {"max_steps": 1, "learning_rate": 1e-6}
    settings = {"use_lora": use_lora}
    with caplog.at_level(logging.WARNING, "retune"):
        model = run(tmp_path, base, paths, args, {"peft_path": str(trained / "adapter")}, **settings)
    assert (model / "adapter").exists() == use_lora == ("folded in, not for it alone" in caplog.text)
    near, far = np.abs(vectors(model) - vectors(trained)).max(), np.abs(vectors(model) - vectors(base)).max()
    assert 0 < near < 1e-3 < far


def test_the_content_of_the_adapters_decides_whether_a_run_is_the_same(trained, base, paths, tmp_path, monkeypatch):
    """Checkpoints of a run that started from other adapters in the same folder are not used."""
    own = tmp_path / "own"
    own.mkdir()
    for file in (trained / "adapter").iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Embedder, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(tmp_path, base, paths, {"max_steps": 3}, {"peft_path": str(own)})
    assert list((tmp_path / "state" / "checkpoints").glob("checkpoint-3"))
    held = load_file(own / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file({name: 2 * weight for name, weight in held.items()}, own / "adapter_model.safetensors")
    steps, plain = [], GroupTrainer.compute_loss
    monkeypatch.setattr(
        GroupTrainer, "compute_loss", lambda self, *given, **named: (steps.append(1), plain(self, *given, **named))[1]
    )
    run(tmp_path, base, paths, {"max_steps": 3}, {"peft_path": str(own)})
    assert len(steps) == 3


# ---- new tokens ---------------------------------------------------------------------------------


def test_new_tokens_start_as_the_mean_and_are_never_split(base, caplog):
    settings = TrainConfig(use_lora=True, additional_special_tokens=["<bar st>", WORDS[0], "<p>"])
    with caplog.at_level(logging.WARNING, "retune"):
        model = trainable.load(EmbedderConfig(model=str(base)), settings, seed=0)
    assert "their vectors stay the mean of all others" in caplog.text and "train.modules_to_save" in caplog.text
    rows = model.backbone.get_input_embeddings().weight
    assert rows.shape == (71, 32)
    expected = load_file(base / "model.safetensors")
    mean = expected["embeddings.word_embeddings.weight"].double().mean(0).float()
    torch.testing.assert_close(rows[69:], mean.expand(2, -1), atol=0, rtol=0)
    ids = model.tokenize([f"{WORDS[1]} <bar st>{WORDS[2]}"], "passage").ids.tolist()
    assert ids == [2, 6, 69, 7, 3]


def test_new_tokens_are_trained_with_their_layer(base, paths, tmp_path, caplog):
    """The saved adapters hold the layer, and on their base they make the same model again."""
    settings = {"additional_special_tokens": ["<q>"], "modules_to_save": ["word_embeddings"]}
    with caplog.at_level(logging.WARNING, "retune"):
        model = run(tmp_path, base, paths, embedder={"passage_instruction": "<q>"}, **settings)
    assert "stay the mean" not in caplog.text
    before = load_file(base / "model.safetensors")["embeddings.word_embeddings.weight"]
    after = load_file(model / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert after.shape == (70, 32) and (after[69] - before.mean(0)).abs().max() > 1e-3
    texts = [f"<q> {text}" for text in TEXTS]
    merged = Embedder.load(str(model)).encode_queries(texts)
    on_base = Embedder.load(EmbedderConfig(model=str(base), peft_path=str(model / "adapter")))
    np.testing.assert_allclose(on_base.encode_queries(texts), merged, atol=1e-5)
    further = run(
        tmp_path / "more", base, paths, {"max_steps": 1, "learning_rate": 1e-6},
        {"peft_path": str(model / "adapter")}, continue_adapters=True, additional_special_tokens=["<q>"],
    )  # fmt: skip
    np.testing.assert_allclose(Embedder.load(str(further)).encode_queries(texts), merged, atol=1e-3)


def test_untrained_rows_are_made_again_from_the_base(base, paths, tmp_path):
    model = run(tmp_path, base, paths, additional_special_tokens=["<q>", "<p>"])
    texts = [f"<p> {text}" for text in TEXTS]
    on_base = Embedder.load(EmbedderConfig(model=str(base), peft_path=str(model / "adapter")))
    np.testing.assert_allclose(
        on_base.encode_queries(texts), Embedder.load(str(model)).encode_queries(texts), atol=1e-5
    )


def test_all_weights_train_new_tokens_too(base, paths, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "retune"):
        model = run(
            tmp_path, base, paths, {"learning_rate": 1e-3}, {"query_instruction": "<q>"}, use_lora=False,
            additional_special_tokens="<q>",
        )  # fmt: skip
    assert "stay the mean" not in caplog.text and not (model / "adapter").exists()
    before = load_file(base / "model.safetensors")["embeddings.word_embeddings.weight"]
    after = load_file(model / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert (after[69] - before.mean(0)).abs().max() > 1e-3


def test_rows_that_a_checkpoint_has_to_spare_are_used(base):
    model = Embedder.load(str(base)).backbone
    model.resize_token_embeddings(80, mean_resizing=False)
    grow(model, 69, 72)
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == 80
    torch.testing.assert_close(rows[69:72], rows[:69].double().mean(0).float().expand(3, -1))


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("embedder", "settings", "message"),
    [
        ({}, {"target_modules": ["q_proj", "up"]},
         r"^train\.target_modules: the model has no q_proj or up; its linear layers: query, key, value, dense$"),
        ({}, {"modules_to_save": ["wte"]}, r"^train\.modules_to_save: the model has no module named 'wte'"),
        ({}, {"continue_adapters": True}, r"^train\.continue_adapters: expected embedder\.peft_path"),
        ({"peft_path": "ADAPTER"}, {"save_merged_lora_model": False},
         r"^train\.save_merged_lora_model: false would save adapters for a model into which"),
        ({"peft_path": "ADAPTER"}, {"continue_adapters": True, "additional_special_tokens": ["<q>"]},
         r"^train\.additional_special_tokens: 1 of them are new to the adapters"),
        ({"peft_path": "./nothing"}, {}, r"^embedder\.peft_path: \./nothing: no adapters there"),
    ],
)  # fmt: skip
def test_mistakes(trained, base, embedder, settings, message):
    embedder = {key: str(trained / "adapter") if value == "ADAPTER" else value for key, value in embedder.items()}
    with pytest.raises(UserError, match=message):
        trainable.load(EmbedderConfig(model=str(base), **embedder), TrainConfig(**LORA | settings), seed=0)


def test_adapters_of_another_model(trained, tmp_path):
    other = tiny_bert(tmp_path / "other", hidden=48)
    for continued in (False, True):
        with pytest.raises(UserError, match=r"embedder\.peft_path: "):
            trainable.load(
                EmbedderConfig(model=str(other), peft_path=str(trained / "adapter")),
                TrainConfig(use_lora=True, continue_adapters=continued), seed=0,
            )  # fmt: skip


def test_adapters_alone_name_their_base(trained, base, tmp_path):
    for file in (trained / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(UserError, match=r"embedder\.pooling"):  # they say nothing of it
        vectors(tmp_path)
    np.testing.assert_allclose(vectors(tmp_path, pooling="mean"), vectors(trained), atol=1e-5)
    with pytest.raises(UserError, match="needs a base that is no adapters itself"):
        trainable.load(
            EmbedderConfig(model=str(tmp_path), pooling="mean"),
            TrainConfig(use_lora=True, save_merged_lora_model=False), seed=0,
        )  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base model"):
        vectors(tmp_path, pooling="mean")


def test_a_run_that_leaves_the_adapters_unchanged_fails(base, paths, tmp_path):
    with pytest.raises(UserError, match="left every weight as it was"):
        run(tmp_path, base, paths, {"learning_rate": 0.0})


def test_what_is_not_wrapped_is_unwrapped_to_itself(base):
    model = Embedder.load(str(base)).backbone
    assert adapters.unwrap(model) is model and not adapters.is_wrapped(model)
