"""The training task of an M3 embedder: all heads at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retune.config import TrainConfig
from retune.model.multihead import represent
from retune.objective.m3 import Unified
from retune.objective.recipe import Candidates, Recipe
from retune.objective.representations import joined, select
from retune.runtime import log
from retune.training.memory import Keep, everything
from retune.training.tasks import Task

NONZERO = "sparse_nonzero"


def unified(settings: TrainConfig, recipe: Recipe) -> Unified:
    """The objective of all heads that the settings ask for; `recipe` is that of one."""
    weights = settings.head_weights
    start = settings.self_distill_start_step if settings.use_self_distill else None
    return Unified(recipe, weights.ensemble.model_dump(), weights.loss.model_dump(), start)


class AllHeads(nn.Module):
    """An embedder whose forward gives all heads' representations of a chunk."""

    def __init__(self, embedder: Any) -> None:
        super().__init__()
        self.embedder = embedder

    @property
    def backbone(self) -> nn.Module:
        return self.embedder.backbone

    def forward(self, **chunk: Tensor) -> dict[str, Tensor]:
        return represent(self.embedder, **chunk)


class UnifiedTask(Task):
    """An M3 embedder with its objective."""

    def __init__(self, embedder: nn.Module, recipe: Unified, keep: Keep = everything) -> None:
        super().__init__(AllHeads(embedder), keep)
        self.recipe, self._collapsed = recipe, False

    def forward(
        self, chunks: list[dict[str, Tensor]], query_places: Tensor, passage_places: Tensor, passage_ids: Tensor,
        positive_rows: Tensor, positive_ids: Tensor, in_batch: Tensor, teacher: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        texts = joined(self.chunk_outputs(chunks))  # the distinct texts
        with torch.autocast(texts["dense"].device.type, enabled=False):  # scores in float32
            queries, passages = select(texts, query_places), select(texts, passage_places)
            candidates = Candidates(passage_ids, positive_rows, positive_ids, in_batch, teacher, counted)
            dense = (queries["dense"].detach(), passages["dense"].detach())
            measured = self.recipe.recipe.measures(*dense, candidates)
            self.note(measured | {NONZERO: (texts["sparse"].detach() > 0).float().mean()})
            return self.recipe(queries, passages, candidates, self.step)

    def noted(self) -> dict[str, Tensor]:
        """What was noted since the last call; tells of a sparse head that no longer weighs any token."""
        found = super().noted()
        collapsed = NONZERO in found and not found[NONZERO][0]
        if collapsed and not self._collapsed:
            log.warning(
                "the sparse head has collapsed: it weighs every token 0, and no gradient will bring it back; lower the "
                "learning rate or train.head_weights.loss.sparse, or set train.fix_encoder"
            )
        self._collapsed = collapsed
        return found
