"""BAAI's checkpoints that have a head for each layer, loaded as the standard architectures they are.

bge-reranker-v2-minicpm-layerwise and bge-reranker-v2.5-gemma2-lightweight come with modelling code
written for a transformers of long ago.  What it computes is known: MiniCPM's layers are Granite's,
the lightweight model's are Gemma 2's, and a head is one vector.  So none of that code is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retune.config import RerankerConfig
from retune.model import weights
from retune.model.adapters import fold
from retune.model.backbone import load_whole
from retune.runtime import UserError

COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "attention_bias", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def layers(config: dict[str, Any]) -> range:
    """The layers that have a head; layer 1 is the first."""
    last = config["num_hidden_layers"]
    return range(config.get("start_layer", last), last + 1, config.get("layer_sep", 1))


def places(config: dict[str, Any], cutoffs: list[int]) -> list[int]:
    """Which head reads which of the chosen layers.

    MiniCPM's code reads a layer with the head of that layer, or with the only one.  The lightweight
    model's code takes its heads from the first on, whatever the layers; its published numbers are those.
    """
    if config["model_type"] == "minicpm":
        return [layers(config).index(layer) if config.get("head_multi", True) else 0 for layer in cutoffs]
    return list(range(len(cutoffs)))


class Head(nn.Module):
    """A layer's score from its hidden state; named as in BAAI's checkpoints, so that adapters fit."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear_head = nn.Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype)
        self.linear_head.weight = nn.Parameter(weight)


class WithHeads(nn.Module):
    """A decoder and a head for each of its upper layers, named as in BAAI's checkpoints."""

    def __init__(self, model: nn.Module, heads: list[Head]) -> None:
        super().__init__()
        self.model, self.lm_head, self.config = model, nn.ModuleList(heads), model.config


def _minicpm(config: dict[str, Any], common: dict[str, Any]):
    """MiniCPM scales embeddings, and every residual branch by scale_depth / √layers; so does Granite."""
    from transformers import GraniteConfig

    if (
        config.get("head_type", "simple") != "simple"
        or config.get("rope_scaling")
        or config.get("pretraining_tp", 1) > 1
    ):
        raise UserError(
            f"model: a MiniCPM of head type {config.get('head_type')} or with scaled positions is not known"
        )
    width = config["hidden_size"] // config["num_attention_heads"]
    return GraniteConfig(
        **common, hidden_act=config.get("hidden_act", "silu"), embedding_multiplier=config.get("scale_emb", 1),
        residual_multiplier=config.get("scale_depth", 1) / config["num_hidden_layers"] ** 0.5,
        attention_multiplier=width**-0.5,
    ), None  # fmt: skip


def _lightweight(config: dict[str, Any], common: dict[str, Any]):
    from transformers import Gemma2Config

    if not config.get("layer_wise", True):
        raise UserError("model: a lightweight reranker without heads for its layers (layer_wise: false) is not known")
    own = ("head_dim", "hidden_activation", "query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping")
    chosen = {key: config[key] for key in own if key in config}
    return Gemma2Config(**common, **chosen), config.get("final_logit_softcapping")


STANDARD = {"minicpm": _minicpm, "cost_wise_gemma": _lightweight}
"""model_type of the checkpoints with heads for their layers → (its config as a standard architecture, softcap)."""


def load(
    folder: Path, config: dict[str, Any], settings: RerankerConfig, dtype: torch.dtype
) -> tuple[nn.Module, float | None]:
    """The decoder of a checkpoint with heads for its layers, adapters folded in, and the bound of its scores."""
    from transformers import AutoModel

    common = {key: config[key] for key in COMMON if key in config}
    common["rope_parameters"] = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    standard, softcap = STANDARD[config["model_type"]](config, common)
    stored = weights.tensors(folder)
    names = sorted((name for name in stored if name.startswith("lm_head.")), key=lambda name: (len(name), name))
    if not names or any(not name.endswith("linear_head.weight") or stored[name].shape[0] != 1 for name in names):
        raise UserError(f"model {folder}: no heads of one score a layer (lm_head.0.linear_head.weight and so on)")
    heads = []
    for name in names:
        tensor = stored[name]
        values = weights.to_float64(tensor.read(0, tensor.size), tensor.dtype).astype(np.float32)
        heads.append(Head(torch.from_numpy(values).reshape(tensor.shape).to(dtype)))
    model = load_whole(AutoModel, folder, config=standard, dtype=dtype)
    return fold(WithHeads(model, heads), settings.peft_path), softcap
