"""Rerankers written out plainly, one pair at a time in float32: what the fast ones are compared with.

The decoder uses nothing of transformers: weights by name, and formulas from the papers.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import some_texts
from torch import Tensor

QUESTION = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
SHORT = "Predict whether passage B contains an answer to query A."
PAIRS = list(zip(some_texts(24, 1, longest=10), some_texts(24, 2, longest=40), strict=True))
PAIRS += [("", "bar"), ("bar cost?", ""), ("", "")]


def tokens_of(tokenizer, query: str, passage: str, prompt=QUESTION, max_length=200, query_max_length=None):
    """Ids of a pair, and where the passage begins and ends, as BAAI's decoders want them."""

    def ids(text, limit=None):
        return tokenizer(text, add_special_tokens=False)["input_ids"][:limit]

    line, asked = ids("\n"), ids(prompt)
    first = [tokenizer.bos_token_id, *ids(f"A: {query}", query_max_length or max_length * 3 // 4)]
    second = [*line, *ids(f"B: {passage}", max_length)][: max(max_length + len(line) + len(asked) - len(first), 0)]
    start = len(first) + len(line)
    return [*first, *second, *line, *asked], start, len(first) + len(second)


def adapters(model: torch.nn.Module, folder: Path, seed: int = 0) -> Path:
    """LoRA adapters with random weights for a model's q and v, saved in `folder`."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder)
    return folder


class Plain:
    """A Llama-like decoder, with MiniCPM's scales or Gemma 2's norms, bounds and windows.

    Args:
        folder: a checkpoint with `model.*` weights in one file.
        config: its config.json.
    """

    def __init__(self, folder: Path, config: dict) -> None:
        self.weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
        self.config, self.n = config, config["num_hidden_layers"]
        self.gemma = "gemma" in config["model_type"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[name]
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * (1 + weight) if self.gemma else x * weight

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions, x [heads, L, width]."""
        half = x.shape[-1] // 2
        speed = 10000.0 ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[1])[:, None] * speed  # [L, half]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def attention(self, x: Tensor, layer: int) -> Tensor:
        config, name = self.config, f"model.layers.{layer}.self_attn."
        heads = config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        width = config.get("head_dim") or config["hidden_size"] // heads
        q, k, v = (
            (x @ self.weights[f"{name}{part}_proj.weight"].T).view(len(x), count, width).transpose(0, 1)
            for part, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = self.rotate(q), self.rotate(k)
        k, v = k.repeat_interleave(heads // groups, 0), v.repeat_interleave(heads // groups, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(config.get("query_pre_attn_scalar", width))  # [heads, L, L]
        if cap := config.get("attn_logit_softcapping"):
            scores = cap * torch.tanh(scores / cap)
        place = torch.arange(len(x))
        seen = place[None] <= place[:, None]
        if config.get("sliding_window") and layer % 2 == 0:
            seen = seen & (place[:, None] - place[None] < config["sliding_window"])
        mixed = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v  # [heads, L, width]
        return mixed.transpose(0, 1).reshape(len(x), -1) @ self.weights[f"{name}o_proj.weight"].T

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        gate, up, down = (
            self.weights[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        act = (lambda t: torch.nn.functional.gelu(t, approximate="tanh")) if self.gemma else torch.nn.functional.silu
        return (act(x @ gate.T) * (x @ up.T)) @ down.T

    def layer(self, x: Tensor, layer: int) -> Tensor:
        name = f"model.layers.{layer}."
        if self.gemma:
            y = self.attention(self.norm(x, name + "input_layernorm.weight"), layer)
            x = x + self.norm(y, name + "post_attention_layernorm.weight")
            y = self.mlp(self.norm(x, name + "pre_feedforward_layernorm.weight"), layer)
            return x + self.norm(y, name + "post_feedforward_layernorm.weight")
        scale = self.config.get("scale_depth", math.sqrt(self.n)) / math.sqrt(self.n)
        x = x + scale * self.attention(self.norm(x, name + "input_layernorm.weight"), layer)
        return x + scale * self.mlp(self.norm(x, name + "post_attention_layernorm.weight"), layer)

    def states(self, ids: list[int], start: int = 0, end: int = 0, merge_after=(), ratio: int = 1) -> list[Tensor]:
        """The last token's state after 0, 1, …, n layers, normed, [D] each.

        Tokens start to end (the passage) are merged by `ratio` after each of the layers `merge_after`.
        """
        x = self.weights["model.embed_tokens.weight"][torch.tensor(ids)]  # [L, D]
        x = x * (math.sqrt(self.config["hidden_size"]) if self.gemma else self.config.get("scale_emb", 1))
        found = []
        for depth in range(self.n + 1):
            found.append(self.norm(x[-1], "model.norm.weight"))
            if depth in merge_after and ratio > 1:
                merged = [x[at : min(at + ratio, end)].mean(0) for at in range(start, end, ratio)]
                x = torch.cat([x[:start], *(one[None] for one in merged), x[end:]])
                end = start + len(merged)
            if depth < self.n:
                x = self.layer(x, depth)
        return found
