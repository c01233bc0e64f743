"""Chunks of several processes in step, as FSDP needs them, where each process has but a part of every weight.

To run a layer is then something that all processes do together, and each must do it equally often and in the same
order.  But a process computes its batch in as many chunks as its texts need, and keeps as many graphs as its memory
holds.  So whoever has fewer chunks computes fillers as well: one row of its narrowest chunk, whose outputs count for
nothing.  They come first, which the backward pass meets last, and all processes recompute chunks at the same places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from retune.objective import gradcache
from retune.objective.gather import most
from retune.objective.gradcache import Chunk, Forward


def outputs(forward: Forward, chunks: Sequence[Chunk], keep: int | None = None) -> list[Tensor]:
    """As `gradcache.outputs`, in step with all other processes."""
    device = chunks[0]["input_ids"].device
    fillers = most(len(chunks), device) - len(chunks)
    filled = [_filler(chunks)] * fillers + list(chunks)
    first = most(gradcache.first_kept(filled, keep), device)
    found = gradcache.outputs(forward, filled, first=first)
    return [_with_nothing_of(found[fillers], found[:fillers]), *found[fillers + 1 :]]


def _filler(chunks: Sequence[Chunk]) -> Chunk:
    narrowest = min(chunks, key=lambda chunk: chunk["input_ids"].shape[1])
    return {name: values[:1] for name, values in narrowest.items()}


def _with_nothing_of(output, fillers: Sequence):
    """`output` as it is, with a graph that leads through the fillers too: their gradients are 0."""
    if not fillers:
        return output
    nothing = sum(0.0 * values.sum() for filler in fillers for values in _learnt(filler).values())
    if isinstance(output, Tensor):
        return output + nothing
    return output | {name: values + nothing for name, values in _learnt(output).items()}


def _learnt(output: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = output if isinstance(output, Mapping) else {"": output}
    return {name: values for name, values in named.items() if values.requires_grad}
