"""A model and its loss as one module: chunks of tokens in, the loss out.

One forward a step, however many chunks, is what DistributedDataParallel expects.  Knows nothing of
tables, epochs or optimisers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Task(nn.Module):
    """A model under training; `forward` takes a batch's entries and returns the loss, a scalar."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def outputs(self, chunks: list[dict[str, Tensor]]) -> Tensor:
        """The model's rows for all chunks, one after the other: float32 [n, ...]."""
        return torch.cat([self.model(**chunk).float() for chunk in chunks])

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass; asked for by `activation_checkpointing` of the arguments."""
        self.model.backbone.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The older name of the same."""
        self.model.backbone.gradient_checkpointing_enable(**options)
