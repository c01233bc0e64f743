"""What each stage costs at 10^5 to 10^9 texts, by the formulas of docs/scaling.md.

    python benchmarks/scaling.py                         the table of docs/scaling.md
    python benchmarks/scaling.py --tera 400 --float32-tera 50 --parameters 300e6 --dim 1024

Counts operations and bytes; hours follow from what a GPU is assumed to sustain.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Setting:
    """What the costs depend on beside the number of texts; the defaults are what docs/scaling.md assumes."""

    parameters: float = 85e6  # of the embedder's layers, and the reranker's; embeddings of words cost no products
    dim: int = 768  # of a vector
    tokens: int = 96  # of a text, mean
    query_tokens: int = 16
    queries: float = 500_000  # at most; a tenth of the texts where that is fewer
    depth: int = 210  # texts found for a query: the end of mine.range_for_sampling
    negatives: int = 15  # mined for a query, all scored
    group: int = 8  # passages of a query in training
    batch: int = 8192  # mine.search_batch_size
    tera: float = 125  # 10^12 operations a second that a GPU sustains in bfloat16: 40% of an A100's 312
    float32_tera: float = 15  # and in float32 without shortcuts, as an exact search wants it: 75% of 19.5
    disk: float = 1.0  # GB a second that a job reads


def queries(n: float, s: Setting) -> float:
    return min(s.queries, n / 10)


def embed(n: float, s: Setting) -> float:
    """GPU hours: a product and a sum for each weight and token."""
    return 2 * s.parameters * (n * s.tokens + queries(n, s) * s.query_tokens) / (s.tera * 3.6e15)


def search(n: float, s: Setting) -> float:
    """GPU hours of an exact search: a product and a sum for each text, query and dimension."""
    return 2 * n * queries(n, s) * s.dim / (s.float32_tera * 3.6e15)


def scores(n: float, s: Setting) -> float:
    """GPU hours: each query with its positive and its mined negatives."""
    pairs = queries(n, s) * (1 + s.negatives)
    return 2 * s.parameters * pairs * (s.tokens + s.query_tokens) / (s.tera * 3.6e15)


def train(n: float, s: Setting) -> float:
    """GPU hours of an epoch: forward, and twice that backward."""
    tokens = queries(n, s) * (s.query_tokens + s.group * s.tokens)
    return 6 * s.parameters * tokens / (s.tera * 3.6e15)


def vectors(n: float, s: Setting) -> float:
    """GB on disk: float16, and an id."""
    return n * (2 * s.dim + 8) / 1e9


def reading(n: float, s: Setting) -> float:
    """Hours of reading in a search: all vectors for each batch of queries."""
    return vectors(n, s) * -(-queries(n, s) // s.batch) / s.disk / 3600


def found(n: float, s: Setting) -> float:
    """GB on disk for each part of a search: a score and an id for each text found."""
    return queries(n, s) * s.depth * 12 / 1e9


def compressed(n: float, code: int = 96) -> float:
    """GB in memory of an index with product quantisation (IVF…,PQ96), its ids included."""
    return n * (code + 8) / 1e9


def shards(n: float) -> int:
    """Parts of at most ten million texts, at most 99: a power of two where there are fewer."""
    return next((2**i for i in range(7) if n / 2**i <= 10e6), 99)


COLUMNS = {
    "texts": lambda n, s: f"10^{len(str(int(n))) - 1}",
    "queries": lambda n, s: f"{queries(n, s):,.0f}",
    "embed": lambda n, s: hours(embed(n, s)),
    "search, Flat": lambda n, s: hours(search(n, s)),
    "scores": lambda n, s: hours(scores(n, s)),
    "train, an epoch": lambda n, s: hours(train(n, s)),
    "vectors": lambda n, s: size(vectors(n, s)),
    "read in a search": lambda n, s: hours(reading(n, s)),
    "shards": lambda n, s: str(shards(n)),
    "found, a shard": lambda n, s: size(found(n, s)),
    "IVF-PQ in memory": lambda n, s: size(compressed(n)),
}


def hours(value: float) -> str:
    return f"{value * 3600:.0f} s" if value < 1 / 60 else f"{value * 60:.0f} min" if value < 1 else f"{value:,.1f} h"


def size(gigabytes: float) -> str:
    return f"{gigabytes * 1000:.0f} MB" if gigabytes < 1 else f"{gigabytes:,.0f} GB"


def table(s: Setting) -> str:
    rows = [[column(10.0**power, s) for column in COLUMNS.values()] for power in range(5, 10)]
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Setting):
        kind = int if isinstance(field.default, int) and field.name in ("dim", "batch", "depth") else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    print(table(Setting(**vars(parser.parse_args()))), end="")


if __name__ == "__main__":
    main()
