"""The trainer of embedder and reranker: transformers' own, with data that needs no state.

Adds what a run must not be silent about (a loss that is not finite) and checkpoints that a killed
process cannot leave half-written: a checkpoint counts once its mark is there, and older ones go
only then.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from retune.data.sampler import GroupSampler
from retune.objective.gather import wait_for_all
from retune.runtime import UserError, log
from retune.training.meter import Meter
from retune.training.tasks import Task
from retune.training.weights import put, whole

MARK, WEIGHTS = "complete", "model.safetensors"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, in the order of their steps."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{MARK}")]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


class GroupTrainer(Trainer):
    """Trains a `Task` on the batches of a loader."""

    def __init__(
        self, task: Task, args: TrainingArguments, batches: DataLoader, sampler: GroupSampler, sources: list[str],
        dev: Callable[[], float] | None = None, patience: int | None = None,
    ) -> None:  # fmt: skip
        self.task, self.batches, self.sources, self.dev = task, batches, sources, dev
        self.keep, args.save_total_limit = args.save_total_limit, None  # see _save_checkpoint
        self.meter = Meter()
        callbacks = [Epochs(sampler), self.meter, *([EarlyStopping(patience)] if patience else [])]
        aside = batches.dataset if dev else None  # transformers wants one; `evaluate` never looks at it
        super().__init__(model=task, args=args, train_dataset=batches.dataset, eval_dataset=aside, callbacks=callbacks)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        return self.batches  # its sampler knows the process's share already

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], **_: Any) -> torch.Tensor:
        queries, n_tokens = inputs.pop("queries"), inputs.pop("n_tokens")
        self.meter.add(len(queries), n_tokens, sum(chunk["input_ids"].numel() for chunk in inputs["chunks"]))
        self.task.step = self.state.global_step
        loss = model(**inputs)
        if not torch.isfinite(loss):
            named = list(dict.fromkeys(self.sources[query] for query in queries.tolist()))
            raise UserError(
                f"training: the loss is {loss.item()} at step {self.state.global_step + 1}; queries of the batch: "
                f"{', '.join(named[:10])}{' …' if len(named) > 10 else ''}; "
                "try a lower learning_rate, or bf16 instead of fp16"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # the mean since the last time, as all that is added here is
            logs |= self._shown()
        super().log(logs, start_time)

    def _shown(self) -> dict[str, float]:
        """Means of what the batches since the last log showed, over all processes."""
        noted = self.task.noted()
        tokens, padded, seconds = self.meter.lap()
        counts = torch.tensor([tokens, padded], dtype=torch.float32, device=self.args.device)
        tokens, padded, *sums = self.accelerator.reduce(torch.cat([counts, *noted.values()]), "sum").tolist()
        pairs = zip(noted, sums[::2], sums[1::2], strict=True)
        shown = {name: total / number for name, total, number in pairs if number}
        return shown | {"tokens_per_second": tokens / seconds, "padding": 1 - tokens / padded}

    # ---- the queries that were set aside ---------------------------------------------------------

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """What the model makes of the queries that were set aside, computed by the first process."""
        value = torch.tensor([self.on_dev()], device=self.args.device)
        shown = {"eval_dev": float(self.accelerator.reduce(value, "sum"))}
        log.info("step %d: %.4f on the queries that were set aside", self.state.global_step, shown["eval_dev"])
        self.log(dict(shown))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, shown)
        return shown

    def on_dev(self) -> float:
        """This process's part of the value: the first has all of it."""
        self.task.eval()
        value = self.dev() if self.is_world_process_zero() else 0.0
        self.task.train()
        return value

    def _load_best_model(self) -> None:
        log.info("the best checkpoint is that of step %d", self.state.best_global_step)
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- checkpoints ----------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        weights = whole(self.task, self.args.device)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(weights, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        put(safetensors.torch.load_file(Path(resume_from_checkpoint) / WEIGHTS), self.task)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        wait_for_all()
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            (folder / f"checkpoint-{self.state.global_step}" / MARK).touch()
            if self.keep:
                best = self.state.best_model_checkpoint
                for old in complete_checkpoints(folder)[: -self.keep]:
                    if best is None or old.name != Path(best).name:
                        (old / MARK).unlink()
                        shutil.rmtree(old)

    def end(self) -> None:
        """Have the task that was given be what it was trained to be, in the first process; here it always is."""


class EarlyStopping(EarlyStoppingCallback):
    """Stops where evaluations get no better; a resumed run counts on from its checkpoint."""

    def on_train_begin(self, args, state, control, **named):
        super().on_train_begin(args, state, control, **named)
        stored = state.stateful_callbacks[type(self).__name__]  # of a run that begins: the count 0 of this very object
        self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]


class Epochs(TrainerCallback):
    """Tells the sampler the epoch; has the loss logged with every checkpoint and at the end.

    The mean that is logged next then starts at the checkpoint, in a resumed run as in any other.
    """

    def __init__(self, sampler: GroupSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **_):
        self.sampler.epoch = int(state.epoch or 0)

    def on_step_end(self, args, state, control, **_):
        control.should_log |= control.should_save or control.should_evaluate or control.should_training_stop

    def on_epoch_end(self, args, state, control, **_):
        control.should_log |= control.should_save
