"""The training objective of an embedder: which passages count against a query, and the losses' sum.

Scope says whose passages are negatives: those of the query's own `group`, of the process's whole
`batch`, or of the batches of all processes, the `world`.  Distillation adds the teacher's
distribution over the group to InfoNCE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retune.objective.gather import gather, gather_with_gradient, world
from retune.objective.losses import DISTILLATION, info_nce
from retune.objective.scores import group_columns, group_scores, known_positives, score_matrix


@dataclass(frozen=True)
class Candidates:
    """What is known of a batch's passages besides their vectors."""

    passage_ids: Tensor
    """The passage behind each column of this process, int64 [Q * G], group after group; the positive comes first."""
    positive_rows: Tensor
    """Query row of each known positive, int64 [K]."""
    positive_ids: Tensor
    """Passage id of each known positive, int64 [K]."""
    in_batch: Tensor
    """Whether other groups' passages count as negatives, bool [Q]."""
    teacher: Tensor | None = None
    """The teacher's scores, float [Q, G]."""


Matrix = tuple[Tensor, Tensor, Tensor]  # scores [Q, P], columns of the own group [Q, G], passage ids [P]


def _batch(queries: Tensor, passages: Tensor, ids: Tensor) -> Matrix:
    own = group_columns(len(queries), len(passages) // len(queries), 0, queries.device)
    return score_matrix(queries, passages), own, ids


def _world(queries: Tensor, passages: Tensor, ids: Tensor) -> Matrix:
    first = world()[0] * len(passages)
    own = group_columns(len(queries), len(passages) // len(queries), first, queries.device)
    return score_matrix(queries, gather_with_gradient(passages)), own, gather(ids)


SCOPES: dict[str, Callable[[Tensor, Tensor, Tensor], Matrix]] = {"batch": _batch, "world": _world}
"""How far in-batch negatives reach; `group` needs no matrix of all pairs."""


@dataclass(frozen=True)
class Recipe:
    """Query and passage vectors → loss."""

    scope: str = "batch"
    temperature: float = 0.02
    distillation: str | None = None
    mask_false_negatives: bool = True

    def __call__(self, queries: Tensor, passages: Tensor, candidates: Candidates) -> Tensor:
        """The loss of a batch: a scalar.

        Args:
            queries: vectors, float [Q, d].
            passages: vectors, float [Q * G, d], group after group, the positive first.
            candidates: ids, known positives, opt-outs and teacher scores.
        """
        group = group_scores(queries, passages)  # [Q, G]
        if self.scope == "group":
            loss = info_nce(group, torch.zeros(len(queries), dtype=torch.long, device=queries.device), self.temperature)
        else:
            scores, own, ids = SCOPES[self.scope](queries, passages, candidates.passage_ids)
            loss = info_nce(scores, own[:, 0], self.temperature, self._excluded(own, ids, candidates))
        if self.distillation is not None:
            loss = loss + DISTILLATION[self.distillation](group, candidates.teacher, self.temperature)
        return loss

    def _excluded(self, own: Tensor, ids: Tensor, candidates: Candidates) -> Tensor:
        """Columns that are no negatives of a query: bool [Q, P]."""
        excluded = (~candidates.in_batch)[:, None].expand(-1, len(ids))  # [Q, P]
        if self.mask_false_negatives:
            rows, positives = candidates.positive_rows, candidates.positive_ids
            excluded = excluded | known_positives(ids, rows, positives, len(own))
        return excluded.scatter(1, own, False)  # a query's own group always counts
