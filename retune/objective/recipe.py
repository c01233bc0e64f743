"""The training objective of an embedder: which passages count against a query, and the losses' sum.

Scope says whose passages are negatives: those of the query's own `group`, of the process's whole
`batch`, or of the batches of all processes, the `world`.  InfoNCE is over a query's passages, over a
positive's queries, or the mean of both.  Distillation adds what `losses.DISTILLATION` says.
Matryoshka is the mean of the whole objective over the first d dimensions, for several d.

Works on vectors, wherever they come from: one graph, or chunks that are computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from retune.objective.gather import gather, gather_with_gradient, world
from retune.objective.losses import DISTILLATION, info_nce
from retune.objective.masks import above_margin, columns_holding, outside
from retune.objective.scores import first_dims, group_columns, group_scores, score_matrix

TO_PASSAGE, TO_QUERY = "query_to_passage", "passage_to_query"


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
    counted: Tensor | None = None
    """Which members of a group count, bool [Q, G]; the others only fill a smaller group up.  All, if None."""


class Columns(NamedTuple):
    """What the columns of a score matrix are to its rows."""

    own: Tensor
    """Columns of a row's own group, int64 [R, G]; the first is its target."""
    excluded: Tensor
    """Columns that count for nothing, bool [R, C]; an own one only where it fills its group up."""


class Pool(NamedTuple):
    """What a batch is compared with, within the scope."""

    passages: Tensor
    """float [P, d]"""
    queries: Tensor | None
    """float [P / G, d]; None where no passage looks for its query."""
    to_passage: Columns
    """Of the scores [Q, P]."""
    to_query: Columns | None
    """Of the scores of positives with queries [Q, P / G]."""


@dataclass(frozen=True)
class Recipe:
    """Query and passage vectors → loss."""

    scope: str = "batch"
    """`group`, `batch` or `world`."""
    temperature: float = 0.02
    distillation: str | None = None
    """A name in `losses.DISTILLATION`."""
    mask_false_negatives: bool = True
    """By id: known positives of the query, and what its group has already."""
    false_negative_margin: float | None = None
    """Also what scores above the positive less this; None: nothing."""
    directions: tuple[str, ...] = (TO_PASSAGE,)
    dims: tuple[int, ...] = ()
    """Matryoshka's numbers of dimensions; none: all of them alone."""
    normalize: bool = True
    """Whether vectors cut to fewer dimensions are scaled to length 1, as the model's own are."""
    info_nce_weight: float | None = None
    """Of InfoNCE beside a distillation; its own where None."""

    def __post_init__(self) -> None:
        if self.scope == "group" and TO_QUERY in self.directions:
            raise ValueError("within its group a positive has no query but its own to look for")

    def __call__(self, queries: Tensor, passages: Tensor, candidates: Candidates) -> Tensor:
        """The loss of a batch: a scalar.  With scope `world`, all processes must call it together.

        Args:
            queries: vectors, float [Q, d].
            passages: vectors, float [Q * G, d], group after group, the positive first.
            candidates: ids, known positives, opt-outs and teacher scores.
        """
        pool = self._pool(queries, passages, candidates)
        losses = []
        for dim in self.dims or (queries.shape[-1],):
            cut = partial(first_dims, dim=dim, normalize=self.normalize)
            everyones = None if pool.queries is None else cut(pool.queries)
            part = pool._replace(passages=cut(pool.passages), queries=everyones)
            losses.append(self._loss(cut(queries), part, candidates.teacher))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def measures(self, queries: Tensor, passages: Tensor, candidates: Candidates) -> dict[str, Tensor]:
        """What a batch shows, as scalars without gradients: `positive_similarity` and `negative_similarity`, means
        over all columns that count (NaN without any negative), and `accuracy`, the share of queries whose positive
        scores above all of them.

        Takes what the loss takes; with scope `world`, all processes must call it together.
        """
        pool = self._pool(queries, passages, candidates)
        scores = self._scores(queries, pool.passages)  # [Q, P]
        own, excluded = pool.to_passage.own, self._excluded(scores, pool.to_passage)
        negative = ~excluded.scatter(1, own[:, :1], True)  # [Q, P]
        positives = scores.gather(1, own[:, :1])  # [Q, 1]
        return {
            "positive_similarity": positives.mean(),
            "negative_similarity": (scores * negative).sum() / negative.sum(),
            "accuracy": (~(negative & (scores >= positives)).any(1)).to(scores.dtype).mean(),
        }

    # ---- what counts ----------------------------------------------------------------------------

    @property
    def reach(self) -> str:
        """The scope that the loss makes use of: a teacher of the group alone, without InfoNCE, needs no other."""
        alone = self.distillation is not None and DISTILLATION[self.distillation].group_only and not self._weight
        return "group" if alone else self.scope

    @property
    def _weight(self) -> float:
        """Weight of InfoNCE."""
        if self.distillation is None:
            return 1.0
        own = DISTILLATION[self.distillation].info_nce_weight
        return own if self.info_nce_weight is None else self.info_nce_weight

    def columns(self, n_queries: int, size: int, candidates: Candidates) -> Columns:
        """What the columns of a score matrix are to this process's queries, each with a group of `size`.

        The matrix is [Q, G] where the reach is a group, else [Q, P].  With scope `world`, all processes must call it
        together.
        """
        return self._columns(n_queries, size, candidates)[0]

    def _columns(self, n_queries: int, size: int, candidates: Candidates) -> tuple[Columns, Tensor | None]:
        """`columns`, and which columns are no negatives of a query whatever its group has: bool [Q, P]."""
        counted, device = candidates.counted, candidates.passage_ids.device
        if self.reach == "group":
            own = torch.arange(size, device=device).expand(n_queries, -1)
            excluded = torch.zeros_like(own, dtype=torch.bool) if counted is None else ~counted
            return Columns(own, excluded), None
        everywhere = self.scope == "world"
        share = gather if everywhere else _same
        own = group_columns(n_queries, size, world()[0] * n_queries * size if everywhere else 0, device)
        no_negatives, duplicates = self._no_negatives(own, share(candidates.passage_ids), candidates)
        excluded = no_negatives | duplicates
        if counted is not None:
            excluded = excluded | ~share(counted).view(-1)
        return Columns(own, outside(excluded, own, None if counted is None else ~counted)), no_negatives

    def _pool(self, queries: Tensor, passages: Tensor, candidates: Candidates) -> Pool:
        n_queries, size = len(queries), len(passages) // len(queries)
        to_passage, no_negatives = self._columns(n_queries, size, candidates)
        if self.reach == "group":
            return Pool(passages, None, to_passage, None)
        share, share_vectors = (gather, gather_with_gradient) if self.scope == "world" else (_same, _same)
        if TO_QUERY not in self.directions:
            return Pool(share_vectors(passages), None, to_passage, None)
        own = to_passage.own
        to_query = _transposed(no_negatives[:, ::size], own[:, :1] // size, candidates.in_batch, share)
        return Pool(share_vectors(passages), share_vectors(queries), to_passage, to_query)

    def _no_negatives(self, own: Tensor, ids: Tensor, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """Columns that are no negatives of a query, and those that its group has already: bool [Q, P] each."""
        opted_out = (~candidates.in_batch)[:, None].expand(-1, len(ids))  # [Q, P]
        if not self.mask_false_negatives:
            return opted_out, torch.zeros_like(opted_out)
        positives = columns_holding(ids, candidates.positive_rows, candidates.positive_ids, len(own))
        rows = torch.arange(len(own), device=ids.device).repeat_interleave(own.shape[1])  # [Q * G]
        return opted_out | positives, columns_holding(ids, rows, candidates.passage_ids, len(own))

    def _excluded(self, scores: Tensor, columns: Columns) -> Tensor:
        """The columns' own exclusions, and by the margin: bool [R, C]."""
        if self.false_negative_margin is None:
            return columns.excluded
        above = above_margin(scores, columns.own[:, 0], self.false_negative_margin)
        return columns.excluded | outside(above, columns.own)

    # ---- losses ---------------------------------------------------------------------------------

    def _scores(self, queries: Tensor, passages: Tensor) -> Tensor:
        """[Q, G] in the reach of a group, else [Q, P]."""
        return (group_scores if self.reach == "group" else score_matrix)(queries, passages)

    def on_scores(self, scores: Tensor, columns: Columns, teacher: Tensor | None) -> Tensor:
        """The loss of any scores of this process's queries, such as one of several heads gives.

        Args:
            scores: float [Q, G] where the reach is a group, else [Q, P]. columns: from `columns`.
            teacher: the teacher's scores, float [Q, G].
        """
        return self._total(scores, columns, [], teacher)

    def _loss(self, queries: Tensor, pool: Pool, teacher: Tensor | None) -> Tensor:
        scores, reverse = self._scores(queries, pool.passages), []  # [Q, P]
        if self._weight and pool.to_query is not None:
            positives = pool.passages.index_select(0, pool.to_passage.own[:, 0])  # [Q, d]
            back = score_matrix(positives, pool.queries)  # [Q, P / G]
            masked = self._excluded(back, pool.to_query)
            reverse.append(info_nce(back, pool.to_query.own[:, 0], self.temperature, masked))
        return self._total(scores, pool.to_passage, reverse, teacher)

    def _total(self, scores: Tensor, columns: Columns, reverse: list[Tensor], teacher: Tensor | None) -> Tensor:
        """InfoNCE, averaged with that of the other direction, and the distillation."""
        own, excluded, losses = columns.own, self._excluded(scores, columns), []
        if self._weight and TO_PASSAGE in self.directions:
            losses.append(info_nce(scores, own[:, 0], self.temperature, excluded))
        losses += reverse
        loss = self._weight * torch.stack(losses).mean() if losses else scores.new_zeros(())
        if self.distillation is not None:
            distil = DISTILLATION[self.distillation].loss
            loss = loss + distil(scores, own, teacher, self.temperature, excluded)
        return loss


def _same(values: Tensor) -> Tensor:
    return values


def _transposed(no_negatives: Tensor, own: Tensor, in_batch: Tensor, share: Callable[[Tensor], Tensor]) -> Columns:
    """The columns of the scores of this process's positives with the queries of all.

    Args:
        no_negatives: of this process's queries with all positives, bool [Q, P / G].
        own: each positive's query among all, int64 [Q, 1].
        in_batch: bool [Q]; a query that opted out is no negative, and its positive has none.
        share: gathers rows.
    """
    everyones = share(no_negatives.to(torch.uint8)).bool()  # [P / G, P / G]: queries × positives
    excluded = everyones[:, own[:, 0]].T | ~in_batch[:, None]  # [Q, P / G]
    return Columns(own, outside(excluded, own))
