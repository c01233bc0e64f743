"""How many of the nearest texts an approximate index finds, beside the exact search, and what it costs.

    python benchmarks/recall.py                                                   synthetic vectors
    python benchmarks/recall.py --index-factory IVF1024,PQ96np --nprobe 1 16 64
    python benchmarks/recall.py --vectors results/demo/embed/base/docstrings      those of a run

Prints a line for each `--nprobe`: of the exact search's best 10, 100 and `--k` texts, the share among the index's best
as many; and the time of a query.  Then, in one JSON line, that and what training and filling took.  Times are seconds
of CPU, all threads together.  Scores are exact, as in the workflow: the index proposes twice as many texts as are
asked for.

Synthetic texts are unit vectors in clusters, the clusters in groups, the variances of dimensions falling; a query is a
text, moved.  Recall depends on how far (`SPREAD`): what a model's own vectors allow is to be measured with them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from retune import tables
from retune.data import index, search
from retune.data.files import expand

BLOCK = 50_000
MEMBERS, GROUP = 50, 20  # texts of a cluster, clusters of a group
SPREAD = 1.2, 1.2, 0.9  # of clusters about their group, of texts about their cluster, of queries about their text
META = {"model": "synthetic", "revision": "None", "pooling": "mean", "normalize": "True"}


def spread(rng: np.random.Generator, centres: np.ndarray, by: float) -> np.ndarray:
    """Unit vectors about `centres` float32 [n, D], at a distance of `by` times their length; float32 [n, D]."""
    dim = centres.shape[1]
    noise = rng.standard_normal(centres.shape, np.float32) * np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    found = centres + by * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def make(folder: Path, n_texts: int, n_queries: int, dim: int) -> None:
    """The tables `texts.parquet` and `queries.parquet` of vectors, float16 [n, dim]."""
    rng = np.random.default_rng(0)
    n_clusters = max(1, n_texts // MEMBERS)
    groups = spread(rng, np.zeros((max(1, n_clusters // GROUP), dim), np.float32), 1)
    clusters = spread(rng, groups[rng.integers(0, len(groups), n_clusters)], SPREAD[0])
    chosen = np.sort(rng.choice(n_texts, n_queries, replace=False))
    queries = []
    schema = tables.embeddings_schema(dim, "float16")
    with tables.writer(folder / "texts.parquet", schema, META) as out:
        for start in range(0, n_texts, BLOCK):
            ids = np.arange(start, min(start + BLOCK, n_texts))
            texts = spread(rng, clusters[rng.integers(0, n_clusters, len(ids))], SPREAD[1])
            out.write({"id": ids, "vector": tables.vector_array(texts.astype(np.float16))})
            queries.append(spread(rng, texts[chosen[np.isin(chosen, ids)] - start], SPREAD[2]))
    with tables.writer(folder / "queries.parquet", schema, META) as out:
        vectors = np.concatenate(queries).astype(np.float16)
        out.write({"id": np.arange(n_queries), "vector": tables.vector_array(vectors)})


def recalls(found: np.ndarray, best: np.ndarray, depths: Sequence[int]) -> list[float]:
    """For each depth, the mean share of ids `best` [Q, :depth] that are in `found` [Q, :depth]."""
    pairs = list(zip(found, best, strict=True))
    return [float(np.mean([np.isin(right[:d], left[:d]).mean() for left, right in pairs])) for d in depths]


def measure(queries: np.ndarray, shards: Sequence[Path], factory: str, nprobe: Sequence[int], k: int) -> dict:
    """Recall and seconds a query by `nprobe`, and the costs of the index."""
    depths = sorted({min(10, k), min(100, k), k})
    start = time.process_time()
    best = search.top_k(queries, shards, k)[1]  # [Q, k]
    exact = time.process_time() - start
    built = index.build(shards, factory)
    trained = time.process_time() - start - exact
    filled = built._of(None)[1]
    found = {
        "factory": factory, "texts": search.count(shards), "dim": queries.shape[1], "queries": len(queries),
        "exact_seconds_a_query": round(exact / len(queries), 5), "train_seconds": round(trained, 1),
        "fill_seconds": round(time.process_time() - start - exact - trained, 1),
        "nprobe": {},
    }  # fmt: skip
    print(f"| nprobe | {' | '.join(f'recall@{depth}' for depth in depths)} | ms a query |")
    print(f"|{' --- |' * (len(depths) + 2)}")
    for cells in nprobe:
        faiss.ParameterSpace().set_index_parameter(filled, "nprobe", cells)
        start = time.process_time()
        ids = built.search(queries, k)[1]  # [Q, k]
        told = [*recalls(ids, best, depths), 1000 * (time.process_time() - start) / len(queries)]
        found["nprobe"][cells] = [round(one, 4) for one in told]
        print(f"| {cells} | {' | '.join(f'{one:.3f}' for one in told[:-1])} | {told[-1]:.1f} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=500, help="at most")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--vectors", type=Path, help="a folder of embed: its queries.parquet and texts-*.parquet")
    parser.add_argument("--index-factory", default="IVF1024,PQ48np")
    parser.add_argument("--nprobe", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--k", type=int, default=210, help="texts asked for")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.vectors or Path(temporary)
        if not args.vectors:
            make(folder, args.texts, args.queries, args.dim)
        shards = [Path(file) for file in expand([str(folder / "texts*.parquet")], "vectors")]
        queries = search.load(folder / "queries.parquet")
        rows = np.linspace(0, len(queries) - 1, min(args.queries, len(queries))).astype(int)
        print(json.dumps(measure(queries[rows], shards, args.index_factory, args.nprobe, args.k)))


if __name__ == "__main__":
    main()
