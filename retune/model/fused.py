"""BERT-type encoders on a CPU, faster than their own forward: tokens lie flat, one text after the other.

The layers' products see no padding at all, and attention sees texts of one length at a time, so that
nothing is masked.  Activations go into buffers that stay, GELU and the residual sums are done in
place.  In float32 the weights are the model's own; in bfloat16 they are reordered once for oneDNN,
whose products then add the bias, GELU and the residual as they write.

Knows the layers of BERT and RoBERTa and their kin; nothing of pooling or of texts.  For inference
alone: nothing here can be differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, pad, scaled_dot_product_attention

FROM_PADDING = {"BertModel": False, "RobertaModel": True, "XLMRobertaModel": True, "CamembertModel": True}
"""Recognised classes of transformers, and whether their positions are counted from the padding id on, or from 0."""
ROWS = 64  # the packed products' rows are filled up to a multiple: oneDNN compiles a kernel for every new shape


@dataclass(frozen=True)
class Flat:
    """Texts one after the other, in groups of one length.

    ids int64 [T]; type_ids (segments) int64 [T] or None; groups: (first token, texts, length) of each.
    """

    ids: Tensor
    type_ids: Tensor | None
    groups: list[tuple[int, int, int]]

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None = None, type_ids: Tensor | None = None) -> Flat:
        """The texts of a padded batch, int64 [B, L] each; those of one length should be side by side."""
        texts, width = input_ids.shape
        if attention_mask is None:
            return cls(input_ids.flatten(), None if type_ids is None else type_ids.flatten(), [(0, texts, width)])
        real, lengths = attention_mask.bool(), attention_mask.sum(1).numpy()  # [B, L], [B]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        edges = np.append(np.flatnonzero(np.diff(lengths, prepend=-1)), texts)
        groups = [(int(offsets[a]), int(b - a), int(lengths[a])) for a, b in pairwise(edges)]
        return cls(input_ids[real], None if type_ids is None else type_ids[real], groups)

    def positions(self) -> Tensor:
        """Place of each token within its text, from 0, int64 [T]."""
        return torch.cat([torch.arange(length).repeat(texts) for _, texts, length in self.groups])

    def starts(self) -> Tensor:
        """The first token of each text, int64 [B]."""
        return torch.cat([torch.arange(texts) * length + first for first, texts, length in self.groups])


def positions(model: nn.Module, batch: Flat) -> Tensor:
    """Rows of the model's position embeddings, int64 [T].

    RoBERTa's are counted from the padding id on, over the tokens that are not the padding token.
    """
    found = batch.positions()
    if not FROM_PADDING[type(model).__name__]:
        return found
    padding = model.embeddings.padding_idx
    real = batch.ids != padding
    if real.all():
        return found + padding + 1
    counted = real.cumsum(0)
    before = (counted - real.long())[(torch.arange(len(found)) - found)]  # in earlier texts
    return (counted - before) * real + padding


# ---- the layers' products -----------------------------------------------------------------------


def packs(dtype: torch.dtype) -> bool:
    """Whether weights of `dtype` are reordered for oneDNN here.

    In float32 they are not: MKL's products of plain weights are faster (87 against 76 GFLOP/s on a
    core with AVX2), and so is GELU as a pass of its own (oneDNN's fused one costs a third of the product).
    """
    available = dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    return available and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Plain:
    """A layer's products with the model's own weights, through `addmm`; results go to buffers that stay."""

    rows = 1

    def __init__(self, layer: nn.Module) -> None:
        attention = layer.attention.self
        self.qkv = (attention.query, attention.key, attention.value)
        self.out, self.up, self.down = layer.attention.output.dense, layer.intermediate.dense, layer.output.dense

    def split(self, x: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] → queries, keys and values, [T, D] each."""
        q, k, v = buffers.take("qkv", 3, *x.shape)
        for part, linear in zip((q, k, v), self.qkv, strict=True):
            torch.addmm(linear.bias, x, linear.weight.t(), out=part)
        return q, k, v

    def attended(self, x: Tensor, context: Tensor) -> Tensor:
        """x + the projected context, [T, D]; x is overwritten."""
        return x.add_(self.out.bias).addmm_(context, self.out.weight.t())

    def fed(self, x: Tensor, buffers: Buffers) -> Tensor:
        """x + the feed-forward block of x, [T, D]; x is overwritten."""
        inner = buffers.take("inner", len(x), self.up.out_features)
        torch.addmm(self.up.bias, x, self.up.weight.t(), out=inner)
        torch.ops.aten.gelu_(inner)
        return x.add_(self.down.bias).addmm_(inner, self.down.weight.t())


class Packed:
    """The same with weights reordered for oneDNN, and q, k and v in one product."""

    rows = ROWS

    def __init__(self, layer: nn.Module) -> None:
        attention = layer.attention.self
        parts = (attention.query, attention.key, attention.value)
        self.qkv = self._pack(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))
        self.out, self.up, self.down = (
            self._pack(linear.weight, linear.bias)
            for linear in (layer.attention.output.dense, layer.intermediate.dense, layer.output.dense)
        )

    @staticmethod
    def _pack(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None), bias.detach()

    def split(self, x: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.mkldnn._linear_pointwise(x, *self.qkv, "none", [], "").chunk(3, -1)

    def attended(self, x: Tensor, context: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(context, x, *self.out, "add")

    def fed(self, x: Tensor, buffers: Buffers) -> Tensor:
        inner = torch.ops.mkldnn._linear_pointwise(x, *self.up, "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(inner, x, *self.down, "add")


class Buffers:
    """Memory for activations that stays from batch to batch: a fresh block of megabytes costs page faults."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self._blocks = dtype, {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of that shape; what was taken under the name before is gone."""
        size = int(np.prod(shape))
        block = self._blocks.get(name)
        if block is None or len(block) < size:
            self._blocks[name] = None  # freed before the larger one is there
            block = self._blocks[name] = torch.empty(size, dtype=self.dtype)
        return block[:size].view(shape)


# ---- the encoder --------------------------------------------------------------------------------


class FlatEncoder:
    """The forward of a BERT-type encoder over flat tokens.

    Attributes:
        tokens: those computed so far. filling: rows computed besides, to make up a number that the products like.

    Args:
        model: one which `retune.model.shortcut` recognises.
        products: how the layers' products are computed; what suits the dtype where not given.
    """

    def __init__(self, model: nn.Module, products: type[Plain] | type[Packed] | None = None) -> None:
        self.model, self.heads, self._asked = model, model.config.num_attention_heads, products
        self._made_of: tuple | None = None
        self.tokens = self.filling = 0
        self.prepare()

    @torch.inference_mode()
    def __call__(self, batch: Flat, first: bool = False) -> Tensor:
        """Hidden states of the last layer, [T, D]; with `first`, of each text's first token only, [B, D]."""
        blocks = self.model.encoder.layer
        x = self._filled(self._embedded(batch))  # [T', D]
        self.tokens, self.filling = self.tokens + len(batch.ids), self.filling + len(x) - len(batch.ids)
        for block, layer in zip(blocks, self._layers, strict=True):
            alone = first and block is blocks[-1]  # nothing else of the last layer is asked for
            context = self._filled(self._attention(batch, layer.split(x, self._buffers), alone))  # [T', D] or [B', D]
            if alone:
                x = self._filled(x[batch.starts()])  # [B', D]
            x = normed(layer.attended(x, context), block.attention.output.LayerNorm)
            x = normed(layer.fed(x, self._buffers), block.output.LayerNorm)
        return x[: sum(texts for _, texts, _ in batch.groups) if first else len(batch.ids)]

    @torch.inference_mode()
    def prepare(self) -> None:
        """Make the layers; to be called again when the weights may have changed, and then made again if they have."""
        weights = list(self.model.encoder.parameters())
        made_of = tuple((w.data_ptr(), None if w.is_inference() else w._version) for w in weights)
        if made_of != self._made_of:
            dtype = weights[0].dtype
            self._products = self._asked or (Packed if packs(dtype) else Plain)
            self._layers = [self._products(layer) for layer in self.model.encoder.layer]
            self._made_of, self._buffers = made_of, Buffers(dtype)

    def _filled(self, x: Tensor) -> Tensor:
        """x with rows of zeros up to a number that the products like."""
        filling = -len(x) % self._products.rows
        return pad(x, (0, 0, 0, filling)) if filling else x

    def _embedded(self, batch: Flat) -> Tensor:
        """Sums of word, position and segment embeddings, normalised, [T, D]."""
        tables = self.model.embeddings
        x = embedding(batch.ids, tables.word_embeddings.weight)  # [T, D]
        segments = tables.token_type_embeddings.weight
        x += segments[0] if batch.type_ids is None else embedding(batch.type_ids, segments)
        x += embedding(positions(self.model, batch), tables.position_embeddings.weight)
        return normed(x, tables.LayerNorm)

    def _attention(self, batch: Flat, qkv: tuple[Tensor, Tensor, Tensor], first: bool) -> Tensor:
        """Context vectors, [T, D]; with `first`, of each text's first token only, [B, D]."""
        parts = []
        for start, texts, length in batch.groups:
            q, k, v = (part[start : start + texts * length].view(texts, length, self.heads, -1) for part in qkv)
            q, k, v = (part.transpose(1, 2) for part in (q[:, :1] if first else q, k, v))  # [B, H, L, D / H]
            out = scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [B, L, H, D / H]
            parts.append(out.flatten(2).flatten(0, 1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """As the layer does it, without its call."""
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
