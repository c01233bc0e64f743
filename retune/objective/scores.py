"""Similarities between queries and passages as query-major matrices.

Rows are queries and columns are passages, always.  Tensors in, tensors out: nothing here knows a
model, a process group or a config.
"""

from __future__ import annotations

import torch
from torch import Tensor


def score_matrix(queries: Tensor, passages: Tensor) -> Tensor:
    """Inner products of every query with every passage: [Q, d] and [P, d] → [Q, P]."""
    return queries @ passages.T


def group_scores(queries: Tensor, passages: Tensor) -> Tensor:
    """Inner products of each query with its own group's passages: [Q, d] and [Q * G, d] → [Q, G].

    Passages lie group after group, in the order of the queries.
    """
    groups = passages.view(queries.shape[0], -1, passages.shape[-1])  # [Q, G, d]
    return torch.einsum("qd,qgd->qg", queries, groups)


def group_columns(n_queries: int, group_size: int, first: int = 0, device: torch.device | None = None) -> Tensor:
    """Columns of each query's own group within a score matrix: int64 [Q, G].

    `first` is the column at which this process's passages begin.
    """
    columns = torch.arange(n_queries * group_size, device=device) + first  # [Q * G]
    return columns.view(n_queries, group_size)


def known_positives(passage_ids: Tensor, rows: Tensor, ids: Tensor, n_queries: int) -> Tensor:
    """Which columns hold a known positive of which query: bool [Q, P].

    Args:
        passage_ids: the passage behind each column, int64 [P].
        rows, ids: one entry a known (query row, passage id), int64 [K] each.
    """
    if not len(ids):
        return torch.zeros(n_queries, len(passage_ids), dtype=torch.bool, device=passage_ids.device)
    span = torch.maximum(passage_ids.max(), ids.max()) + 1
    every_row = torch.arange(n_queries, device=passage_ids.device)
    cells = every_row[:, None] * span + passage_ids[None, :]  # [Q, P]: one number a (row, passage)
    return torch.isin(cells, rows * span + ids)
