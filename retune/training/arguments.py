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
from retune.training import partition
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
}
"""Arguments that contradict how training works here, and why."""


ON_DEV = {
    "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.1, "load_best_model_at_end": True,
    "metric_for_best_model": "dev", "greater_is_better": True,
}  # fmt: skip
"""Defaults where queries were set aside: ten evaluations, and the best checkpoint becomes the model."""


def training_arguments(
    given: dict[str, Any], checkpoints: Path, seed: int, dtype: str = "auto", section: str = "train.args",
    dev: bool = False, patience: int | None = None,
) -> TrainingArguments:  # fmt: skip
    """TrainingArguments of a run.

    Args:
        given: the user's own, by name.
        checkpoints: where the run's own checkpoints go.
        seed: used where the user gives none.
        dtype: of the model's section; `auto` computes in bfloat16 where the hardware has it.
        section: config key named in messages.
        dev: whether there are queries to evaluate on.
        patience: evaluations without a better one after which training stops.

    Raises:
        UserError: for arguments that are unknown, refused or at odds with each other.
    """
    known = {field.name: field.default for field in fields(TrainingArguments)}
    given = {name: _meant(name, value) for name, value in given.items()}
    if "warmup_ratio" in given and "warmup_ratio" not in known:  # the same thing until transformers 5
        given["warmup_steps"] = given.pop("warmup_ratio")
    for name, reason in REFUSED.items():
        if name in given and given[name] not in (known[name], None, False, "no"):
            raise UserError(f"{section}.{name}: {reason}; leave it out")
        given.pop(name, None)
    partition.check_deepspeed(given.get("deepspeed"), section)
    partition.check_fsdp(given, section)
    _check_evaluation(given, section, dev, patience)
    device = best_device()
    chosen = (
        DEFAULTS
        | (_on_dev(given, section) if dev else {})
        | {"seed": seed, "remove_unused_columns": False, "logging_nan_inf_filter": False}
    )
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


def _meant(name: str, value: Any) -> Any:
    """YAML reads a bare `no` as false, and a flag's `true` is read as text; make them what was meant."""
    if value is False and name.endswith("_strategy"):
        return "no"
    words = {"true": True, "false": False}
    return words.get(value.lower(), value) if name == "fsdp" and isinstance(value, str) else value


def _check_evaluation(given: dict[str, Any], section: str, dev: bool, patience: int | None) -> None:
    """Raise a UserError for what evaluations are asked to do where there are none, or for a measure that is not made.

    Its arguments are those of `training_arguments`.
    """
    owner = section.rpartition(".")[0]
    for name in ("eval_strategy", "eval_on_start", "load_best_model_at_end"):
        if not dev and given.get(name) not in (None, False, "no"):
            raise UserError(f"{section}.{name}: there is no evaluation during training; leave it out")
    if patience and not dev:
        raise UserError(
            f"{owner}.early_stopping_patience: no queries are set aside to stop by; set {owner}.dev_queries above 0"
        )
    if patience and given.get("eval_strategy") == "no":
        raise UserError(
            f"{section}.eval_strategy: no leaves {owner}.early_stopping_patience nothing to stop by; leave one out"
        )
    measure = given.get("metric_for_best_model", "dev")
    if dev and measure not in ("dev", "eval_dev"):
        raise UserError(
            f"{section}.metric_for_best_model: expected dev, the one measure on the queries set aside, found {measure}"
        )


def _on_dev(given: dict[str, Any], section: str) -> dict[str, Any]:
    """The defaults of `ON_DEV`, with evaluations where checkpoints are wanted; without these, no best one is kept."""
    if given.get("eval_strategy") == "no":
        log.warning("%s.eval_strategy: no: the queries set aside are not looked at; the last step is kept", section)
        return {}
    saved = given.get("save_strategy", ON_DEV["eval_strategy"])
    own = saved if saved in ("steps", "epoch") else ON_DEV["eval_strategy"]  # no and best are no times to evaluate
    strategy = given.get("eval_strategy", own)
    steps = given.get("eval_steps", given.get("save_steps", ON_DEV["eval_steps"]))
    chosen = ON_DEV | {"eval_strategy": strategy, "save_strategy": strategy, "eval_steps": steps, "save_steps": steps}
    if saved == "no" and given.get("load_best_model_at_end") is None:
        log.warning("%s.save_strategy: no: without checkpoints the last step is kept, not the best one", section)
        chosen["load_best_model_at_end"] = False
    return chosen


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].removeprefix("TrainingArguments.__init__() ")
