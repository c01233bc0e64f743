"""New tokens: for the tokenizer, and rows of the embedding layer for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def add_tokens(tokenizer, backbone: torch.nn.Module, tokens: Sequence[str]) -> int:
    """Make `tokens` special ones, which are never split; returns how many of them are new, and get a row."""
    known = len(tokenizer)
    new = tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    grow(backbone, known, len(tokenizer))
    return new


@torch.no_grad()
def grow(backbone: torch.nn.Module, known: int, size: int) -> None:
    """Let the embedding layer have rows for `size` tokens, of which those from `known` on are new.

    A new row is the mean of the known ones, so nothing is drawn, and a model that is put together from
    its base and its tokenizer has the rows that were trained on. Rows that a checkpoint has to spare are used.
    """
    if size <= known:
        return
    if size > len(backbone.get_input_embeddings().weight):
        with torch.random.fork_rng():  # what is drawn for the rows is written over
            backbone.resize_token_embeddings(size, mean_resizing=False)
    rows = backbone.get_input_embeddings().weight  # [V, D]
    rows[known:size] = rows[:known].double().mean(0).to(rows.dtype)
