"""The trainer of embedder and reranker: transformers' own, with data that needs no state.

Adds what a run must not be silent about (a loss that is not finite) and checkpoints that a killed
process cannot leave half-written: a checkpoint counts once its mark is there, and older ones go
only then.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from retune.data.batches import GroupSampler
from retune.objective.gather import wait_for_all
from retune.runtime import UserError, log, progress
from retune.training.tasks import Task

MARK, WEIGHTS = "complete", "model.safetensors"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, in the order of their steps."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{MARK}")]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


class GroupTrainer(Trainer):
    """Trains a `Task` on the batches of a loader."""

    def __init__(
        self, task: Task, args: TrainingArguments, batches: DataLoader, sampler: GroupSampler, sources: list[str]
    ) -> None:
        self.batches, self.sources = batches, sources
        self.keep, args.save_total_limit = args.save_total_limit, None  # see _save_checkpoint
        self.meter = Meter()
        super().__init__(model=task, args=args, train_dataset=batches.dataset, callbacks=[Epochs(sampler), self.meter])
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        return self.batches  # its sampler knows the process's share already

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], **_: Any) -> torch.Tensor:
        queries, n_tokens = inputs.pop("queries"), inputs.pop("n_tokens")
        self.meter.add(len(queries), n_tokens, sum(chunk["input_ids"].numel() for chunk in inputs["chunks"]))
        loss = model(**inputs)
        if not torch.isfinite(loss):
            named = list(dict.fromkeys(self.sources[query] for query in queries.tolist()))
            raise UserError(
                f"training: the loss is {loss.item()} at step {self.state.global_step + 1}; queries of the batch: "
                f"{', '.join(named[:10])}{' …' if len(named) > 10 else ''}; "
                "try a lower learning_rate, or bf16 instead of fp16"
            )
        return loss

    # ---- checkpoints ----------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_model(self.model, str(folder / WEIGHTS))  # knows tied weights

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        safetensors.torch.load_model(model or self.model, str(Path(resume_from_checkpoint) / WEIGHTS))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        wait_for_all()
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            (folder / f"checkpoint-{self.state.global_step}" / MARK).touch()
            if self.keep:
                for old in complete_checkpoints(folder)[: -self.keep]:
                    (old / MARK).unlink()
                    shutil.rmtree(old)


class Epochs(TrainerCallback):
    """Tells the sampler the epoch; has the loss logged with every checkpoint and at the end.

    The mean that is logged next then starts at the checkpoint, in a resumed run as in any other.
    """

    def __init__(self, sampler: GroupSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **_):
        self.sampler.epoch = int(state.epoch or 0)

    def on_step_end(self, args, state, control, **_):
        control.should_log |= control.should_save or control.should_training_stop

    def on_epoch_end(self, args, state, control, **_):
        control.should_log |= control.should_save


class Meter(TrainerCallback):
    """Progress bar, throughput and the share of padding."""

    def __init__(self) -> None:
        self.queries = self.tokens = self.padded = 0

    def add(self, queries: int, tokens: int, padded: int) -> None:
        self.queries, self.tokens, self.padded = self.queries + queries, self.tokens + tokens, self.padded + padded

    def on_train_begin(self, args, state, control, **_):
        self.start, self.bar = time.perf_counter(), None
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = progress(state.max_steps, "train", "step")
            self.bar.update(state.global_step)

    def on_step_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)

    def on_train_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.close()
        if self.padded and state.is_world_process_zero:
            seconds = time.perf_counter() - self.start
            log.info(
                "trained on %d queries in %.1f s: %.1f queries/s, %.0f tokens/s, %.1f%% padding",
                self.queries, seconds, self.queries / seconds, self.tokens / seconds,
                100 * (1 - self.tokens / self.padded),
            )  # fmt: skip
