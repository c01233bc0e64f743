"""Flags of models, in the incumbents' spelling and the config's, and what becomes of them.

What a flag says is honoured on the machine at hand: devices are made the only visible ones, half
precision is what the hardware has, a batch size is an upper bound of a token budget.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from retune.commands.flags import Flag, Given, from_section, whole
from retune.config import EmbedderConfig, RerankerConfig
from retune.runtime import UserError, log, use_hub

# FlagEmbedding's names of model classes → `embedder.family`
FAMILIES = {
    "encoder-only-base": "encoder", "encoder-only-m3": "m3", "decoder-only-base": "decoder", "decoder-only-icl": "icl",
}  # fmt: skip
MODEL, RERANKER, PRECISION = "embedding model", "reranker", "hardware"
CACHE_DIR = Flag(("cache_dir",), "Folder of models downloaded from the hub.", shown="the hub's own", group=PRECISION)


KNOWN = get_args(get_args(EmbedderConfig.model_fields["family"].annotation)[0])  # families that there are
REFERENCE = "A folder, a hub id or `package:<python package>`."
LENGTH = "Tokens of a {} at most, special ones included; fewer where the checkpoint takes no more."


def _family(text: str) -> str:
    return FAMILIES.get(text, text)


def or_none(text: str) -> str | None:
    """FlagEmbedding's '' means none."""
    return None if text in ("", "None") else text


def _with_newlines(text: str) -> str:
    r"""A shell passes `\n` as two characters; a format means the line break."""
    return text.replace("\\n", "\n")


def _examples(text: str) -> Any:
    """A JSON list of {instruct, query, response}, or a file that holds one."""
    try:
        return json.loads(Path(text).read_text() if not text.lstrip().startswith("[") else text)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON list, or a file with one: {error}") from None


EMBEDDER: Mapping[str, Mapping[str, Any]] = {
    "model": {"names": ("embedder_name_or_path", "model_name_or_path"), "help": REFERENCE},
    "family": {
        "names": ("embedder_model_class", "family"), "convert": _family,
        "choices": tuple(name for name, meant in FAMILIES.items() if meant in KNOWN),
    },
    "pooling": {"names": ("pooling_method", "pooling")},
    "normalize": {"names": ("normalize_embeddings",)},
    "query_instruction": {"names": ("query_instruction_for_retrieval", "query_instruction")},
    "query_instruction_format": {
        "names": ("query_instruction_format_for_retrieval", "query_instruction_format"), "convert": _with_newlines,
    },
    "passage_instruction": {"names": ("passage_instruction_for_retrieval", "passage_instruction")},
    "passage_instruction_format": {
        "names": ("passage_instruction_format_for_retrieval", "passage_instruction_format"), "convert": _with_newlines,
    },
    "examples": {
        "names": ("examples_for_task", "examples"), "kind": "value", "convert": _examples, "shown": "none", "help":
        "Solved examples that an in-context model reads before every query: a JSON list of {instruct, query, "
        "response}, or a file that holds one.",
    },
    "examples_instruction_format": {"names": ("examples_instruction_format",), "convert": _with_newlines},
    "icl_suffix_str": {"names": ("icl_suffix_str",), "convert": _with_newlines},
    "query_max_length": {
        "names": ("embedder_query_max_length", "query_max_length"), "default": 512, "help": LENGTH.format("query"),
    },
    "passage_max_length": {
        "names": ("embedder_passage_max_length", "passage_max_length"), "default": 512,
        "help": LENGTH.format("passage"),
    },
}  # fmt: skip

RERANKERS: Mapping[str, Mapping[str, Any]] = {
    "model": {"names": ("reranker_name_or_path",), "help": REFERENCE},
    "family": {"names": ("reranker_model_class",)},
    "query_instruction": {"names": ("query_instruction_for_rerank",)},
    "query_instruction_format": {"names": ("query_instruction_format_for_rerank",), "convert": _with_newlines},
    "passage_instruction": {"names": ("passage_instruction_for_rerank",)},
    "passage_instruction_format": {"names": ("passage_instruction_format_for_rerank",), "convert": _with_newlines},
    "normalize": {"names": ("normalize",)},
    "prompt": {"names": ("prompt",)},
    "cutoff_layers": {"names": ("cutoff_layers",)},
    "compress_ratio": {"names": ("compress_ratio",)},
    "compress_layers": {"names": ("compress_layers",)},
}


def embedder_flags() -> list[Flag]:
    """Flags of the section `embedder`; a key that has no name in the incumbents is `--embedder_<key>` or `--<key>`."""
    found = from_section("embedder", EmbedderConfig, MODEL, EMBEDDER, lambda field: (f"embedder_{field}", field))
    return [
        *found,
        Flag(
            ("embedder_batch_size", "batch_size"),
            "Texts of a batch at most, counted in tokens: so many texts of the greatest length. More than pays on the "
            "hardware is never taken.",
            shown="as many as pay", convert=whole(1), group=MODEL,
        ),
    ]  # fmt: skip


def trained_flags() -> list[Flag]:
    """Flags of the section `embedder` for a model that is trained, with the incumbents' names and defaults."""
    lengths = {"query_max_length": ("query_max_len", 32), "passage_max_length": ("passage_max_len", 128)}
    own = {
        "model": {"names": ("model_name_or_path", "embedder_name_or_path"), "help": REFERENCE, "required": True},
        "family": {"names": ("family", "embedder_model_class"), "convert": _family, "choices": KNOWN},
        "pooling": {
            "names": ("sentence_pooling_method", "pooling_method", "pooling"), "shown": "the checkpoint's, else cls",
        },
        "peft_path": {
            "names": ("raw_peft", "peft_model_path", "peft_path", "embedder_peft_path"), "convert": or_none,
            "help": "LoRA adapters, a folder or a hub id, that are folded into the model before it is trained.",
        },
        "normalize": {
            "names": ("normalize_embeddings", "normlized", "normalized", "normalize"), "default": True,
            "help": "Scale vectors to length 1.",
        },
    }  # fmt: skip
    for field, (name, default) in lengths.items():
        kind = field.split("_")[0]
        names = (name, field, f"embedder_{field}")
        own[field] = {"names": names, "default": default, "help": LENGTH.format(kind)}
    return from_section(
        "embedder", EmbedderConfig, MODEL, {**EMBEDDER, **own}, lambda field: (field, f"embedder_{field}"),
        leave=("examples", "examples_instruction_format", "dtype"),
    )  # fmt: skip


def reranker_flags(bare: bool) -> list[Flag]:
    """Flags of the section `reranker`: `--reranker_<key>` where the incumbents have no other name for it.

    Args:
        bare: whether `--<key>` is the reranker's as well, in a command that has no other model.
    """
    return from_section(
        "reranker", RerankerConfig, RERANKER, RERANKERS,
        lambda field: (f"reranker_{field}", *([field] if bare else [])), leave=("fit",),
    )  # fmt: skip


def hardware_flags() -> list[Flag]:
    return [
        Flag(
            ("devices",), "Devices to compute on: cpu, or GPUs such as cuda:0 cuda:1 (or 0 1).", kind="list",
            shown="the first GPU, else the CPU", group=PRECISION,
        ),
        Flag(
            ("use_fp16",), "Compute in half precision: float16 on a GPU; on a CPU bfloat16 where it has it, else "
            "float32. `False` means float32.", kind="bool", shown="bfloat16 where the hardware has it", group=PRECISION,
        ),
        Flag(("use_bf16",), "Compute in bfloat16, or in float32 where the hardware lacks it.", kind="bool",
             shown="where the hardware has it", group=PRECISION),
        CACHE_DIR,
    ]  # fmt: skip


def use_cache(given: Given) -> None:
    """Make `--cache_dir` the hub's cache, for this process and its children."""
    use_hub(given["cache_dir"], None)


def prepare(given: Given) -> list[str]:
    """Make `--devices` and `--cache_dir` hold for this process and its children; call it before torch is imported.

    Returns:
        The devices by the names which they have from now on, [] where none was asked for.

    Raises:
        UserError: for a device that this machine does not have.
    """
    use_cache(given)
    asked = [part for word in given["devices"] or [] for part in re.split(r"[,\s]+", word.strip()) if part]
    names = [f"cuda:{name}" if name.isdigit() else "cuda:0" if name == "cuda" else name for name in asked]
    for name in names:
        if not re.fullmatch(r"cpu|mps|cuda:\d+", name):
            raise given.mistake("devices", f"expected cpu, or GPUs such as cuda:0 cuda:1, found {name!r}")
    if not names:
        return []
    gpus = [int(name.removeprefix("cuda:")) for name in names if name.startswith("cuda:")]
    if gpus and len(gpus) < len(names):
        raise given.mistake("devices", f"expected GPUs only or none, found {' '.join(asked)}")
    _make_visible(gpus, given)
    return [f"cuda:{number}" for number in range(len(gpus))] or names


def _make_visible(gpus: Sequence[int], given: Given) -> None:
    """Let this process see these GPUs alone, so that every stage takes them and no other."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = None if before is None else [name for name in before.split(",") if name]
    if visible is not None and any(gpu >= len(visible) for gpu in gpus):
        raise given.mistake("devices", f"this process may use {len(visible)} GPUs (CUDA_VISIBLE_DEVICES={before})")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) if visible is None else visible[gpu] for gpu in gpus)
    if gpus:
        import torch

        if torch.cuda.device_count() < len(gpus):
            raise given.mistake("devices", f"this machine has no such GPU ({torch.cuda.device_count()} of them found)")


def precision(given: Given, key: str) -> dict[str, str]:
    """{"dtype": what --use_fp16 and --use_bf16 stand for here}, or {} where neither was given.

    Args:
        key: name of the flag that sets the dtype itself.
    """
    asked = [name for name in ("use_fp16", "use_bf16") if given[name]]
    if not any(given.typed(name) for name in ("use_fp16", "use_bf16")):
        return {}
    if given.typed(key) or len(asked) > 1:
        both = [name for name in (key, "use_fp16", "use_bf16") if given.typed(name)]
        raise UserError(f"{given.shown(both[0])} and {given.shown(both[1])}: expected one of them")
    if not asked:
        return {"dtype": "float32"}
    from retune.model import device

    if asked == ["use_fp16"] and device.best_device().type != "cpu":
        return {"dtype": "float16"}
    if asked == ["use_bf16"] and device.has_bf16():
        return {"dtype": "bfloat16"}
    found = "bfloat16" if device.has_bf16() else "float32"
    log.info("%s: not in this machine's hardware; computing in %s", given.shown(asked[0]), found)
    return {"dtype": found}


def embedder(given: Given) -> EmbedderConfig:
    """The section `embedder` that the flags make.

    Raises:
        UserError: for a value that it does not take, or a family that is not supported.
    """
    if given["embedder_name_or_path"] is None:
        raise given.mistake("embedder_name_or_path", "required, but not given: a folder or a hub id")
    check_family(given, tuple(name for name, meant in FAMILIES.items() if meant in KNOWN))
    return given.section("embedder", EmbedderConfig, **precision(given, "embedder_dtype"))


def check_family(given: Given, names: Sequence[str]) -> None:
    """Raise a UserError for a family of embedders that is not there; `names` are what those are called that are."""
    if (family := given["family"]) and family not in KNOWN:
        raise given.mistake("family", f"{family!r} is not supported; supported: {', '.join(names)}")


def reranker(given: Given) -> RerankerConfig | None:
    """The section `reranker` that the flags make; None where no reranker is named."""
    if given["reranker_name_or_path"] is None:
        return None
    return given.section("reranker", RerankerConfig, **precision(given, "reranker_dtype"))


def fetch(model: str, revision: str | None) -> None:
    """Have the checkpoint at hand, before work is done that would need it.

    Raises:
        UserError: if there is none.
    """
    from retune.model.checkpoint import resolve

    resolve(model, revision, adapters_alone=True)


def token_budget(given: Given, name: str, max_length: int, dtype: str) -> dict[str, int]:
    """{"max_tokens_per_batch": a batch size in tokens}, or {} where it is no less than what the engine would take.

    Args:
        name: the flag of the batch size. max_length: tokens of the longest text. dtype: the model section's.
    """
    if given[name] is None or given.typed("max_tokens_per_batch"):
        return {}
    from retune.model import device
    from retune.model.budget import budget_for

    where, asked = device.best_device(), given[name] * max_length
    own = budget_for(where, device.compute_dtype(dtype, where)).ceiling
    return {"max_tokens_per_batch": max(asked, 16)} if asked < own else {}
