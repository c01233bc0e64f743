"""What each stage costs at 10^5 to 10^9 texts, by the formulas of docs/scaling.md.

    python benchmarks/scaling.py                         the tables of docs/scaling.md
    python benchmarks/scaling.py --tera 400 --float32-tera 50 --parameters 300e6 --dim 1024

Counts operations and bytes.  Hours follow from what GPUs are assumed to sustain, and from what a core was measured to
do (`MEASURED`: on machine A of docs/benchmarks.md, by benchmarks/growth.py where it says no other).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

MEASURED = {
    "ingest": 9.5e-6,  # seconds of a core for a text
    "split": 67e-6,
    "mine": 6.8e-6,  # without reading its vector
    "merge": 45e-9,  # seconds of a core for a query, a block of texts and a candidate: the best of blocks' best
    "parts": 180e-9,  # and for a query, a part of the search and a text found: the best of the parts' best
    "ingest_bytes": 141,  # of memory for a text
    "split_bytes": 24,
    "mine_bytes": 69,
    "process": 0.2,  # GB: a process, with what it holds at any size
    "compressed_bytes": 3.8,  # on disk for a word of a text
}


@dataclass(frozen=True)
class Setting:
    """What the costs depend on beside the number of texts; the defaults are what docs/scaling.md assumes."""

    parameters: float = 85e6  # of the embedder's layers, and the reranker's; embeddings of words cost no products
    dim: int = 768  # of a vector
    tokens: int = 96  # of a text, mean
    words: int = 70
    query_tokens: int = 16
    queries: float = 500_000  # at most; so many for each text where that is fewer
    share: float = 0.1
    depth: int = 210  # texts found for a query: the end of mine.range_for_sampling
    negatives: int = 15  # mined for a query, all scored
    group: int = 8  # passages of a query in training
    batch: int = 8192  # mine.search_batch_size
    tera: float = 125  # 10^12 operations a second that a GPU sustains in bfloat16: 40% of an A100's 312
    float32_tera: float = 15  # and in float32 without shortcuts, as an exact search wants it: 75% of 19.5
    core_tera: float = 0.03  # of a core in float32, in faiss' exact search: measured
    cores: int = 16  # of a job
    disk: float = 0.4  # GB of vectors a second that a job reads: measured, one thread decodes them


def queries(n: float, s: Setting) -> float:
    return min(s.queries, s.share * n)


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


def batches(n: float, s: Setting) -> float:
    return -(-queries(n, s) // s.batch)


def reading(n: float, s: Setting) -> float:
    """Hours of reading in an exact search: for each batch of queries all vectors twice, to find and to score again."""
    return 2 * vectors(n, s) * batches(n, s) / s.disk / 3600


def merging(n: float, s: Setting) -> float:
    """Hours of a core in an exact search: each block's candidates among the best so far."""
    blocks = -(-n // min(65536, 2**27 // (4 * s.dim)))
    return MEASURED["merge"] * queries(n, s) * (s.depth + 16) * blocks / 3600


def searching(n: float, s: Setting, seconds: float) -> float:
    """Hours on the clock of an exact search of n texts in one job, where the products take so many `seconds`.

    In the first reading a thread reads ahead; the second one has little to do beside.
    """
    read = reading(n, s) / 2
    return max(seconds / 3600 + merging(n, s), read) + read


def on_gpu(n: float, s: Setting) -> float:
    """Hours on the clock of an exact search, all parts at once, a GPU each; `queries` are those of n texts."""
    part = n / shards(n)
    return searching(part, _asked(n, s), search(n, s) / shards(n) * 3600)


def on_cores(n: float, s: Setting) -> float:
    """The same on CPUs."""
    seconds = 2 * n * queries(n, s) * s.dim / shards(n) / (s.cores * s.core_tera * 1e12)
    return searching(n / shards(n), _asked(n, s), seconds)


def _asked(n: float, s: Setting) -> Setting:
    """As many queries for a part as for all n texts: `queries` takes a tenth of the texts."""
    return replace(s, share=queries(n, s) / (n / shards(n)))


def cells(n: float) -> int:
    """Of an inverted file: 1,024 at 10^5 texts, 16,384 from 10^7 on."""
    return 1024 if n < 1e6 else 4096 if n < 1e7 else 16384


def indexed(n: float, s: Setting, nprobe: int = 64, code: int = 96, lookups: float = 1e9) -> float:
    """Hours on the clock of a search through IVF…,PQ in one job of CPUs: training, filling, asking and reading.

    Args:
        lookups: in tables of products, a second and core: assumed.
    """
    training = 10 * 2 * 64 * cells(n) ** 2 * s.dim  # operations: ten rounds over 64 vectors a cell
    filling = 2 * n * (cells(n) + 256) * s.dim
    asked = queries(n, s) * nprobe * n / cells(n) * code
    seconds = (training + filling) / (s.cores * s.core_tera * 1e12) + asked / (s.cores * lookups)
    return seconds / 3600 + (2 + batches(n, s)) * vectors(n, s) / s.disk / 3600


def found(n: float, s: Setting) -> float:
    """GB on disk for each part of a search: a score and an id for each text found."""
    return queries(n, s) * s.depth * 12 / 1e9


def ingest(n: float, s: Setting) -> float:
    return MEASURED["ingest"] * n / 3600


def split(n: float, s: Setting) -> float:
    return MEASURED["split"] * n / 3600


def mine(n: float, s: Setting) -> float:
    """Hours of one job after the search: texts and vectors once, and the parts' findings put together."""
    parts = MEASURED["parts"] * queries(n, s) * s.depth * shards(n) if shards(n) > 1 else 0
    return (MEASURED["mine"] * n + parts + vectors(n, s) / s.disk) / 3600


def clock(n: float, s: Setting) -> float:
    """Hours from raw files to a trained model: one stage after the other, parts at once, training on one GPU."""
    parts = (embed(n, s) + scores(n, s)) / shards(n)
    return ingest(n, s) + split(n, s) + parts + on_gpu(n, s) + mine(n, s) + train(n, s)


def disk(n: float, s: Setting) -> float:
    """GB: texts, vectors, what searches found, a checkpoint of weights and optimiser."""
    texts = n * s.words * MEASURED["compressed_bytes"] / 1e9
    return texts + vectors(n, s) + (found(n, s) * shards(n) if shards(n) > 1 else 0) + 16 * s.parameters / 1e9


def held(stage: str, n: float, s: Setting) -> float:
    """GB of memory of ingest, split or mine; mine holds the queries' vectors too, twice while it reads them."""
    asked = 8 * queries(n, s) * s.dim / 1e9 if stage == "mine" else 0
    return MEASURED["process"] + MEASURED[f"{stage}_bytes"] * n / 1e9 + asked


def held_in_search(n: float, s: Setting) -> float:
    """GB of memory: two blocks, a batch's candidates, the queries' vectors."""
    batch = 100 * min(s.batch, queries(n, s)) * (s.depth + 16)
    return MEASURED["process"] + (2 * 2**27 + batch + 8 * queries(n, s) * s.dim) / 1e9


def compressed(n: float, s: Setting, code: int = 96) -> float:
    """GB in memory of an index with product quantisation (IVF…,PQ96), its ids included, or of what it is trained on."""
    return max(n * (code + 8), min(n, 64 * cells(n)) * 4 * s.dim) / 1e9


def shards(n: float) -> int:
    """Parts of at most ten million texts, or 99 parts, the most there can be."""
    return min(99, math.ceil(n / 10e6))


TIME = {
    "texts": lambda n, s: f"10^{len(str(int(n))) - 1}",
    "queries": lambda n, s: f"{queries(n, s):,.0f}",
    "ingest": lambda n, s: hours(ingest(n, s)),
    "split": lambda n, s: hours(split(n, s)),
    "embed, GPU": lambda n, s: hours(embed(n, s)),
    "search, GPU": lambda n, s: hours(search(n, s)),
    "shards": lambda n, s: str(shards(n)),
    "a shard's search": lambda n, s: hours(on_gpu(n, s)),
    "the same, batches of 65,536": lambda n, s: hours(on_gpu(n, replace(s, batch=65536))),
    "mine": lambda n, s: hours(mine(n, s)),
    "scores, GPU": lambda n, s: hours(scores(n, s)),
    "train, GPU": lambda n, s: hours(train(n, s)),
    "all, on the clock": lambda n, s: hours(clock(n, s)),
}
SPACE = {
    "texts": TIME["texts"],
    "disk": lambda n, s: size(disk(n, s)),
    "of it vectors": lambda n, s: size(vectors(n, s)),
    "found, a shard": lambda n, s: size(found(n, s)),
    "ingest": lambda n, s: size(held("ingest", n, s)),
    "split": lambda n, s: size(held("split", n, s)),
    "search": lambda n, s: size(held_in_search(n, s)),
    "mine": lambda n, s: size(held("mine", n, s)),
}
SWITCH = {
    "texts": TIME["texts"],
    "Flat, a GPU a shard": lambda n, s: hours(on_gpu(n, s)),
    "Flat, 16 cores a shard": lambda n, s: hours(on_cores(n, s)),
    "IVF-PQ, 16 cores": lambda n, s: hours(indexed(n, s)),
    "its cells": lambda n, s: f"{cells(n):,}",
    "its memory": lambda n, s: size(compressed(n, s)),
}


def hours(value: float) -> str:
    return f"{value * 3600:.0f} s" if value < 1 / 60 else f"{value * 60:.0f} min" if value < 1 else f"{value:,.1f} h"


def size(gigabytes: float) -> str:
    return f"{gigabytes * 1000:.0f} MB" if gigabytes < 1 else f"{gigabytes:,.0f} GB"


def table(columns: Mapping[str, Callable[[float, Setting], str]], s: Setting) -> str:
    rows = [[column(10.0**power, s) for column in columns.values()] for power in range(5, 10)]
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Setting):
        kind = int if isinstance(field.default, int) and field.name in ("dim", "batch", "depth", "cores") else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    setting = Setting(**vars(parser.parse_args()))
    print(*(table(columns, setting) for columns in (TIME, SPACE, SWITCH)), sep="\n", end="")


if __name__ == "__main__":
    main()
