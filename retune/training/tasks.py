"""A model and its loss as one module: chunks of tokens in, the loss out.

One forward a step, however many chunks, is what DistributedDataParallel expects.  Knows nothing of
tables, epochs or optimisers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retune.objective.losses import listwise
from retune.objective.recipe import Candidates, Recipe


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


class EmbedderTask(Task):
    """An embedder with its objective."""

    def __init__(self, embedder: nn.Module, recipe: Recipe) -> None:
        super().__init__(embedder)
        self.recipe = recipe

    def forward(
        self, chunks: list[dict[str, Tensor]], query_places: Tensor, passage_places: Tensor, passage_ids: Tensor,
        positive_rows: Tensor, positive_ids: Tensor, in_batch: Tensor, teacher: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        vectors = self.outputs(chunks)  # [distinct texts, d]
        with torch.autocast(vectors.device.type, enabled=False):  # scores in float32
            queries = vectors.index_select(0, query_places)  # [Q, d]
            passages = vectors.index_select(0, passage_places)  # [Q * G, d]
            candidates = Candidates(passage_ids, positive_rows, positive_ids, in_batch, teacher)
            return self.recipe(queries, passages, candidates)


class RerankerTask(Task):
    """A reranker that learns to put each group's positive first."""

    def forward(self, chunks: list[dict[str, Tensor]], pair_places: Tensor) -> Tensor:
        logits = self.outputs(chunks)  # [distinct pairs]
        return listwise(logits[pair_places])  # [Q, G]
