"""The objective of unified fine-tuning (BGE-M3, arXiv:2402.03216, as FlagEmbedding trains it).

Each head's scores, and their weighted sum, the ensemble, get the same loss; the total is

    (dense + ensemble + 0.1 sparse + colbert) / 4.

With self-distillation each head also learns the ensemble's distribution over the candidates, and the
two are averaged:  (total + (dense + 0.1 sparse + colbert) / 3) / 2.

Unlike there, the passages of other processes are candidates for every head where they are for dense,
and what is masked for one is for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retune.objective.heads import SCORERS
from retune.objective.losses import kl_div
from retune.objective.recipe import Candidates, Recipe
from retune.objective.representations import Texts, gathered

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Unified:
    """Texts by head → loss.

    Attributes:
        recipe: what counts against a query, and the loss of one matrix of scores.
        in_ensemble: weight of each head's scores in the ensemble.
        in_loss: weight of the loss of each head and of the ensemble.
        self_distillation: from which step on heads learn from the ensemble (after it: 0 leaves the first step out);
            None for never.
    """

    recipe: Recipe
    in_ensemble: Mapping[str, float]
    in_loss: Mapping[str, float]
    self_distillation: int | None = None

    def __call__(self, queries: Texts, passages: Texts, candidates: Candidates, step: int = 0) -> Tensor:
        """The loss of a batch: a scalar.  With scope `world`, all processes must call it together.

        Args:
            queries: Q texts. passages: Q * G texts, group after group, the positive first.
            candidates: ids, known positives, opt-outs and teacher scores.
            step: steps taken so far.
        """
        recipe, n, size = self.recipe, len(queries["dense"]), len(passages["dense"]) // len(queries["dense"])
        columns = recipe.columns(n, size, candidates)
        everyones = gathered(passages) if recipe.reach == "world" else passages
        scores = {head: self._scores(head, queries, everyones, size) for head in self.in_ensemble}  # [Q, P] each
        scores[ENSEMBLE] = sum(weight * scores[head] for head, weight in self.in_ensemble.items())
        losses = {name: recipe.on_scores(each, columns, candidates.teacher) for name, each in scores.items()}
        loss = sum(weight * losses[name] for name, weight in self.in_loss.items()) / len(self.in_loss)
        if self.self_distillation is None or step <= self.self_distillation:
            return loss
        wanted = scores[ENSEMBLE].detach() / recipe.temperature
        learnt = [
            self.in_loss[head] * kl_div(scores[head], wanted, recipe.temperature, columns.excluded)
            for head in self.in_ensemble
        ]
        return (loss + sum(learnt) / len(learnt)) / 2

    def _scores(self, head: str, queries: Texts, passages: Texts, size: int) -> Tensor:
        """[Q, P], or [Q, G] in the reach of a group."""
        scores = SCORERS[head](queries, passages)
        if self.recipe.reach != "group":
            return scores
        own = torch.arange(len(scores) * size, device=scores.device).view(-1, size)  # [Q, G]
        return scores.gather(1, own)
