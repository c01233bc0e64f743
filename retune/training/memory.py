"""How many activations may be kept: all, as few as there can be, or what fits the memory that is free.

What is not kept is computed twice (see `objective/gradcache.py`).  Either way the gradient is the same
to the bit, so the choice may depend on the machine: it decides time and memory, nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from retune.model.device import default_token_budget
from retune.objective.gather import most
from retune.objective.gradcache import Chunk, graph_bytes
from retune.runtime import log

Keep = Callable[[nn.Module, Sequence[Chunk]], int | None]
"""(model, chunks of a batch) → padded tokens whose graphs are kept; None for all."""

SHARE = 0.5  # of the free memory that graphs may take; the rest is for what the estimate does not see
STATE = 16  # bytes a trained weight will take: its gradient, Adam's two means, DistributedDataParallel's bucket


def everything(model: nn.Module, chunks: Sequence[Chunk]) -> None:
    """Keep all graphs: the fastest, and the most memory."""


def next_to_nothing(model: nn.Module, chunks: Sequence[Chunk]) -> int:
    """Keep one chunk's graph: a third more to compute, and the memory of one chunk."""
    return 0


class WhatFits:
    """Keep as many graphs as fit half of the memory that is free when training begins.

    Args:
        in_step: whether all processes must run the model equally often, and so measure it at the same time.
    """

    def __init__(self, in_step: bool = False) -> None:
        self.room: int | None = None
        self.in_step, self.width, self.per_token, self.said = in_step, 0, 0.0, False

    def __call__(self, model: nn.Module, chunks: Sequence[Chunk]) -> int | None:
        device = chunks[0]["input_ids"].device
        if self.room is None:
            trained = sum(_own_part(weight).numel() for weight in model.parameters() if weight.requires_grad)
            self.room = max(0, int(SHARE * free_memory(device)) - STATE * trained)
        widest = max(chunks, key=lambda chunk: chunk["input_ids"].shape[1])
        width = widest["input_ids"].shape[1]
        width = most(width, device) if self.in_step else width
        if width > self.width:  # attention may take the square of it
            self.width, self.per_token = width, bytes_per_token(model, widest, width)
        keep = int(self.room / self.per_token)
        if sum(chunk["input_ids"].numel() for chunk in chunks) <= keep:
            return None
        self._say(keep)
        return keep

    def _say(self, keep: int) -> None:
        if not self.said:
            log.info(
                "activations of %d tokens are kept, those of a batch's other chunks computed twice: %.1f GB are free "
                "for them, at %.0f kB a token", keep, self.room / 1e9, self.per_token / 1e3,
            )  # fmt: skip
        self.said = True


def policy(grad_cache: bool | str, bounded: bool, in_step: bool = False) -> Keep:
    """What `train.grad_cache` stands for.

    Args:
        bounded: whether the user bounds a chunk (`max_tokens_per_batch`, `sub_batch_size`), and memory with it.
        in_step: see `WhatFits`.
    """
    if grad_cache == "auto":
        return next_to_nothing if bounded else WhatFits(in_step)
    return next_to_nothing if grad_cache else everything


def chunk_tokens(given: int | None, grad_cache: bool | str, device: torch.device) -> int | None:
    """Padded tokens of a chunk; None leaves it to the device.

    Where memory is asked for, by `grad_cache: true`, and no bound is given: a quarter of what suits the device best.
    On a CPU that costs no time (`docs/benchmarks.md`).
    """
    return default_token_budget(device) // 4 if given is None and grad_cache is True else given


def bytes_per_token(model: nn.Module, chunk: Chunk, width: int | None = None) -> float:
    """Bytes that a graph holds for each padded token of batches as wide as `chunk`, or of `width` where it is given.

    The difference between four rows and two: what does not grow with the rows, such as weights cast by autocast,
    is no part of it.
    """

    own = chunk["input_ids"].shape[1]
    width = width or own

    def held(rows: int) -> int:
        first = {name: values[:1].repeat(1, -(-width // own))[:, :width] for name, values in chunk.items()}
        return graph_bytes(model, {name: row.expand(rows, *row.shape[1:]) for name, row in first.items()})

    few, more = held(2), held(4)
    return max((more - few) / 2 / width, 1.0)


def _own_part(weight: Tensor) -> Tensor:
    """What this process has of a weight that FSDP cut up; else all of it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate on its device: its share, where several share a machine's memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min(_left_on_the_machine(), *_left_of_the_groups()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _left_on_the_machine() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _left_of_the_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left under the limits of the process's control groups, which containers and schedulers set."""
    left = [2**62]
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, kinds, path = line.split(":", 2)  # version 2 has one tree and no kinds, version 1 a tree a kind
        if kinds not in ("", "memory"):
            continue
        base, names = (root / kinds, ("memory.limit_in_bytes", "memory.usage_in_bytes")) if kinds else (
            root, ("memory.max", "memory.current"))  # fmt: skip
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such file, or no limit ("max")
                continue
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # given back on demand
            left.append(max(0, limit - used + cached))
    return left
