"""Losses over query-major scores: tensors in, a scalar out.

They know neither models nor processes nor the config, so that each can be checked by hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(scores: Tensor, targets: Tensor, temperature: float = 1.0, excluded: Tensor | None = None) -> Tensor:
    """InfoNCE (van den Oord et al., arXiv:1807.03748): cross entropy of picking the positive's column.

    Args:
        scores: similarities, float [Q, P].
        targets: column of each query's positive, int64 [Q].
        temperature: scores are divided by it.
        excluded: columns that are no negatives of the query, bool [Q, P]; a target always stays.

    Returns:
        The mean over queries, scalar.
    """
    logits = scores / temperature  # [Q, P]
    if excluded is not None:
        excluded = excluded.scatter(1, targets[:, None], False)
        logits = logits.masked_fill(excluded, -torch.inf)
    return F.cross_entropy(logits, targets)


def kl_div(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Soft cross entropy towards the teacher's distribution over the group; its gradient is that of the KL divergence.

    Args:
        student: similarities of each query with its group, float [Q, G]; divided by the temperature.
        teacher: the teacher's scores of the same pairs, float [Q, G]; taken as they are.

    Returns:
        The mean over queries, scalar.
    """
    wanted = F.softmax(teacher, dim=-1)  # [Q, G]
    return -(wanted * F.log_softmax(student / temperature, dim=-1)).sum(-1).mean()


def listwise(logits: Tensor) -> Tensor:
    """Cross entropy over each group's logits [Q, G], whose first column is the positive."""
    return info_nce(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


DISTILLATION: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"kl_div": kl_div}
"""Losses by `train.kd_loss_type`: (student [Q, G], teacher [Q, G], temperature) → scalar."""
