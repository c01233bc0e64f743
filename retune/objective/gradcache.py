"""GradCache (Gao et al., arXiv:2101.06983): a batch of any size in the memory of one chunk of it.

A contrastive loss needs the representations of the whole batch at once, but not the graphs behind
them.  So the chunks' outputs are computed first, with nothing kept but the random state at which
each began; then the loss on all of them; then, chunk after chunk, the outputs again with the same
random state, and their backward pass with the gradient that the loss gave them.

This is activation checkpointing with a chunk as the unit, and is built on torch's: one backward pass
runs through loss and chunks, the last chunk first, and has a chunk recomputed when it gets there.
So whatever holds of a backward pass holds here without being done again: loss scaling, autocast,
accumulation, DistributedDataParallel's one reduction a step, the gradient gathered across processes.
The gradient is that of the plain form bit for bit, and it makes no difference to it how many
chunks are recomputed.

Works on outputs of any shape [n, ...]: an embedder's vectors, a reranker's logits.  Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Chunk = Mapping[str, Tensor]
Forward = Callable[..., Tensor]


def outputs(
    forward: Forward, chunks: Sequence[Chunk], keep: int | None = None, first: int | None = None
) -> list[Tensor]:
    """`forward(**chunk)` of every chunk, in their order.

    Args:
        forward: chunk → [rows, ...]; what it draws at random, it draws from torch's own generators.
        chunks: padded batches with `input_ids` [rows, length].
        keep: padded tokens whose graphs are kept at most; None keeps all, 0 as few as there can be.  They are
            the last chunks', which the backward pass frees before it recomputes any other.
        first: the first chunk whose graph is kept, where that is decided already.
    """
    if first is None:
        first = first_kept(chunks, keep)
    first = first if torch.is_grad_enabled() else 0
    return [forward(**chunk) if row >= first else _recomputed(forward, chunk) for row, chunk in enumerate(chunks)]


def first_kept(chunks: Sequence[Chunk], keep: int | None) -> int:
    """The first chunk whose graph is kept.

    The last chunk's always is: the backward pass would begin by recomputing it.
    """
    first, left = len(chunks) - 1, keep
    if keep is None:
        return 0
    left -= chunks[first]["input_ids"].numel()
    while first > 0 and chunks[first - 1]["input_ids"].numel() <= left:
        first -= 1
        left -= chunks[first]["input_ids"].numel()
    return first


def _recomputed(forward: Forward, chunk: Chunk) -> Tensor:
    names = list(chunk)

    def run(*values: Tensor) -> Tensor:
        return forward(**dict(zip(names, values, strict=True)))

    # By position: the devices whose random state is kept are read off positional arguments alone.
    return checkpoint(run, *chunk.values(), use_reentrant=False, preserve_rng_state=True)


def graph_bytes(forward: Forward, chunk: Chunk) -> int:
    """Bytes that the graph of `forward(**chunk)` holds, weights among them; the random state stays as it was."""
    held: dict[int, int] = {}  # by address of the storage: views of one tensor count once

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(iter(chunk.values())).device
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(devices, device_type=device.type),
        torch.enable_grad(),
        saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        kept = forward(**chunk)  # alive until counted, so that no address is used twice
    del kept
    return sum(held.values())
