"""Speed and peak memory of ingest on synthetic rows.

    python benchmarks/ingest.py --rows 1000000 --texts 3 --words 40 --dev-fraction 0.01

Prints one JSON line: rows and megabytes a second, and the peak resident memory of the process
that ingests (a child: what made the rows does not count).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson

from retune.config import IngestConfig
from retune.stages.ingest import ingest

TABLES = ("texts", "queries", "pairs", "rejected")


def make_rows(path: Path, rows: int, texts: int, words: int) -> None:
    """Rows of one query, one positive and `texts` - 2 negatives: all distinct, of about `words` words each."""
    rng = np.random.default_rng(0)
    vocabulary = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 10))) for _ in range(20_000)]
    pieces = [
        " ".join(vocabulary[i] for i in rng.integers(0, len(vocabulary), max(words - 1, 1))) for _ in range(5_000)
    ]
    with open(path, "wb") as file:
        for row in range(rows):
            passages = [f"{pieces[(row * 7 + i) % 5_000]} {row}x{i}" for i in range(texts - 1)]
            line = {"query": f"what is {row} {pieces[row % 5_000][:40]}", "pos": passages[:1], "neg": passages[1:]}
            file.write(orjson.dumps(line) + b"\n")


def run(path: Path, folder: Path, dev_fraction: float, answer: multiprocessing.SimpleQueue) -> None:
    """Ingest in this process; the answer is (seconds, seconds of CPU, peak bytes)."""
    settings = IngestConfig(train=str(path), dev_fraction=dev_fraction)
    start = time.perf_counter()
    ingest(settings, {name: folder / f"{name}.parquet" for name in TABLES}, seed=42)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    answer.put((time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--texts", type=int, default=3, help="distinct texts a row, the query among them")
    parser.add_argument("--words", type=int, default=40, help="words of a passage")
    parser.add_argument("--dev-fraction", type=float, default=0.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.jsonl")
        make_rows(path, args.rows, args.texts, args.words)
        context = multiprocessing.get_context("spawn")
        answer = context.SimpleQueue()
        child = context.Process(target=run, args=(path, Path(folder), args.dev_fraction, answer))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(child.exitcode)
        seconds, cpu, peak = answer.get()
        megabytes = path.stat().st_size / 1e6
    figures = {"rows_per_s": round(args.rows / seconds), "mb_per_s": round(megabytes / seconds, 1)}
    costs = {"seconds": round(seconds, 1), "cpu_s": round(cpu, 1), "peak_rss_gb": round(peak / 1e9, 3)}
    print(json.dumps(vars(args) | figures | costs))


if __name__ == "__main__":
    main()
