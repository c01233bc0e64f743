"""Similarities between queries and passages as query-major matrices.

Rows are queries and columns are passages; where passages look for their queries, they are the rows.
Tensors in, tensors out: nothing here knows a model, a process group or a config.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def first_dims(vectors: Tensor, dim: int, normalize: bool) -> Tensor:
    """The vectors of a Matryoshka model cut to `dim` dimensions: [n, d] → [n, dim], of length 1 if `normalize`."""
    if dim == vectors.shape[-1]:
        return vectors
    cut = vectors[:, :dim]
    return F.normalize(cut, dim=-1) if normalize else cut
