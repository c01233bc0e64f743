"""Weights as a checkpoint of a run has them: whole, by name, however they lie in memory.

FSDP leaves each process a part of every weight; DeepSpeed makes them parts of one long tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from retune.objective.gather import world

CPU = torch.device("cpu")


def whole(task: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """The weights under training in full, by name, on the CPU of the first process; the others get none.

    All processes must call it.  No two share memory.

    Args:
        device: where processes meet.
    """
    found: dict[str, Tensor] = {}
    taken = set()
    for name, weight in task.state_dict().items():
        if isinstance(weight, DTensor):
            weight = weight.to(device).full_tensor()
        if world()[0] == 0:
            memory = weight.untyped_storage()
            shared = memory.nbytes() > weight.nbytes or memory.data_ptr() in taken
            taken.add(memory.data_ptr())
            found[name] = weight.to(CPU, copy=shared).contiguous()
    return found


def put(weights: Mapping[str, Tensor], task: nn.Module) -> None:
    """Have whole `weights`, which each process must bring, in a task, whether its own are cut or not."""
    own = task.state_dict()
    task.load_state_dict({name: _cut_as(own[name], weight) for name, weight in weights.items()})


def _cut_as(own: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(own, DTensor):
        return weight
    return distribute_tensor(weight.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
