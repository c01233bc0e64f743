"""The name of an artifact."""

from __future__ import annotations

from dataclasses import dataclass

TRAIN = "train"  # the collection of training texts; the others are named as their benchmarks
KINDS = {"train": "tuned", "merge": "merged"}  # of the models that are made here


@dataclass(frozen=True)
class Node:
    """An artifact of a run: a rule's name and its labels (model, collection, part)."""

    run: str
    rule: str
    labels: tuple[str, ...] = ()


def shard_name(index: int, count: int) -> str:
    return f"{index:02d}-of-{count:02d}"
