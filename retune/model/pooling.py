"""Token vectors to one vector: functions (hidden [B, L, D], mask [B, L]) → [B, D], in a table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from retune.model.fused import Flat


def cls(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The first token's vector, wherever padding puts it."""
    if mask is None:
        return hidden[:, 0].float()  # [B, D]
    first = mask.int().argmax(1)  # [B]
    return hidden[torch.arange(len(hidden), device=hidden.device), first].float()  # [B, D]


def mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the tokens that are not padding, in float32."""
    if mask is None:
        return hidden.float().mean(1)  # [B, D]
    weights = mask.unsqueeze(-1).float()  # [B, L, 1]
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1e-9)  # [B, D]


def last_token(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The last token's vector that is not padding, whatever the padding side."""
    if mask is None:
        return hidden[:, -1].float()  # [B, D]
    positions = torch.arange(mask.shape[1], device=mask.device)  # [L]
    last = (mask.int() * positions).argmax(1)  # [B]
    return hidden[torch.arange(len(hidden), device=hidden.device), last].float()  # [B, D]


POOLINGS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"cls": cls, "mean": mean, "last_token": last_token}


def of_flat(pooling: str, states: Tensor, batch: Flat) -> Tensor:
    """Pooled float32 [B, D], of the states [T, D] of a batch's tokens."""
    groups = [(texts, length) for _, texts, length in batch.groups]
    parts = states.split([texts * length for texts, length in groups])  # whose gradient is put together once
    cut = [part.view(*group, -1) for part, group in zip(parts, groups, strict=True)]  # [B', L, D] each
    return torch.cat([POOLINGS[pooling](part, None) for part in cut])
