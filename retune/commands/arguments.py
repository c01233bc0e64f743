"""Flags of transformers.TrainingArguments, by their own names.

The usual ones are named here, with the defaults that hold in retune, so that `--help` is there at once;
all others are read from the class itself.  Knows nothing of what training does with them.
"""

from __future__ import annotations

import argparse
import json
import types
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from retune.commands.flags import Flag, Given
from retune.runtime import log

GROUP = "transformers.TrainingArguments (any other of them by its name)"
KEY = "train.args"
# Those that have flags of their own, and one that is no text.
LEFT_OUT = {"output_dir", "seed", "parallelism_config"}


def _flag(name: str, help: str, kind: str = "value", convert: Callable[[str], Any] | None = None, **more: Any) -> Flag:
    return Flag((name,), help, f"{KEY}.{name}", kind, convert=convert, group=GROUP, **more)


USUAL = [
    _flag("learning_rate", "Its highest value.", convert=float, shown="1e-05"),
    _flag("num_train_epochs", "Passes over the data.", convert=float, shown="1"),
    _flag("max_steps", "Steps, whatever the epochs.", convert=int),
    _flag("per_device_train_batch_size", "Queries of a batch, in each process.", convert=int, shown="32"),
    _flag("gradient_accumulation_steps", "Batches of a step; they share no negatives.", convert=int, shown="1"),
    _flag("warmup_ratio", "Share of the steps in which the learning rate rises.", convert=float, shown="0.1"),
    _flag("warmup_steps", "Number of those steps instead; below 1 a share.", convert=float),
    _flag("weight_decay", "Of AdamW.", convert=float, shown="0"),
    _flag("lr_scheduler_type", "How the learning rate falls.", shown="linear"),
    _flag("max_grad_norm", "Longer gradients are cut.", convert=float, shown="1"),
    _flag("fp16", "Compute in float16 on a GPU; on a CPU in bfloat16 where it has it, else in float32.", "bool",
          shown="bfloat16 where the hardware has it"),
    _flag("bf16", "Compute in bfloat16, or in float32 where the hardware lacks it.", "bool",
          shown="where the hardware has it"),
    _flag("gradient_checkpointing", "Compute activations again instead of keeping them.", "bool", shown="False"),
    _flag("deepspeed", "DeepSpeed's config, ZeRO stage 1 or 2."),
    _flag("logging_steps", "Log every so many steps.", convert=float, shown="10"),
    _flag("save_steps", "Save what an interrupted run goes on from every so many steps.", convert=float, shown="500"),
    _flag("save_strategy", "no, steps or epoch.", shown="steps"),
    _flag("save_total_limit", "Checkpoints that are kept while training.", convert=int, shown="1"),
    _flag("dataloader_drop_last", "Leave out a last batch that is not full.", "bool", shown="False"),
    _flag("dataloader_num_workers", "Processes that make batches.", convert=int, shown="0"),
    _flag("data_seed", "Seed of the order of queries alone.", convert=int, shown="--seed"),
    _flag("report_to", "Where logs go as well, such as wandb or tensorboard.", "list", shown="none"),
    _flag("run_name", "Of the run, there."),
]  # fmt: skip


def others() -> list[Flag]:
    """Flags of all other fields; imports transformers."""
    from transformers import TrainingArguments

    known, hints = LEFT_OUT | {flag.name for flag in USUAL}, typing.get_type_hints(TrainingArguments)
    found = []
    for field in fields(TrainingArguments):
        if field.name not in known and field.init:
            kind, convert = _type(hints[field.name])
            about = str(field.metadata.get("help", "")).strip()
            found.append(_flag(field.name, about, kind, convert, shown=str(field.default)))
    return found


def _type(hint: Any) -> tuple[str, Callable[[str], Any] | None]:
    """(kind of flag, converter) of a field of that type."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    parts = [typing.get_origin(part) or part for part in parts]
    if list in parts:
        return "list", None
    if bool in parts and str not in parts:
        return "bool", None
    for number in (float, int):
        if number in parts:
            return "value", number
    return "value", _json if dict in parts and str not in parts else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected JSON: {error.msg}, found {text!r}") from None


def arguments(given: Given) -> dict[str, Any]:
    """The TrainingArguments that were given, by name, with half precision that the hardware has."""
    chosen = {flag.name: given[flag.name] for flag in given.flags if (flag.key or "").startswith(f"{KEY}.")}
    chosen = {name: value for name, value in chosen.items() if given.typed(name)}
    if chosen.get("warmup_steps"):
        chosen.pop("warmup_ratio", None)  # as transformers had it
    asked = [name for name in ("fp16", "bf16") if chosen.get(name)]
    if len(asked) == 1 and not _is_there(asked[0]):
        from retune.model.device import has_bf16

        log.info("%s: not in this machine's hardware; computing in %s", given.shown(asked[0]),
                 "bfloat16" if has_bf16() else "float32")  # fmt: skip
        del chosen[asked[0]]
    elif not asked and "fp16" in chosen:
        chosen.setdefault("bf16", False)  # full precision was meant
    return chosen


def _is_there(half: str) -> bool:
    from retune.model.device import best_device, has_bf16

    return has_bf16() if half == "bf16" else best_device().type != "cpu"
