"""What a model makes of texts, by head: a dict of tensors, whose tokens lie flat, one text after the other.

    dense     float [n, d]: a vector a text
    lengths   int64 [n]: tokens of each text
    ids       int64 [T]: the tokens
    sparse    float [T]: how much each token counts
    colbert   float [T - n, c]: a vector for each token but a text's first

A dense model has `dense` alone.  Tensors in, tensors out; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from retune.objective.gather import gather, gather_with_gradient, world

Texts = Mapping[str, Tensor]
SHORTER = {"ids": 0, "sparse": 0, "colbert": 1}
"""Of the tensors with a row a token: tokens at the beginning of each text that have none."""


def joined(parts: Sequence[Texts]) -> dict[str, Tensor]:
    """The texts of several dicts, one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def select(texts: Texts, rows: Tensor) -> dict[str, Tensor]:
    """The texts at `rows` int64 [m], in that order."""
    found = {}
    for name, values in texts.items():
        if name in SHORTER:
            values = values.index_select(0, _tokens(texts["lengths"] - SHORTER[name], rows))
        else:
            values = values.index_select(0, rows)
        found[name] = values
    return found


def _tokens(lengths: Tensor, rows: Tensor) -> Tensor:
    """Places of the tokens of the texts at `rows`, one text after the other: int64 [t]."""
    starts, chosen = lengths.cumsum(0) - lengths, lengths[rows]  # [n], [m]
    shift = starts[rows] - (chosen.cumsum(0) - chosen)  # [m]
    return torch.arange(int(chosen.sum()), device=rows.device) + shift.repeat_interleave(chosen)


def gathered(texts: Texts) -> dict[str, Tensor]:
    """The texts of all processes, rank after rank, with gradients as `gather_with_gradient` has them.

    Every process must have as many texts; tokens may differ in number and are padded on the way.
    """
    size = world()[1]
    if size == 1:
        return dict(texts)
    found = {}
    for name, values in texts.items():
        share: Callable[[Tensor], Tensor] = gather_with_gradient if values.is_floating_point() else gather
        if name not in SHORTER:
            found[name] = share(values)
            continue
        counts = gather(torch.tensor([len(values)], device=values.device)).tolist()
        width = max(counts)
        room = values.new_zeros(width - len(values), *values.shape[1:])
        everyones = share(torch.cat([values, room]))  # [W * width, ...]
        found[name] = torch.cat([everyones[rank * width : rank * width + n] for rank, n in enumerate(counts)])
    return found
