"""Time and peak memory of mining over many texts of synthetic vectors, in a process of its own.

    python benchmarks/memory.py [--texts 1000000] [--queries 2000] [--dim 384] [--shards 4]
        [--retriever dense] [--index-factory Flat] [--limit 3] [--folder FOLDER]

Prints one JSON line: seconds, peak resident memory of the process that mines (imports included), and
the same without pages of mapped files (libraries and tables), which the system takes back when it
needs them.  Exits with 1 where the former is above the limit (GB).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from retune import tables

BLOCK = 20_000
MINE = """
import json, resource, sys, threading, time
from pathlib import Path
from retune.config import MineConfig
from retune.runtime import start_logging
from retune.stages.mine import mine


def resident():
    \"\"\"Bytes of memory that belong to the process, and of those that come from mapped files.\"\"\"
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return [int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "RssFile")]


def watch():
    while not done.wait(0.02):
        total, mapped = resident()
        peaks[:] = max(peaks[0], total), max(peaks[1], total - mapped)


start_logging()
folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
found = {name: folder / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
shards = sorted(folder.glob("vectors-*.parquet"))
peaks, done = [0, 0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
mine(
    **found, query_vectors=folder / "query-vectors.parquet", text_vectors=shards, settings=MineConfig(**settings),
    seed=42, out=folder / "mined.parquet",
)
seconds = time.perf_counter() - start
done.set()
watcher.join()
peak = max(peaks[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps({"seconds": round(seconds, 1), "peak_gb": peak / 1e9, "without_mapped_gb": peaks[1] / 1e9}))
"""


def vectors(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    """float16 [n, dim] of length 1."""
    found = rng.standard_normal((n, dim), np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found.astype(np.float16)


def write_vectors(path: Path, first: int, last: int, dim: int, seed: int) -> None:
    meta = {"model": "synthetic", "revision": "None", "pooling": "mean", "normalize": "True"}
    rng = np.random.default_rng([seed, first])
    with tables.writer(path, tables.embeddings_schema(dim, "float16"), meta) as out:
        for start in range(first, last, BLOCK):
            ids = np.arange(start, min(start + BLOCK, last))
            out.write({"id": ids, "vector": tables.vector_array(vectors(rng, len(ids), dim))})


def make(folder: Path, n_texts: int, n_queries: int, dim: int, shards: int) -> None:
    """Texts of 12 words, each query with one positive, and the vectors of both, written block by block."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"word{i}" for i in range(50_000)], dtype=object)

    def texts(n: int) -> list[str]:
        return [" ".join(row) for row in vocabulary[rng.integers(0, len(vocabulary), (n, 12))]]

    with tables.writer(folder / "texts.parquet", "texts") as out:
        for start in range(0, n_texts, BLOCK):
            ids = np.arange(start, min(start + BLOCK, n_texts))
            out.write({"text_id": ids, "text": texts(len(ids)), "key": [None] * len(ids)})
    rows = {
        "query_id": range(n_queries), "dataset": ["synthetic"] * n_queries, "text": texts(n_queries),
        "key": [None] * n_queries, "prompt": [None] * n_queries, "type": [None] * n_queries,
        "in_batch_negatives": [True] * n_queries, "batch_size": [None] * n_queries, "split": ["train"] * n_queries,
        "source": [f"synthetic:{i}" for i in range(1, n_queries + 1)],
    }  # fmt: skip
    tables.write(folder / "queries.parquet", "queries", rows)
    pairs = {
        "query_id": range(n_queries), "text_id": rng.integers(0, n_texts, n_queries), "label": [1] * n_queries,
        "origin": ["given"] * n_queries, "similarity": [None] * n_queries, "score": [None] * n_queries,
    }  # fmt: skip
    tables.write(folder / "pairs.parquet", "pairs", pairs)
    write_vectors(folder / "query-vectors.parquet", 0, n_queries, dim, 1)
    for shard in range(shards):
        first, last = (n_texts * i // shards for i in (shard, shard + 1))
        write_vectors(folder / f"vectors-{shard:02}.parquet", first, last, dim, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--retriever", default="dense", choices=["dense", "bm25", "hybrid"])
    parser.add_argument("--index-factory", default="Flat")
    parser.add_argument("--limit", type=float, default=3, help="GB")
    parser.add_argument("--folder", type=Path, help="where to make the tables; a temporary folder where not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        make(folder, options.texts, options.queries, options.dim, options.shards)
        settings = json.dumps({"retriever": options.retriever, "index_factory": options.index_factory})
        command = [sys.executable, "-c", MINE, str(folder), settings]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    shown = {name: value for name, value in vars(options).items() if name not in ("limit", "folder")}
    print(json.dumps(shown | {name: round(value, 3) for name, value in found.items()}))
    return int(found["peak_gb"] > options.limit)


if __name__ == "__main__":
    sys.exit(main())
