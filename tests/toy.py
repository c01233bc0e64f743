"""Small tables for tests of training: each query is the beginning of its positive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tiny import WORDS

from retune import tables
from retune.model.embedder import Embedder


def toy_tables(
    folder: Path, n_queries: int = 24, n_negatives: int = 3, seed: int = 0, **changed: list
) -> dict[str, Path]:
    """Tables texts, queries and pairs in `folder`; columns of queries or pairs may be `changed`.

    Text i is the positive of query i; texts from `n_queries` on are negatives.
    """
    rng = np.random.default_rng(seed)
    n_texts = 2 * n_queries
    texts = [" ".join(rng.choice(WORDS, rng.integers(4, 24))) for _ in range(n_texts)]
    nothing = [None] * n_queries
    queries = {
        "query_id": range(n_queries), "dataset": ["toy"] * n_queries, "key": nothing, "prompt": nothing,
        "type": nothing, "category": nothing,
        "text": [" ".join(text.split()[:3]) for text in texts[:n_queries]], "in_batch_negatives": [True] * n_queries,
        "batch_size": nothing, "split": ["train"] * n_queries,
        "source": [f"toy.jsonl:{row + 1}" for row in range(n_queries)],
    }  # fmt: skip
    pairs: dict[str, list] = {"query_id": [], "text_id": [], "label": []}
    for query in range(n_queries):
        negatives = rng.choice(np.arange(n_queries, n_texts), n_negatives, replace=False)
        pairs["query_id"] += [query] * (1 + n_negatives)
        pairs["text_id"] += [query, *negatives.tolist()]
        pairs["label"] += [1] + [0] * n_negatives
    n_pairs = len(pairs["label"])
    pairs |= {"origin": ["given"] * n_pairs, "similarity": [None] * n_pairs, "score": [None] * n_pairs}
    queries |= {name: values for name, values in changed.items() if name in queries and name != "query_id"}
    pairs |= {name: values for name, values in changed.items() if name in pairs}
    contents = {
        "texts": {"text_id": range(n_texts), "text": texts, "key": [None] * n_texts},
        "queries": {name: list(values) for name, values in queries.items()},
        "pairs": pairs,
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.parquet" for name in contents}
    for name, columns in contents.items():
        tables.write(paths[name], name, {column: list(values) for column, values in columns.items()})
    return paths


def mrr(model: Embedder, folder: Path) -> float:
    """Of the toy queries among all toy texts of `folder`, by a model's vectors; ties count against the positive."""
    queries = model.encode_queries(tables.read(folder / "tables/queries.parquet", "queries")["text"].to_pylist())
    texts = model.encode_passages(tables.read(folder / "tables/texts.parquet", "texts")["text"].to_pylist())
    scores = queries @ texts.T
    own = scores[np.arange(len(queries)), np.arange(len(queries))]
    return float((1 / (scores >= own[:, None]).sum(1)).mean())
