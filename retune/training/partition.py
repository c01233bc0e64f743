"""What the configs of DeepSpeed and FSDP may ask for: they cut up among processes what training keeps in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retune.model.device import best_device
from retune.runtime import UserError, log
from retune.training.launch import under_torchrun

Config = str | dict[str, Any] | None
"""A config, as JSON too, or the path of a file that has it."""

FSDP_REFUSED = {
    "version": ((1, "1"), "transformers gives version 1 up, and it is not known here; leave it out for version 2"),
    "xla": ((True, "true"), "TPUs are not known here; leave it out"),
    "cpu_ram_efficient_loading": (
        (True, "true"), "here each process loads the model itself, with its adapters and heads; leave it out",
    ),
    "activation_checkpointing": (
        (True, "true"), "FSDP's own draws other dropout when it recomputes; set activation_checkpointing beside fsdp",
    ),
    "cpu_offload": (
        (True, "true"), "gradients on the CPU are out of reach for NCCL, by which GPUs meet; leave it out",
    ),
}  # fmt: skip
"""Keys of `fsdp_config`, the values that are refused, and why."""


def check_deepspeed(config: Config, section: str) -> None:
    """ZeRO's stages 1 and 2 cut the optimiser's state and the gradients; stage 3 cuts the weights, which `save` reads.

    Raises:
        UserError: for stage 3, or a config that is unreadable.
    """
    config = _object(config, f"{section}.deepspeed")
    if config.get("zero_optimization", {}).get("stage") == 3:
        raise UserError(
            f"{section}.deepspeed: ZeRO stage 3 cuts the weights over the processes, which is not known of DeepSpeed "
            f"here; use {section}.fsdp, which does it too, or stage 1 or 2"
        )


def check_fsdp(given: dict[str, Any], section: str) -> None:
    """FSDP cuts the weights too.

    Args:
        given: the arguments, `fsdp` and `fsdp_config` among them.

    Raises:
        UserError: for one process, or a config that is unreadable or asks for what is not known here.
    """
    if not given.get("fsdp"):
        return
    if not under_torchrun():
        remedy = "set train.nproc_per_node, or " if section == "train.args" else ""
        raise UserError(f"{section}.fsdp: it takes several processes; {remedy}leave it out")
    config = _object(given.get("fsdp_config"), f"{section}.fsdp_config")
    if "offload" in str(given["fsdp"]).split():
        config = config | {"cpu_offload": True}
    for name, (values, reason) in FSDP_REFUSED.items():
        if config.get(name, config.get(f"fsdp_{name}")) in values:
            raise UserError(f"{section}.fsdp_config: {name}: {reason}")
    if best_device().type == "cpu":
        log.warning("%s.fsdp: on CPUs each process keeps the whole model, as it does without", section)


def _object(config: Config, key: str) -> dict[str, Any]:
    if isinstance(config, str):
        try:
            config = json.loads(config if config.lstrip().startswith("{") else Path(config).read_text())
        except FileNotFoundError:
            raise UserError(f"{key}: {config}: no such file") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: {config}: {error}") from None
    if config is not None and not isinstance(config, dict):
        raise UserError(f"{key}: expected a JSON object, found {config!r}")
    return config or {}
