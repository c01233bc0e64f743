"""Tokens through a model, fast: flat token arrays, length-sorted batches under a token budget.

One engine serves embedding and scoring.  It knows arrays and a function from a padded batch to
rows of results; nothing of prompts, pooling or tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retune.model.budget import TokenBudget, out_of_memory, room_to_double
from retune.model.transfer import Results, sent
from retune.runtime import UserError


@dataclass(frozen=True)
class Tokens:
    """Token ids of many texts, kept flat: text i is `ids[offsets[i]:offsets[i + 1]]`.

    ids int32 [total], offsets int64 [n + 1], type_ids int8 [total] or None (segments of a pair).
    """

    ids: np.ndarray
    offsets: np.ndarray
    type_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [n]."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Tokens:
        """The texts at `rows`, in that order."""
        where, offsets = ragged(self.offsets[:-1][rows], self.lengths[rows])
        return Tokens(self.ids[where], offsets, None if self.type_ids is None else self.type_ids[where])


def ragged(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of many slices of a flat array, one after the other, and the offsets of each in the result."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths), offsets


def tokens_of(encodings: Sequence[Sequence[int]]) -> Tokens:
    """Lists of token ids as flat arrays."""
    lengths = np.fromiter((len(one) for one in encodings), np.int64, len(encodings))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.empty(offsets[-1], np.int32)
    for start, one in zip(offsets, encodings, strict=False):
        ids[start : start + len(one)] = one
    return Tokens(ids, offsets)


class Tokenizer:
    """The fast tokenizer of a checkpoint, cutting at a given length; a slow one where there is no other."""

    def __init__(self, tokenizer) -> None:
        self.hf = tokenizer
        self.fast = getattr(tokenizer, "backend_tokenizer", None)
        self._saved = (self.fast.truncation, self.fast.padding) if self.fast else (None, None)

    def __call__(self, texts: Sequence[str], max_length: int | None, special: bool = True) -> Tokens:
        """Ids of the texts, special tokens included where `special`, cut to `max_length` in all."""
        if self.fast is None:
            options = {"truncation": True, "max_length": max_length} if max_length else {}
            return tokens_of(self.hf(list(texts), add_special_tokens=special, **options)["input_ids"])
        self.fast.no_padding()
        if max_length:
            self.fast.enable_truncation(max_length)
        else:
            self.fast.no_truncation()
        encoded = self.fast.encode_batch_fast(list(texts), add_special_tokens=special)
        return tokens_of([one.ids for one in encoded])

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer as it was loaded, without the last call's lengths."""
        truncation, padding = self._saved
        if self.fast is not None:
            self.fast.no_truncation() if truncation is None else self.fast.enable_truncation(**truncation)
            self.fast.no_padding() if padding is None else self.fast.enable_padding(**padding)
        self.hf.save_pretrained(folder)


def rounded(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """Lengths rounded up to `multiple`, those of short texts to a finer power of two: a sixteenth is added at most.

    So there are few shapes, some 16 between a length and its double, and little padding.
    """
    finest = 1 << np.log2(np.maximum(lengths, 16) // 16).astype(np.int64)  # below 32: 1, below 64: 2, ...
    step = np.minimum(multiple, finest)
    return -(-lengths // step) * step


def pad(tokens: Tokens, rows: np.ndarray, pad_id: int, multiple: int = 1) -> dict[str, Tensor]:
    """The texts at `rows` as rectangular tensors, padded on the right to a multiple of `multiple`.

    Returns input_ids int64 [B, L]; attention_mask int64 [B, L] only where there is padding;
    token_type_ids int64 [B, L] where the tokens have segments.
    """
    lengths = tokens.lengths[rows]
    width = int(-(-lengths.max() // multiple) * multiple)
    filled = np.arange(width) < lengths[:, None]  # [B, L]
    part = tokens.take(rows)
    ids = np.full(filled.shape, pad_id, np.int64)
    ids[filled] = part.ids
    batch = {"input_ids": torch.from_numpy(ids)}
    if not filled.all():
        batch["attention_mask"] = torch.from_numpy(filled.astype(np.int64))
    if part.type_ids is not None:
        types = np.zeros(filled.shape, np.int64)
        types[filled] = part.type_ids
        batch["token_type_ids"] = torch.from_numpy(types)
    return batch


def run(
    forward: Callable[..., Tensor], tokens: Tokens, *, pad_id: int, max_tokens: int | TokenBudget, multiple: int,
    device: torch.device, bar=None,
) -> np.ndarray:  # fmt: skip
    """`forward(**batch)` → [B, ...] over all texts, in the order of `tokens`; float32 [n, ...].  See `stream`."""
    results = Results(len(tokens))
    for rows, out in stream(
        forward, tokens, pad_id=pad_id, max_tokens=max_tokens, multiple=multiple, device=device, bar=bar
    ):
        results.add(rows, out)
    return results.array()


@torch.inference_mode()
def stream(
    forward: Callable[..., Any], tokens: Tokens, *, pad_id: int, max_tokens: int | TokenBudget, multiple: int,
    device: torch.device, bar=None,
) -> Iterator[tuple[np.ndarray, Any]]:  # fmt: skip
    """(rows [B], `forward(**batch)`) of batches, until all texts are done; a single tensor comes in float32.

    Longest texts first.  A batch that does not fit the memory is tried again with fewer texts, and
    the budget stays lower; nothing that was computed is computed again.

    Args:
        max_tokens: padded tokens of a batch; a budget that is found goes on where the last call left it.
        multiple: what lengths are rounded up to, see `rounded`.
        bar: told of the texts that are done.

    Raises:
        UserError: if one text alone does not fit the memory.
    """
    budget = max_tokens if isinstance(max_tokens, TokenBudget) else TokenBudget(max_tokens)
    order = np.argsort(-tokens.lengths, kind="stable")
    widths = np.maximum(rounded(tokens.lengths, multiple), 1)
    start = 0
    while start < len(order):
        width = int(widths[order[start]])
        rows = order[start : start + budget.rows(width)]
        out = _fitting(forward, pad(tokens, rows, pad_id, width), device)
        if out is None:
            if len(rows) == 1:
                raise UserError(
                    f"one text of {tokens.lengths[rows[0]]} tokens does not fit the memory; cut it by a *_max_length"
                )
            budget.failed(len(rows) * width)
            torch.cuda.empty_cache()
            continue
        yield rows, out
        if budget.growing:
            budget.fitted(len(rows) * width, room_to_double(device))
        start += len(rows)
        if bar is not None:
            bar.update(len(rows))


def _fitting(forward: Callable[..., Any], batch: dict[str, Tensor], device: torch.device) -> Any:
    """The batch's results, a single tensor in float32; None where they do not fit the memory."""
    try:
        out = forward(**{name: sent(part, device) for name, part in batch.items()})
        return out.float() if isinstance(out, Tensor) else out
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    return None  # only now is what the attempt held free
