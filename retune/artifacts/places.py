"""Where an artifact lies in the folder of the run that makes it.

Knows names alone: neither the config nor which run that is.
"""

from __future__ import annotations

from retune.artifacts.node import TRAIN, Node

FILES = {
    "train": "model", "merge": "model", "fit": "reranker", "scores": "scores-{}.parquet", "search": "found-{}.parquet",
    "embed": "{2}.parquet", "evaluate": "{1}.run.parquet", "trec": "{1}.trec", "gate": "gate.txt",
    "leakage": "leakage.parquet", "metrics": "metrics.parquet", "report": "index.html", "config": "config.yaml",
    "weigh": "weights.parquet", "card": "README.md", "split": "bins.parquet",
}  # fmt: skip
"""The file, or folder, that stands for an artifact, by its rule; a number is the place of a label."""
OTHERWISE = "pairs.parquet"


def file(node: Node) -> str:
    """Its main file, or its folder of a model."""
    return FILES.get(node.rule, OTHERWISE).format(*node.labels)


def folder(node: Node) -> str:
    """Its folder within that of the run; "" for the run's own."""
    match node.rule, node.labels:
        case "demo", _:
            return "raw"
        case "benchmark", (name,):
            return f"ingest/{name}"
        case "embed", (label, collection, _):
            return f"embed/{label}" + ("" if collection == TRAIN else f"/{collection}")
        case "evaluate" | "trec", (benchmark, _):
            return f"evaluate/{benchmark}"
        case "metrics" | "gate", _:
            return "evaluate"
        case (("fit" | "scores"), _):
            return "score"
        case "weigh", _:
            return "merge"
        case "card", (stage,):
            return stage
        case "search", _:
            return "mine"
        case "leakage", _:
            return "ingest"
        case "config", _:
            return ""
    return node.rule
