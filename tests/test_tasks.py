"""A task seen from outside: what trainers read of its model."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from tiny import tiny_bert
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from retune.config import EmbedderConfig, TrainConfig
from retune.model import trainable
from retune.objective.recipe import Recipe
from retune.runtime import UserError
from retune.training.arguments import training_arguments
from retune.training.embedding import EmbedderTask

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


@pytest.mark.parametrize("asked", [True, "full_shard", "shard_grad_op auto_wrap"])
def test_fsdp_is_refused_with_its_reason(tmp_path, asked):
    with pytest.raises(UserError, match=r"^train\.args\.fsdp: .*DeepSpeed.*stage 1 or 2.*; leave it out$"):
        training_arguments({"fsdp": asked}, tmp_path, 0)
    assert not training_arguments({"fsdp": False}, tmp_path, 0).fsdp
