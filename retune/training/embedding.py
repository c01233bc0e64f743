"""The training task of an embedder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retune.objective.recipe import Candidates, Recipe
from retune.training.memory import Keep, everything
from retune.training.tasks import Task


class EmbedderTask(Task):
    """An embedder with its objective."""

    def __init__(self, embedder: nn.Module, recipe: Recipe, keep: Keep = everything) -> None:
        super().__init__(embedder, keep)
        self.recipe = recipe

    def forward(
        self, chunks: list[dict[str, Tensor]], query_places: Tensor, passage_places: Tensor, passage_ids: Tensor,
        positive_rows: Tensor, positive_ids: Tensor, in_batch: Tensor, teacher: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        vectors = self.outputs(chunks)  # [distinct texts, d]
        with torch.autocast(vectors.device.type, enabled=False):  # scores in float32
            queries = vectors.index_select(0, query_places)  # [Q, d]
            passages = vectors.index_select(0, passage_places)  # [Q * G, d]
            candidates = Candidates(passage_ids, positive_rows, positive_ids, in_batch, teacher, counted)
            self.note(self.recipe.measures(queries.detach(), passages.detach(), candidates))
            return self.recipe(queries, passages, candidates)
