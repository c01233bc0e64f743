"""One run of training, from start or from where it was interrupted, to a model in its place.

An interrupted run continues from its last complete checkpoint under `state`, as if nothing had
happened; checkpoints of another run (other settings or data) are thrown away.  The finished model
appears in one rename; `state` goes last.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerState

from retune import tables
from retune.data.batches import EmbedderCollate, GroupDataset, RerankerCollate, loader
from retune.data.sampler import GroupSampler, Kind, Order
from retune.objective.gather import leave, wait_for_all, world
from retune.runtime import UserError, atomic, log
from retune.training.arguments import TrainingArguments
from retune.training.sharded import ShardedTrainer
from retune.training.tasks import Task
from retune.training.trainer import GroupTrainer, complete_checkpoints


@dataclass(frozen=True)
class Outputs:
    """Where a run keeps its state, and where its model and history go."""

    state: Path
    model: Path
    history: Path

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"


def claim(state: Path, key: str) -> None:
    """Make `state` this run's: another run's checkpoints are removed."""
    mark = state / "run"
    if world()[0] == 0:
        another = not mark.is_file() or mark.read_text() != key
        if another and (state / "checkpoints").exists():
            log.info("%s: checkpoints of another run are removed", state)
            shutil.rmtree(state / "checkpoints")
        state.mkdir(parents=True, exist_ok=True)
        mark.write_text(key)
    wait_for_all()


def run(
    task: Task, arguments: TrainingArguments, dataset: GroupDataset, collate: EmbedderCollate | RerankerCollate,
    outputs: Outputs, save: Callable[[Path], None], section: str = "train.args", dev: Callable[[], float] | None = None,
    patience: int | None = None, order: Order | None = None,
) -> None:  # fmt: skip
    """Train `task`, then put the model and its history in their places.

    Args:
        save: writes the model into a folder.
        section: config key named in messages.
        dev: how good the model is on queries that were set aside; the best checkpoint becomes the model.
        patience: stop after so many evaluations without a better one.
        order: which queries may share a batch; any of them where not given.

    Raises:
        UserError: if the loss or a weight is not finite, no batch is full, or no weight has changed.
    """
    rank, size = world()
    order = order or Order([Kind(np.arange(len(dataset)), arguments.per_device_train_batch_size)])
    sampler = GroupSampler(order, dataset.seed, arguments.dataloader_drop_last, rank, size)
    if not len(sampler):
        raise UserError(
            f"{section}: {len(dataset)} training queries do not fill one batch of "
            f"{arguments.per_device_train_batch_size} × {size} processes; lower per_device_train_batch_size"
        )
    _warm_up(arguments, len(sampler))
    pin = arguments.device.type == "cuda" and arguments.dataloader_pin_memory
    batches = loader(
        dataset, sampler, collate, arguments.dataloader_num_workers, pin, arguments.dataloader_prefetch_factor,
        arguments.dataloader_persistent_workers,
    )  # fmt: skip
    try:
        kind = ShardedTrainer if arguments.fsdp else GroupTrainer
        trainer = kind(task, arguments, batches, sampler, dataset.train_set.sources, dev, patience)
    except (ValueError, ImportError) as error:
        raise UserError(f"{section}: {str(error).strip().splitlines()[0]}") from None
    before = weight_sums(task)
    state = _train(trainer, outputs.checkpoints)
    trainer.end()
    wait_for_all()  # others may still be reading what the first is about to remove
    if rank == 0 or not arguments.fsdp:
        _check_weights(before, weight_sums(task), section)
    if rank == 0:
        write_history(outputs.history, state)
        with atomic(outputs.model) as folder:
            save(folder)
        shutil.rmtree(outputs.state)
    del trainer
    leave()


def _warm_up(arguments: TrainingArguments, batches: int) -> None:
    """Round a share of warm-up steps down: rounded up, the only step of a short run would have a learning rate of 0."""
    if 0 < arguments.warmup_steps < 1:
        an_epoch = -(-batches // arguments.gradient_accumulation_steps)
        steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * an_epoch)
        arguments.warmup_steps = int(arguments.warmup_steps * steps)


def _train(trainer: GroupTrainer, checkpoints: Path) -> TrainerState:
    """Train from the last complete checkpoint, if there is one; returns the final state."""
    found = complete_checkpoints(checkpoints)
    if not found:
        trainer.train()
        return trainer.state
    state = TrainerState.load_from_json(str(found[-1] / "trainer_state.json"))
    if _ended(state):
        best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        trainer._load_from_checkpoint(best or str(found[-1]))
        return state
    log.info("going on from step %d of %d", state.global_step, state.max_steps)
    trainer.args.eval_on_start = False  # it is no start, and early stopping would count it
    trainer.train(resume_from_checkpoint=str(found[-1]))
    return trainer.state


def _ended(state: TrainerState) -> bool:
    """Whether a checkpoint is the run's last: of its last step, or of the evaluation that stopped it."""
    told = state.stateful_callbacks["TrainerControl"]["args"]
    return state.global_step >= state.max_steps or told["should_training_stop"]


@torch.no_grad()
def weight_sums(task: Task) -> list[tuple[float, float]]:
    """Sum and norm of each weight under training: enough to tell whether any has changed."""
    return [
        (weight.sum(dtype=torch.float64).item(), weight.norm(dtype=torch.float64).item())
        for weight in task.parameters()
        if weight.requires_grad
    ]


def _check_weights(before: list[tuple[float, float]], after: list[tuple[float, float]], section: str) -> None:
    if before == after:
        raise UserError(
            f"training left every weight as it was; see {section}: learning_rate, warmup_steps, max_steps, fp16"
        )
    if any(total != total or abs(total) == float("inf") for pair in after for total in pair):
        raise UserError("training ended with weights that are not finite; try a lower learning_rate, or bf16")


def write_history(path: Path, state: TrainerState) -> None:
    """The logged steps of a run as the table `history`."""
    rows = [entry for entry in state.log_history if "loss" in entry]
    dev = {entry["step"]: entry["eval_dev"] for entry in state.log_history if "eval_dev" in entry}
    columns = [name for name in tables.TABLES["history"].names if name != "dev"]
    found = {name: [row.get(name) for row in rows] for name in columns}
    tables.write(path, "history", found | {"dev": [dev.get(row["step"]) for row in rows]})
