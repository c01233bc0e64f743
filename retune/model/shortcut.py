"""Which models have a faster form on a CPU (`fused`, and `flat_training` with gradients), and when it may be used.

Whatever is not recognised or lies on a GPU goes through its own forward, with a word in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from retune.model.flat_training import FlatTraining
from retune.model.fused import FROM_PADDING, FlatEncoder, Packed, Plain
from retune.runtime import log

HEADS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "BertForSequenceClassification": lambda model, hidden: model.classifier(model.bert.pooler(hidden)),
    "RobertaForSequenceClassification": lambda model, hidden: model.classifier(hidden),
    "XLMRobertaForSequenceClassification": lambda model, hidden: model.classifier(hidden),
    "CamembertForSequenceClassification": lambda model, hidden: model.classifier(hidden),
}
"""Recognised classifiers: (model, first token's hidden state [B, 1, D]) → logits [B, labels]."""


class Shortcut:
    """The flat form of a backbone, made when it is first asked for, where there is one and it may be used.

    Attributes:
        encoder: the flat form that was last used. enabled: set to False, the model's own forward is always used.

    Args:
        trains: whether there is one for training too.
    """

    def __init__(self, products: type[Plain] | type[Packed] | None = None, trains: bool = False) -> None:
        self.encoder: FlatEncoder | None = None
        self.enabled, self.trains, self._told = True, trains, False
        self._products, self._because, self._settled = products, None, False

    def of(self, backbone: nn.Module, attention_mask: Tensor | None = None) -> FlatEncoder | FlatTraining | None:
        """The flat form; None where the model's own forward is to be used, with a word in the log."""
        if not self.enabled or torch.is_autocast_enabled("cpu"):
            return None
        if attention_mask is not None and not attention_mask.any(1).all():  # a text without tokens
            return None
        if torch.is_grad_enabled():
            return self._in_training(backbone)
        if not self._settled:
            self._look(backbone)
        return None if self._because else self.encoder

    def _in_training(self, backbone: nn.Module) -> FlatTraining | None:
        weight = next(backbone.parameters())
        if not (self.trains and backbone.training and weight.device.type == "cpu"):
            return None
        because = unsupported(backbone) if weight.dtype == torch.float32 else f"it is in {weight.dtype}"
        if because and not self._told:
            log.info("training by the model's own forward: %s", because)
        self._told = self._told or because is not None
        return None if because else FlatTraining(backbone)

    @contextmanager
    def settled(self, backbone: nn.Module) -> Iterator[None]:
        """Within, the backbone is not looked at again: it costs a millisecond, which is much for a small batch."""
        self._look(backbone)
        self._settled = True
        try:
            yield
        finally:
            self._settled = False

    def _look(self, backbone: nn.Module) -> None:
        because = "it is being trained" if backbone.training else unsupported(backbone)
        if because != self._because:
            self._because = because
            log.info("computing by the model's own forward: %s", because or "no longer")
        if because is None and (self.encoder is None or self.encoder.model is not backbone):
            self.encoder = FlatEncoder(backbone, self._products)
        elif because is None:
            self.encoder.prepare()


def unsupported(model: nn.Module) -> str | None:
    """Why the model cannot be computed here; None if it can."""
    name = type(model).__name__
    if name not in FROM_PADDING or not _of_transformers(model):
        return f"{name} is not among {', '.join(FROM_PADDING)}"
    config = model.config
    if config.hidden_act != "gelu" or config.is_decoder or config.add_cross_attention:
        return f"{name} is no plain encoder with GELU (hidden_act {config.hidden_act})"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        return f"its positions are {config.position_embedding_type}"
    odd = [part for part in _parts(model) if type(part) not in (nn.Linear, nn.LayerNorm, nn.Embedding)]
    if odd:  # adapters, quantised layers
        return f"it has a layer of {type(odd[0]).__name__}"
    if any(module._forward_pre_hooks or _hooks(module) for module in model.modules()):
        return "it has hooks"
    kinds = {(weights.device.type, weights.dtype) for part in _parts(model) for weights in part.parameters()}
    if len(kinds) > 1 or min(kinds)[0] != "cpu":
        return "it is not on a CPU in one dtype"
    return None


def _hooks(module: nn.Module) -> list[Callable]:
    """Those after a forward, but for the one by which transformers has gradients let in under recomputed layers."""
    found = module._forward_hooks.values()
    return [hook for hook in found if getattr(hook, "__name__", "") != "make_inputs_require_grads"]


def head_of(model: nn.Module) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """What a sequence classifier does with its encoder's first token, see `HEADS`; None for other models."""
    return HEADS.get(type(model).__name__) if _of_transformers(model) else None


def _of_transformers(model: nn.Module) -> bool:
    """Whether the model's class comes with transformers, and not with a checkpoint."""
    return type(model).__module__.startswith("transformers.models.")


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose weights are used here."""
    tables = model.embeddings
    yield from (tables.word_embeddings, tables.position_embeddings, tables.token_type_embeddings, tables.LayerNorm)
    for layer in model.encoder.layer:
        attention = layer.attention
        yield from (attention.self.query, attention.self.key, attention.self.value, attention.output.dense)
        yield from (attention.output.LayerNorm, layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm)
