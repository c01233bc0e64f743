"""A task seen from outside: what trainers read of its model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from tiny import tiny_bert
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from retune.config import EmbedderConfig, TrainConfig
from retune.model import trainable
from retune.objective.recipe import Recipe
from retune.runtime import UserError
from retune.training import partition
from retune.training.arguments import training_arguments
from retune.training.embedding import EmbedderTask
from retune.training.sharded import ShardedTrainer

CPU = torch.device("cpu")


class Read(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
    """transformers' reader of a DeepSpeed config, where DeepSpeed itself need not be installed."""

    def __init__(self, asked: dict) -> None:
        HfDeepSpeedConfig.__init__(self, asked)
        self.mismatches: list[str] = []


@pytest.mark.parametrize("lora", [False, True])
def test_deepspeeds_auto_is_filled_in_from_the_model(tmp_path, lora):
    """The usual ZeRO 2 file says `auto` of the buckets' sizes, which follow from the model's width."""
    model = trainable.load(EmbedderConfig(model=str(tiny_bert(tmp_path / "base"))), TrainConfig(use_lora=lora), 0, CPU)
    asked = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "allgather_bucket_size": 2e8}}
    found = Read(asked)
    task = EmbedderTask(model, Recipe("batch", 0.1))
    found.trainer_config_finalize(training_arguments({}, tmp_path, 0), task, 10)
    assert found.config["zero_optimization"]["reduce_bucket_size"] == model.dim**2


def test_a_trainer_changes_only_a_copy_of_the_models_config(tmp_path):
    """transformers' switches use_cache off in the config it finds, which would be saved with the model."""
    model = trainable.load(EmbedderConfig(model=str(tiny_bert(tmp_path / "base"))), TrainConfig(), 0, CPU)
    task, before = EmbedderTask(model, Recipe("batch", 0.1)), model.backbone.config.to_dict()
    task.config.use_cache = not before.get("use_cache")
    assert task.config.to_dict() == model.backbone.config.to_dict() == before


def test_the_layers_of_a_model_are_known_by_their_class(tmp_path):
    """By which FSDP cuts a model; an encoder's embeddings, of which there is one, are cut apart from its layers."""
    model = trainable.load(EmbedderConfig(model=str(tiny_bert(tmp_path / "base"))), TrainConfig(use_lora=True), 0, CPU)
    assert EmbedderTask(model, Recipe("batch", 0.1))._no_split_modules == ["BertLayer"]


# ---- what is cut up among processes -------------------------------------------------------------


def test_fsdp_takes_several_processes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^train\.args\.fsdp: it takes .* set train\.nproc_per_node, or leave it out$"):
        training_arguments({"fsdp": True}, tmp_path, 0)
    with pytest.raises(UserError, match=r"^reranker\.fit\.args\.fsdp: it takes several processes; leave it out$"):
        training_arguments({"fsdp": True}, tmp_path, 0, section="reranker.fit.args")
    for no in (False, "false", None, ""):
        assert not training_arguments({"fsdp": no, "fsdp_config": {"version": 1}}, tmp_path, 0).fsdp
    monkeypatch.setenv("WORLD_SIZE", "2")
    for yes in (True, "true", "full_shard"):
        partition.check_fsdp({"fsdp": yes}, "train.args")


def test_offloading_is_refused_by_its_older_name(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="cpu_offload: gradients on the CPU"):
        partition.check_fsdp({"fsdp": "full_shard offload"}, "train.args")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": 1}, "version: .* leave it out for version 2"),
        ({"fsdp_version": 1}, "version: "),
        ({"xla": True}, "xla: TPUs"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading: here each process loads the model"),
        ({"fsdp_cpu_ram_efficient_loading": "true"}, "cpu_ram_efficient_loading: "),
        ({"activation_checkpointing": True}, "activation_checkpointing: .* beside fsdp"),
        ({"cpu_offload": True}, "cpu_offload: "),
        ('{"cpu_offload": true}', "cpu_offload: "),
        ('{"cpu_offload"', r"\{.*Expecting ':'"),
        ("nowhere.json", r"nowhere\.json: no such file"),
        ([1], r"expected a JSON object, found \[1\]"),
    ],
)
def test_what_is_not_known_of_fsdp_is_refused(monkeypatch, config, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=rf"^train\.args\.fsdp_config: {message}"):
        partition.check_fsdp({"fsdp": True, "fsdp_config": config}, "train.args")


def test_layers_that_the_model_does_not_have_are_refused(tmp_path):
    model = trainable.load(EmbedderConfig(model=str(tiny_bert(tmp_path / "base"))), TrainConfig(), 0, CPU)
    arguments = SimpleNamespace(fsdp_config={"transformer_layer_cls_to_wrap": ["BertLayer", "GPTBlock"]})
    with pytest.raises(ValueError, match=r"^fsdp_config: .*: the model has no GPTBlock; leave it out for BertLayer$"):
        ShardedTrainer(EmbedderTask(model, Recipe("batch", 0.1)), arguments)
