"""What the hardware can do: device, and the dtype that pays there."""

from __future__ import annotations

import torch

from retune.runtime import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_device() -> torch.device:
    """The GPU of this process (by `LOCAL_RANK` under torchrun), else the CPU."""
    import os

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def named(name: str) -> torch.device:
    """The device of that name, made the current one; a UserError where there is none."""
    try:
        found = torch.device(name)
        if found.type == "cuda":
            torch.cuda.set_device(found)
    except (RuntimeError, AssertionError, ValueError, AttributeError) as error:  # the last of a torch without CUDA
        raise UserError(f"device {name}: {str(error).strip().splitlines()[0]}") from None
    return found


def has_bf16(device: torch.device | None = None) -> bool:
    """Whether bfloat16 products run in hardware; elsewhere they are hundreds of times slower than float32."""
    device = device or best_device()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return False


def compute_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """The dtype a config's `dtype` stands for; `auto` is bfloat16 where the hardware has it.

    Raises:
        UserError: for float16 on a CPU, where products overflow or are not implemented.
    """
    device = device or best_device()
    if name == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    if name == "float16" and device.type == "cpu":
        raise UserError("dtype: float16 does not work on a CPU; use auto")
    return DTYPES[name]


def default_token_budget(device: torch.device) -> int:
    """Padded tokens of a batch: what fits a CPU's caches, or fills a GPU."""
    return 4096 if device.type == "cpu" else 65536


def length_multiple(dtype: torch.dtype, device: torch.device) -> int:
    """Lengths are rounded up to this: few shapes for oneDNN's bfloat16 kernels and for tensor cores."""
    if device.type == "cpu":
        return 16 if dtype == torch.bfloat16 else 1
    return 8
