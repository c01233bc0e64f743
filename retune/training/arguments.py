"""`train.args` → `transformers.TrainingArguments`: retune's defaults, refusals, messages.

Defaults differ from transformers' where users of bi-encoder trainers expect otherwise: learning
rate 1e-5, one epoch, a tenth of the steps to warm up, 32 queries a process (in-batch negatives want
more than 8), one checkpoint kept.  Anything else is transformers' own.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from retune.model.device import best_device, has_bf16
from retune.runtime import UserError, log
from retune.training.launch import under_torchrun

DEFAULTS = {
    "learning_rate": 1e-5,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    "warmup_steps": 0.1,  # below 1: a share of all steps
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": False,
    "ddp_find_unused_parameters": False,  # every weight under training is used in every step
}
REFUSED = {
    "output_dir": "retune decides where checkpoints lie",
    "resume_from_checkpoint": "an interrupted run is resumed by itself",
    "auto_find_batch_size": "in-batch negatives depend on the batch size, so it is never changed",
    "label_smoothing_factor": "the losses here have no labels to smooth",
    "train_sampling_strategy": "retune orders its batches itself",
    "ignore_data_skip": "a resumed run sees the data that the interrupted one would have seen",
    "save_only_model": "a run is resumed from its optimiser's state too",
    "push_to_hub": "push the finished model instead",
    "load_best_model_at_end": "there is no evaluation during training",
    "eval_strategy": "there is no evaluation during training",
    "fsdp": "only data parallel training is known here",
}
"""Arguments that contradict how training works here, and why."""


def training_arguments(
    given: dict[str, Any], checkpoints: Path, seed: int, dtype: str = "auto", section: str = "train.args"
) -> TrainingArguments:
    """TrainingArguments of a run.

    Args:
        given: the user's own, by name.
        checkpoints: where the run's own checkpoints go.
        seed: used where the user gives none.
        dtype: of the model's section; `auto` computes in bfloat16 where the hardware has it.
        section: config key named in messages.

    Raises:
        UserError: for arguments that are unknown, refused or at odds with each other.
    """
    known = {field.name: field.default for field in fields(TrainingArguments)}
    given = dict(given)
    if "warmup_ratio" in given and "warmup_ratio" not in known:  # the same thing until transformers 5
        given["warmup_steps"] = given.pop("warmup_ratio")
    for name, reason in REFUSED.items():
        if name in given and given[name] not in (known[name], None, False, "no"):
            raise UserError(f"{section}.{name}: {reason}; leave it out")
        given.pop(name, None)
    device = best_device()
    chosen = DEFAULTS | {"seed": seed, "remove_unused_columns": False, "logging_nan_inf_filter": False}
    if device.type == "cpu":
        chosen |= {"use_cpu": True} | ({"ddp_backend": "gloo"} if under_torchrun() else {})
    if not given.get("bf16") and not given.get("fp16"):
        chosen["bf16"] = dtype == "bfloat16" or (dtype == "auto" and has_bf16(device))
        chosen["fp16"] = dtype == "float16"
    elif given.get("bf16") and not has_bf16(device):
        log.warning("%s.bf16: this machine has no bfloat16 products, so it will be very slow", section)
    try:
        arguments = TrainingArguments(**chosen | given, output_dir=str(checkpoints))
    except (TypeError, ValueError, ImportError, OSError, NotImplementedError) as error:
        raise UserError(f"{section}: {_first_line(error)}") from None
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are used by several processes, never by DataParallel
    return arguments


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].removeprefix("TrainingArguments.__init__() ")
