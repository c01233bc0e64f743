"""Who ranks in `retune evaluate`: the heads of an M3 model, each measured by itself, as the workflow does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

from retune.commands.flags import Flag, Given, from_section
from retune.config import EvaluateConfig
from retune.sections.evaluation import SumWeights

GROUP = "heads of an M3 model"
COLUMNS = {"sparse": "tokens", "colbert": "colbert"}  # of a table of vectors, by head

FLAGS = [
    Flag(
        ("heads",), "Who ranks, one or more of dense, sparse, colbert (reranks the first --k of dense), dense+sparse "
        "and all, the weighted sum of the three (also: hybrid). With several, each has a dict of its own in what is "
        "printed.", "evaluate.heads", "list", shown="dense", group=GROUP,
        convert=lambda name: "hybrid" if name == "all" else name,
    ),
    *from_section(
        "evaluate.head_weights", SumWeights, GROUP,
        {
            head: {"names": (f"{head}_weight",), "convert": float, "help": f"Of {head}'s scores in the weighted sums."}
            for head in SumWeights.model_fields
        },
    ),
]  # fmt: skip


def label(head: str) -> str:
    """What is measured, as the workflow names it: a model, by a head that is not dense `<model>-<head>`."""
    return "model" if head == "dense" else f"model-{head}"


def check_kept(given: Given, settings: EvaluateConfig) -> None:
    """Raise a UserError for a file of vectors that cannot hold, or does not hold, what the heads need."""
    flag = next((name for name in ("save_embedding", "load_embedding") if given[name]), None)
    needed = [head for head in settings.stored_heads() if head in COLUMNS]
    if flag is None or not needed:
        return
    path = Path(given["save_path"]).expanduser()
    if path.suffix != ".parquet":
        raise given.mistake("save_path", f"{path}: sparse and colbert are kept in a .parquet alone")
    if flag == "load_embedding" and path.is_file():
        held = pq.read_schema(path).names
        if missing := [head for head in needed if COLUMNS[head] not in held]:
            raise given.mistake("heads", f"{path} holds nothing of {' and '.join(missing)}; save it with these --heads")


def save(path: Path, runs: Mapping[str, Path], found: Mapping[str, Path], tag: str) -> None:
    """Write each head's run in TREC's form at `path`; of several, those that are not dense with the head in the name.

    Args:
        runs: by head. found: the benchmark's tables. tag: the model's name.
    """
    from retune.data import trec

    for head, run in runs.items():
        named = path if head == "dense" or len(runs) == 1 else path.with_name(f"{path.stem}-{head}{path.suffix}")
        trec.write(run, found["queries"], found["texts"], named, tag if head == "dense" else f"{tag}-{head}")
