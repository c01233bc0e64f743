"""Losses over query-major scores: tensors in, a scalar out.

They know neither models nor processes nor the config, so that each can be checked by hand.

Everywhere a score is a similarity that is yet to be divided by the temperature, a group's first
member is its positive, a teacher's scores are taken as they are, and the loss is the mean over
queries of equal weight: the mean over processes is then that of the joint batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


def pointwise(logits: Tensor) -> Tensor:
    """Binary cross entropy of each pair, logits [Q, G], of which the first column is the positive: the mean, scalar."""
    wanted = torch.zeros_like(logits)
    wanted[:, 0] = 1
    return F.binary_cross_entropy_with_logits(logits, wanted)


def listwise(logits: Tensor) -> Tensor:
    """Cross entropy over each group's logits [Q, G], whose first column is the positive."""
    return info_nce(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def kl_div(student: Tensor, teacher: Tensor, temperature: float = 1.0, excluded: Tensor | None = None) -> Tensor:
    """Soft cross entropy towards the teacher's distribution over the group; its gradient is that of the KL divergence.

    Args:
        student: similarities of each query with its group, float [Q, G]; divided by the temperature.
        teacher: the teacher's scores of the same pairs, float [Q, G]; taken as they are.
        excluded: members that do not count, bool [Q, G].

    Returns:
        The mean over queries, scalar.
    """
    logits, wanted = _without(student / temperature, excluded), _shares(teacher, excluded)  # [Q, G] each
    return -(wanted * F.log_softmax(logits, dim=-1)).sum(-1).mean()


def margin_mse(student: Tensor, teacher: Tensor, temperature: float = 1.0, excluded: Tensor | None = None) -> Tensor:
    """Margin-MSE (Hofstätter et al., arXiv:2010.02666): squared error of the margins positive − negative.

    The temperature applies: at 1 this is the paper's loss, for vectors of any length; below 1 it lets
    the margins of normalised vectors, 2 at most, reach those of a cross-encoder's logits.

    Args:
        student, teacher, excluded: as for `kl_div`.

    Returns:
        The mean over each query's negatives, then over queries, scalar.
    """
    margins = (student[:, :1] - student[:, 1:]) / temperature  # [Q, G - 1]
    wanted = teacher[:, :1] - teacher[:, 1:]  # [Q, G - 1]
    counted = torch.ones_like(margins) if excluded is None else (~excluded[:, 1:]).to(margins.dtype)
    errors = (margins - wanted).square() * counted
    return (errors.sum(1) / counted.sum(1).clamp(min=1)).mean()


def m3_kd_loss(
    scores: Tensor, own: Tensor, teacher: Tensor, temperature: float = 1.0, excluded: Tensor | None = None
) -> Tensor:
    """The distillation of BGE-M3 as FlagEmbedding trains it (`kd_loss_type: m3_kd_loss`).

    Each member of the group in turn is the target of an InfoNCE over all columns but the members before
    it, weighted with the teacher's softmax over the group.  The order is the group's, not the teacher's: a
    member never competes with those before it, so a negative that the teacher prefers to the positive does
    not push the positive down.  There is no InfoNCE beside it: the positive's turn is one.

    Args:
        scores: similarities, float [Q, P].
        own: columns of each query's group, int64 [Q, G].
        teacher: the teacher's scores of the group, float [Q, G].
        excluded: columns that count for nothing, bool [Q, P]; members among them have no turn.

    Returns:
        The mean over queries, scalar.
    """
    logits, size = _without(scores / temperature, excluded), own.shape[1]
    in_group = torch.zeros_like(logits, dtype=torch.bool).scatter(1, own, True)  # [Q, P]
    others = _without(logits, in_group).logsumexp(1, keepdim=True)  # [Q, 1]
    members = logits.gather(1, own)  # [Q, G]
    before = torch.ones(size, size, dtype=torch.bool, device=own.device).tril(-1)  # [G, G]: turn i, member j < i
    left = _without(members[:, None, :].expand(-1, size, -1), before).logsumexp(2)  # [Q, G]
    losses = torch.logaddexp(others, left) - members  # [Q, G]: cross entropy of each turn
    weights = _shares(teacher, None if excluded is None else excluded.gather(1, own))
    return (weights * losses).sum(1).mean()


def _without(logits: Tensor, excluded: Tensor | None) -> Tensor:
    """The logits with the lowest finite number where excluded: it weighs nothing, and times 0 it is 0."""
    return logits if excluded is None else logits.masked_fill(excluded, torch.finfo(logits.dtype).min)


def _shares(teacher: Tensor, excluded: Tensor | None) -> Tensor:
    """The teacher's softmax over the group's members that count, float [Q, G]."""
    return F.softmax(_without(teacher, excluded), dim=-1)


# ---- distillation by name -----------------------------------------------------------------------

OnColumns = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


class Distillation(NamedTuple):
    """A loss that follows a teacher, and how it goes with InfoNCE."""

    loss: OnColumns
    """(scores [Q, P], own [Q, G], teacher [Q, G], temperature, excluded [Q, P]) → scalar."""
    group_only: bool
    """Whether it looks at the group's columns alone."""
    info_nce_weight: float
    """Weight of the InfoNCE that is added, where the user names none."""


def _on_group(loss: Callable[[Tensor, Tensor, float, Tensor | None], Tensor]) -> OnColumns:
    """A loss over group scores as one over columns."""

    def on_columns(scores: Tensor, own: Tensor, teacher: Tensor, temperature: float, excluded: Tensor | None) -> Tensor:
        in_group = None if excluded is None else excluded.gather(1, own)
        return loss(scores.gather(1, own), teacher, temperature, in_group)

    return on_columns


DISTILLATION: dict[str, Distillation] = {
    "kl_div": Distillation(_on_group(kl_div), group_only=True, info_nce_weight=1.0),
    "m3_kd_loss": Distillation(m3_kd_loss, group_only=False, info_nce_weight=0.0),
    "margin_mse": Distillation(_on_group(margin_mse), group_only=True, info_nce_weight=0.0),
}
"""By `train.kd_loss_type`.  The weights are the incumbents': soft cross entropy comes with InfoNCE, m3_kd_loss has it
within, and margin_mse stands alone."""
