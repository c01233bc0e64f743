"""BERT-type encoders trained on a CPU in float32, faster than by their own forward: tokens lie flat, as in `fused`.

The layers' products see no padding, attention sees texts of one length at a time, and dropout draws 16 bits a value
where torch draws 64 of a slower generator.  Everything is differentiated by torch, and the weights are the model's own:
whatever holds of a weight's gradient (DistributedDataParallel, accumulation, GradCache) holds here.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from retune.model.fused import Flat, normed, positions

LEVELS = 1 << 16
RECOMPUTED = "gradient_checkpointing"  # what transformers sets on a layer that keeps no activations


class FlatTraining:
    """The forward of a BERT-type encoder in training over flat tokens.

    Args:
        model: one which `retune.model.shortcut` recognises.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.heads = model, model.config.num_attention_heads

    def __call__(self, batch: Flat, first: bool = False) -> Tensor:
        """Hidden states of the last layer, float32 [T, D]; with `first`, of each text's first token only, [B, D]."""
        x, layers = self._embedded(batch), self.model.encoder.layer  # [T, D]
        for layer in layers:
            alone = first and layer is layers[-1]  # nothing else of the last layer is asked for
            run = partial(self._layer, layer, batch, alone)
            x = checkpoint(run, x, use_reentrant=False) if getattr(layer, RECOMPUTED, False) else run(x)
        return x

    def _layer(self, layer: nn.Module, batch: Flat, first: bool, x: Tensor) -> Tensor:
        own, attended, out = layer.attention.self, layer.attention.output, layer.output
        k, v = _linear(x, own.key), _linear(x, own.value)
        x = x.index_select(0, batch.starts()) if first else x
        context = self._attention(batch, _linear(x, own.query), k, v, own.dropout, first)
        x = normed(_dropped(_linear(context, attended.dense), attended.dropout) + x, attended.LayerNorm)
        inner = gelu(_linear(x, layer.intermediate.dense))
        return normed(_dropped(_linear(inner, out.dense), out.dropout) + x, out.LayerNorm)

    def _embedded(self, batch: Flat) -> Tensor:
        """Sums of word, position and segment embeddings, normalised, [T, D]."""
        tables = self.model.embeddings
        x = _looked_up(batch.ids, tables.word_embeddings)
        if batch.type_ids is None:
            x = x + tables.token_type_embeddings.weight[0]
        else:
            x = x + _looked_up(batch.type_ids, tables.token_type_embeddings)
        x = x + _looked_up(positions(self.model, batch), tables.position_embeddings)
        return _dropped(normed(x, tables.LayerNorm), tables.dropout)

    def _attention(
        self, batch: Flat, q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout, first: bool = False
    ) -> Tensor:  # fmt: skip
        """Context vectors, [T, D]; with `first`, `q` is that of each text's first token, and they are [B, D]."""
        groups = [(texts, length, 1 if first else length) for _, texts, length in batch.groups]
        asked, read = [texts * n for texts, _, n in groups], [texts * length for texts, length, _ in groups]
        weights = [texts * self.heads * length * n for texts, length, n in groups]
        p = dropout.p if dropout.training else 0.0
        kept = kept_values(sum(weights), p).split(weights) if p else [None] * len(groups)
        parts = []
        for (texts, *_), keep, *qkv in zip(groups, kept, q.split(asked), k.split(read), v.split(read), strict=True):
            heads = [part.view(texts, -1, self.heads, part.shape[-1] // self.heads).transpose(1, 2) for part in qkv]
            parts.append(_attend(*heads, keep, p).transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, p: float) -> Tensor:
    """[B, H, L', D / H] of queries, [B, H, L, D / H] of keys and values → [B, H, L', D / H]."""
    if kept is None:
        return scaled_dot_product_attention(q, k, v)
    weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), -1)  # [B, H, L', L]
    return _Dropped.apply(weights, kept.view(weights.shape), p) @ v


def _linear(x: Tensor, module: nn.Linear) -> Tensor:
    return linear(x, module.weight, module.bias)


def _looked_up(ids: Tensor, module: nn.Embedding) -> Tensor:
    return embedding(ids, module.weight, module.padding_idx)


# ---- dropout ------------------------------------------------------------------------------------


def _dropped(x: Tensor, module: nn.Dropout) -> Tensor:
    if not (module.training and module.p):
        return x
    return _Dropped.apply(x, kept_values(x.numel(), module.p).view(x.shape), module.p)


def kept_values(n: int, p: float) -> Tensor:
    """Which of `n` values dropout keeps, bool [n]: each with probability 1 - p, rounded to 1 / 65,536.

    Drawn by a generator that torch's own seeds, so that the same random state gives the same values.
    """
    seed, dropped = int(torch.randint(2**63 - 1, ())), round(p * LEVELS)
    if dropped == LEVELS:
        return torch.zeros(n, dtype=torch.bool)
    drawn = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-n // 4), np.uint64)
    return torch.from_numpy(drawn.view(np.int16))[:n] >= dropped - LEVELS // 2


class _Dropped(torch.autograd.Function):
    """x where it is kept, scaled so that the expectation stays x, and 0 elsewhere."""

    @staticmethod
    def forward(context, x: Tensor, kept: Tensor, p: float) -> Tensor:
        context.save_for_backward(kept)
        context.scale = LEVELS / max(1, LEVELS - round(p * LEVELS))
        return (x * kept).mul_(context.scale)

    @staticmethod
    def backward(context, gradient: Tensor):
        (kept,) = context.saved_tensors
        return (gradient * kept).mul_(context.scale), None, None
