"""The training task of a reranker."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from retune.objective.losses import listwise, pointwise
from retune.training.memory import Keep, everything
from retune.training.tasks import Task

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"listwise": listwise, "pointwise": pointwise}
"""By `reranker.fit.loss`: logits [Q, G], the positive first → scalar."""


class RerankerTask(Task):
    """A reranker that learns to put each group's positive first."""

    def __init__(self, reranker: nn.Module, keep: Keep = everything, loss: str = "listwise") -> None:
        super().__init__(reranker, keep)
        self.loss = LOSSES[loss]

    def forward(self, chunks: list[dict[str, Tensor]], pair_places: Tensor) -> Tensor:
        logits = self.outputs(chunks)  # [distinct pairs]
        groups = logits[pair_places]  # [Q, G]
        self.note({"accuracy": (groups.detach().argmax(1) == 0).float().mean()})
        return self.loss(groups)
