"""The training task of a reranker."""

from __future__ import annotations

from torch import Tensor

from retune.objective.losses import listwise
from retune.training.tasks import Task


class RerankerTask(Task):
    """A reranker that learns to put each group's positive first."""

    def forward(self, chunks: list[dict[str, Tensor]], pair_places: Tensor) -> Tensor:
        logits = self.outputs(chunks)  # [distinct pairs]
        return listwise(logits[pair_places])  # [Q, G]
