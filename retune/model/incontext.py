r"""In-context learning for queries (bge-en-icl, arXiv:2409.15700): solved examples before a query, a suffix after it.

    <instruct>I\n<query>an example's\n<response>its answer\n\n<instruct>I\n<query>the query\n<response>

All of it is text: the model never knows.  Only the query itself is ever cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retune.model.engine import Tokenizer

if TYPE_CHECKING:
    from retune.config import ExampleConfig

BETWEEN = "\n\n"  # after each example
SLACK = 16  # tokens more than its parts that a whole may have


@dataclass(frozen=True)
class Context:
    """What stands around every query."""

    suffix: str
    examples: str = ""
    """Ready made, the break after the last one included."""


def rendered(examples: Sequence[ExampleConfig], template: str, instruction: str | None) -> str:
    """Solved examples as they stand before a query; `instruction` is that of those which have none of their own."""
    parts = [template.format(one.instruct or instruction or "", one.query, one.response) for one in examples]
    return "".join(part + BETWEEN for part in parts)


def cut(tokenizer: Tokenizer, texts: Sequence[str], limit: int | np.ndarray) -> list[str]:
    """The beginnings of texts that have at most `limit` tokens, special ones not counted; one for each, or for all."""
    limits = np.broadcast_to(np.maximum(limit, 0), len(texts))
    lengths = tokenizer(texts, None, special=False).lengths  # which also switches truncation off
    found = list(texts)
    for row in np.flatnonzero(lengths > limits):
        if not limits[row]:
            found[row] = ""
        elif tokenizer.fast is not None:
            offsets = tokenizer.fast.encode(texts[row], add_special_tokens=False).offsets
            last, following = offsets[limits[row] - 1 : limits[row] + 1]
            found[row] = texts[row][: min(last[1], following[0])]  # a character of several tokens is not torn
        else:
            ids = tokenizer.hf(texts[row], add_special_tokens=False)["input_ids"]
            found[row] = tokenizer.hf.decode(ids[: limits[row]])
    return found
