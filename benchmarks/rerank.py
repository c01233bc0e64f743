"""What a teacher is worth as a reranker: it orders the best passages of a finished run anew.

    python benchmarks/rerank.py [--results results/demo] [--benchmark docstrings] [--run base]
        [--reranker results/demo/score/reranker] [--depth 50] [--queries 300] [--max-length 80]

Reads what `make demo` (or another run) left.  MRR@10 and nDCG@10 of the run and of the same passages in
the teacher's order, over queries drawn with a seed, with 95% intervals and the p-value of a paired
randomisation test.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import polars as pl

from retune import tables
from retune.config import RerankerConfig
from retune.data.candidates import read_texts
from retune.data.metrics import align, judge, values
from retune.data.significance import bootstrap_interval, randomisation_test
from retune.model.reranker import Reranker

MEASURES = [("MRR", 10), ("nDCG", 10)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/demo"))
    parser.add_argument("--benchmark", default="docstrings")
    parser.add_argument("--run", default="base")
    parser.add_argument("--reranker")
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--max-length", type=int, default=80)
    options = parser.parse_args()
    results, benchmark = options.results, options.results / "ingest" / options.benchmark
    if not (results / "evaluate").is_dir():
        print(f"{results}: no finished run here; `make demo` makes one")
        return 0
    run = _some(pl.read_parquet(results / "evaluate" / options.benchmark / f"{options.run}.run.parquet"), options)
    settings = RerankerConfig(model=str(options.reranker or results / "score/reranker"), max_length=options.max_length)
    scores = _scores(run, benchmark, Reranker.load(settings))
    order = pl.Series("score", scores.astype(np.float64))
    again = run.with_columns(order).with_columns(
        rank=pl.col("score").rank("ordinal", descending=True).over("query_id").cast(pl.Int32)
    )
    judged = tables.read(benchmark / "pairs.parquet", "pairs", ["query_id", "text_id", "label"])
    columns = [judged[name].to_numpy() for name in ("query_id", "text_id", "label")]
    kept = np.isin(columns[0], run["query_id"].unique().to_numpy())
    judgments = judge(*(column[kept] for column in columns))
    found = [_values(one, judgments) for one in (run, again)]  # float64 [q, measures] each
    _tell(found, options)
    return 0


def _some(run: pl.DataFrame, options: argparse.Namespace) -> pl.DataFrame:
    """The best passages of some queries, drawn with a seed."""
    ids = run["query_id"].unique().sort().to_numpy()
    if options.queries < len(ids):
        ids = np.random.default_rng(0).choice(ids, options.queries, replace=False)
    return run.filter(pl.col("query_id").is_in(ids.tolist()) & (pl.col("rank") <= options.depth))


def _scores(run: pl.DataFrame, benchmark: Path, reranker: Reranker) -> np.ndarray:
    """The teacher's score of each row of the run, float32 [rows]."""
    queries = tables.read(benchmark / "queries.parquet", "queries", ["text"])["text"].to_pylist()
    ids, which = np.unique(run["text_id"].to_numpy(), return_inverse=True)
    texts = read_texts(benchmark / "texts.parquet", ids)
    return reranker.score([(queries[query], texts[at]) for query, at in zip(run["query_id"], which, strict=True)])


def _values(run: pl.DataFrame, judgments) -> np.ndarray:
    ranking = align(*(run[name].to_numpy() for name in ("query_id", "text_id", "rank")), judgments)
    columns = values(ranking, [10])
    return np.stack([columns[measure] for measure in MEASURES], 1)


def _tell(found: list[np.ndarray], options: argparse.Namespace) -> None:
    p_values = randomisation_test(found[1] - found[0], 42)
    print(f"\n{len(found[0])} queries of {options.benchmark}, the best {options.depth} passages of {options.run}\n")
    print("| | " + " | ".join(f"{name}@{k}" for name, k in MEASURES) + " |\n|---|" + "---|" * len(MEASURES))
    for name, columns in zip((options.run, "in the teacher's order"), found, strict=True):
        low, high = bootstrap_interval(columns, 42)
        cells = [f"{m:.4f} [{a:.3f} {b:.3f}]" for m, a, b in zip(columns.mean(0), low, high, strict=True)]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\np: " + ", ".join(f"{name}@{k} {p:.4f}" for (name, k), p in zip(MEASURES, p_values, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
