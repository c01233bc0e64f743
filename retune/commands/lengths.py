"""Token lengths and length bins of rows, as a step of a command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retune.commands.flags import Given, from_section
from retune.commands.work import Work, model_identity
from retune.config import SplitConfig

FLAGS = from_section("split", SplitConfig, "lengths", {"length_list": {"convert": int}}, leave=("drop_longer_than",))


def settings(given: Given) -> SplitConfig:
    """The section `split` that the flags make; the bounds may come in any order."""
    bounds = {"length_list": sorted(given["length_list"])} if given["length_list"] else {}
    return given.section("split", SplitConfig, **bounds)


def measure(
    work: Work, found: Mapping[str, Path], chosen: SplitConfig, tokenizer: Mapping[str, Any], threads: int | None = None
) -> dict[str, Path]:
    """The tables `lengths` and `bins` of the rows in the tables `found`.

    Args:
        tokenizer: `model`, `revision` and `trust_remote_code` of the checkpoint that counts.
        threads: one a processor where not given.
    """
    from retune.stages.split import split

    out = {name: work.path(f"split/{name}.parquet") for name in ("lengths", "bins")}
    of = {"settings": chosen.model_dump(mode="json"), "tokenizer": dict(tokenizer)}
    of["model"] = model_identity(tokenizer) if work.kept else None
    inputs = [found[name] for name in ("texts", "queries", "pairs")]

    def do() -> None:
        split(*inputs, out, chosen, tokenizer, threads or os.cpu_count() or 1)

    work.step("split", "split", list(out.values()), of, do, ["ingest"])
    return out
