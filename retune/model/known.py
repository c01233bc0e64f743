"""How well-known embedding checkpoints are used, by name: pooling, prompts, what a checkpoint's files leave unsaid.

A row only fills what the checkpoint does not say itself; where the two differ the checkpoint's word holds,
with a warning.  Names are the last part of a hub id, or of a folder's path; numbers and sizes are matched
by patterns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Known:
    """A row; None for what the checkpoint says, or leaves to its family."""

    family: str = "encoder"
    pooling: str | None = None
    normalize: bool = True
    query: str | None = None
    """What stands before a query."""
    passage: str | None = None
    """What stands before a passage."""
    query_format: str | None = None
    """Where a query's instruction and the query go."""
    max_length: int | None = None
    looks_both_ways: bool = False
    """A language model whose tokens see the whole text; what transformers' own class needs to be told."""


MEAN, CLS = Known(pooling="mean", max_length=512), Known(pooling="cls", max_length=512)
E5 = Known(pooling="mean", query="query: ", passage="passage: ", max_length=512)
NOMIC = Known(pooling="mean", query="search_query: ", passage="search_document: ", max_length=8192)
INSTRUCT = Known("decoder", "last_token", query_format="Instruct: {}\nQuery: {}")
TAGGED = Known("decoder", "last_token", query_format="<instruct>{}\n<query>{}")

KNOWN: dict[str, Known] = {
    r"bge-(small|base|large)-(en|zh)(-v1\.5)?": CLS,
    r"bge-m3": Known("m3", "cls", max_length=8192),
    r"bge-multilingual-gemma2": TAGGED,
    r"bge-en-icl": Known("icl", "last_token", query_format="<instruct>{}\n<query>{}"),
    r"bce-embedding-base_v1": CLS,
    r"gte-(small|base|large)": MEAN,
    r"gte-(small|base|large)-zh": CLS,
    r"gte-(base|large)-en-v1\.5": Known(pooling="cls", max_length=8192),
    r"gte-multilingual-base": Known(pooling="cls", max_length=8192),
    r"gte-modernbert-base": Known(pooling="cls", max_length=8192),
    r"gte-Qwen2-(1\.5B|7B)-instruct": Known(
        "decoder", "last_token", query_format="Instruct: {}\nQuery: {}", looks_both_ways=True
    ),
    r"(multilingual-)?e5-(small|base|large)(-v2)?": E5,
    r"multilingual-e5-large-instruct": Known(
        pooling="mean", query_format="Instruct: {}\nQuery: {}", max_length=512
    ),
    r"e5-mistral-7b-instruct": INSTRUCT,
    r"SFR-Embedding-(Mistral|2_R)": INSTRUCT,
    r"Linq-Embed-Mistral": INSTRUCT,
    r"Qwen3-Embedding-(0\.6B|4B|8B)": Known("decoder", "last_token", query_format="Instruct: {}\nQuery:{}"),
    r"stella-base-en-v2": MEAN,
    r"all-mpnet-base-v2": Known(pooling="mean", max_length=384),
    r"all-MiniLM-L(6|12)-v2": Known(pooling="mean", max_length=256),
    r"nomic-embed-text-v1(\.5)?": NOMIC,
    r"modernbert-embed-(base|large)": NOMIC,
}  # fmt: skip
"""By the name's pattern."""


def known(model: str | Path) -> Known | None:
    """What is known of a checkpoint by its reference; None for any other."""
    parts = str(model).rstrip("/").split("/")
    names = [parts[-1], *(part.split("--")[-1] for part in parts if part.startswith("models--"))]  # the hub's cache
    for name in names:
        for pattern, row in KNOWN.items():
            if re.fullmatch(pattern, name, re.IGNORECASE):
                return row
    return None
