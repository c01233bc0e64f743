"""Training with weights that are cut up among the processes: FSDP (torch's `fully_shard`; arXiv:2304.11277).

A process has but a part of every weight, and sees them in full only while a layer runs, which takes all processes (or
while a chunk is recomputed: torch lets a layer's weights go after its own backward pass).
So what is trained is a copy, and the first process keeps the model whole beside it: to search the queries that were set
aside, and to be saved.  Checkpoints have the weights whole too; how the optimiser's state is stored is up to
`fsdp_config`.

transformers and accelerate cut the model and its optimiser, and on GPUs only: on CPUs the same trainer works as
DistributedDataParallel does.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from retune.objective.gather import world
from retune.training.tasks import Task
from retune.training.trainer import GroupTrainer
from retune.training.weights import CPU, put, whole


class ShardedTrainer(GroupTrainer):
    """A GroupTrainer under FSDP.

    Attributes:
        given: the task that was given; in the first process it is what `bring_home` made it.
    """

    def __init__(self, task: Task, args: TrainingArguments, *more: Any, **named: Any) -> None:
        _check_layers(task, args.fsdp_config.get("transformer_layer_cls_to_wrap") or [])
        self.given, first = task, world()[0] == 0
        trained = deepcopy(task.to(CPU)) if first else task  # cut where it lies; the first GPU has no room for two
        trained.in_step = True
        super().__init__(trained, args, *more, **named)
        if self.is_fsdp_enabled:
            _let_us_choose_precision(self.accelerator.state.fsdp_plugin)

    def bring_home(self) -> None:
        """Have the weights as they are now in `given`, in the first process; all must call it."""
        weights = whole(self.task, self.args.device)
        if self.is_world_process_zero():
            put(weights, self.given)

    def on_dev(self) -> float:
        self.bring_home()
        if not self.is_world_process_zero():
            return 0.0
        self.given.to(self.args.device).eval()
        try:
            return self.dev()
        finally:
            self.given.to(CPU)

    def end(self) -> None:
        self.bring_home()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin  # transformers would write the weights once more
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.task, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)


def _check_layers(task: Task, named: list[str]) -> None:
    """Raise a ValueError for classes of layers that the model does not have."""
    missing = sorted(set(named) - {type(module).__name__ for module in task.modules()})
    if missing:
        raise ValueError(
            f"fsdp_config: transformer_layer_cls_to_wrap: the model has no {', '.join(missing)}; leave it out for "
            f"{', '.join(task._no_split_modules) or 'the model as one'}"
        )


def _let_us_choose_precision(plugin: Any) -> None:
    """Layers compute in 16 bits where that is asked for; processes add up gradients, and scores are made, in 32.

    What a layer is given stays as it is, teacher scores among it: its weights decide what it computes in.  (A process
    adds up the gradients that chunks give its embeddings in 16 bits, as FSDP has it.)
    """
    if plugin.mixed_precision_policy is not None:
        chosen = {"reduce_dtype": torch.float32, "output_dtype": None, "cast_forward_inputs": False}
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **chosen)
