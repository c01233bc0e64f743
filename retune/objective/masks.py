"""Columns of a score matrix that are no negatives of their row: bool [R, C], true where excluded.

By id, before the loss: two texts are the same where their ids are, whatever their vectors say.  And
by a margin against the positive's score, for the positives that nobody has marked.
"""

from __future__ import annotations

import torch
from torch import Tensor


def columns_holding(column_ids: Tensor, rows: Tensor, ids: Tensor, n_rows: int) -> Tensor:
    """Which columns hold one of the ids that a row names: bool [R, C].

    Args:
        column_ids: what is behind each column, int64 [C].
        rows, ids: one entry a named (row, id), int64 [K] each.
    """
    (ordered, order), ids = column_ids.sort(), ids.contiguous()
    low, high = torch.searchsorted(ordered, ids), torch.searchsorted(ordered, ids, right=True)  # [K] each
    counts = high - low  # [K]: columns of each id
    entry = torch.repeat_interleave(counts)  # [H]: the entry behind each hit
    within = torch.arange(len(entry), device=ids.device) - (counts.cumsum(0) - counts)[entry]  # [H]
    found = torch.zeros(n_rows, len(column_ids), dtype=torch.bool, device=column_ids.device)
    found[rows[entry], order[low[entry] + within]] = True
    return found


def above_margin(scores: Tensor, targets: Tensor, margin: float) -> Tensor:
    """Which columns score above their row's target less a margin: bool [R, C]; has no gradient.

    Args:
        scores: similarities, float [R, C].
        targets: column of each row's own target, int64 [R].
        margin: below 0, a column must exceed the target by as much.
    """
    scores = scores.detach()
    return scores > scores.gather(1, targets[:, None]) - margin


def outside(excluded: Tensor, own: Tensor, own_excluded: Tensor | None = None) -> Tensor:
    """`excluded` [R, C] with a row's own columns [R, G] counting, but for those in `own_excluded` [R, G]."""
    return excluded.scatter(1, own, False if own_excluded is None else own_excluded)
