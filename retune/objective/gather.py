"""Tensors of all processes, with gradients that equal those of one big batch.

Each process scores its own queries against everyone's passages.  A passage's gradient is then
spread over the processes; the backward pass sums it and hands each process the part that belongs to
its own passages.  With the mean that DistributedDataParallel takes over processes, this is the
gradient of the mean loss over all queries.  (Keeping only the local part's gradient would lose what
other processes' queries say about a passage.)

Without a process group everything here is the identity.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    """Wait until every process is here."""
    if world()[1] > 1:
        dist.barrier()


def most(value: int, device: torch.device) -> int:
    """The largest of all processes' values; `device` is the one that the process computes on."""
    if world()[1] == 1:
        return value
    everyones = torch.tensor(value, device=device)
    dist.all_reduce(everyones, dist.ReduceOp.MAX)
    return int(everyones)


def leave() -> None:
    """Wait for all, then end the process group.

    A DistributedDataParallel that outlives its group can wait for ever for a thread of gloo when it goes, so that
    callers let go of theirs first.
    """
    wait_for_all()
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a trainer is part of a circle
        dist.destroy_process_group()


def _gathered(values: Tensor) -> Tensor:
    parts = [torch.empty_like(values) for _ in range(world()[1])]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context, values: Tensor) -> Tensor:
        return _gathered(values)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        rank, size = world()
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # gloo has no reduce_scatter; the sum is over all processes' losses
        return gradient.chunk(size)[rank]


def gather_with_gradient(values: Tensor) -> Tensor:
    """Everyone's values, rank after rank: [n, ...] → [W * n, ...]; n must be equal on all processes."""
    return values if world()[1] == 1 else _Gather.apply(values)


def gather(values: Tensor) -> Tensor:
    """As `gather_with_gradient`, for what has no gradient, such as ids."""
    return values if world()[1] == 1 else _gathered(values)
