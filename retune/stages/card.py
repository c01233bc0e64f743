"""card: a tuned or merged model, its data and its metrics → the model card, README.md beside the model's folder.

The card is written once the model is measured, and therefore not into the folder, which is finished by then:
`hf upload me/mine results/mine/train/model` and `hf upload me/mine results/mine/train/README.md` put both
in one place.  An edit of the card's wording trains nothing again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

import retune
from retune import tables
from retune.model import checkpoint
from retune.report import card as words
from retune.report.mixture_card import Mixture, mixture_card
from retune.runtime import atomic, log


def card(
    *, kind: str, name: str, model: Path, settings: Mapping[str, Any], out: Path, queries: Path | None = None,
    pairs: Path | None = None, metrics: Path | None = None, weights: Path | None = None,
) -> None:  # fmt: skip
    """Write the card of a model.

    Args:
        kind: `tuned` or `merged`.
        name: what the model is called.
        model: its folder.
        settings: `base` (the base model's reference), `sections` (of the config, as they were set), and for a merged
            model `models` and `weights` (None where they are in a table).
        out: the file.
        queries, pairs: tables of the training data, where there is any.
        metrics: of this model and others, where they were measured.
        weights: the table of merging weights, where they were found.
    """
    said = checkpoint.card(model)
    facts = words.Facts(
        name=name, kind=kind, base=settings["base"], hub_id=_hub_id(settings["base"]),
        dim=said.truncate_dim or _dim(model), pooling=said.pooling, normalize=bool(said.normalize),
        max_length=said.max_length, prompts=said.prompts, settings=settings["sections"],
        data=_data(queries, pairs) if queries and pairs else (), mixture=_mixture(settings, weights),
        values=_values(metrics) if metrics else (), folder=Path(os.path.relpath(model, out.parent)).as_posix(),
        version=retune.__version__,
    )  # fmt: skip
    with atomic(out) as part:
        part.write_text(words.card(facts), encoding="utf-8")
    log.info("card: %s", out)


def describe(*, kind: str, loader: str, models: Sequence[str], weights: Sequence[float], folder: Path) -> None:
    """Write the card of a mixture that is no embedder, README.md in its folder.

    Args:
        kind: `reranker` or `decoder`.
        loader: transformers' class that loads it.
        models, weights: what it was made of.
    """
    facts = Mixture(
        kind=kind, loader=loader, parts=list(zip(weights, models, strict=True)),
        hub_ids=[model for model in models if _hub_id(model)],
        remote_code="auto_map" in checkpoint.read_json(folder / "config.json"), version=retune.__version__,
    )  # fmt: skip
    with atomic(folder / "README.md") as part:
        part.write_text(mixture_card(facts), encoding="utf-8")


def _dim(model: Path) -> int:
    """Dimensions of the backbone's vectors; adapters alone have no config of the model."""
    config = checkpoint.read_json(model / "config.json")
    if "hidden_size" in config:
        return config["hidden_size"]
    return checkpoint.read_json(model / "1_Pooling/config.json")["word_embedding_dimension"]


def _hub_id(reference: str) -> str | None:
    on_hub = ":" not in reference and reference.count("/") == 1 and not Path(reference).expanduser().exists()
    return reference if on_hub and not reference.startswith((".", "~", "/")) else None


def _mixture(settings: Mapping[str, Any], weights: Path | None) -> Sequence[tuple[float, str]]:
    if not settings.get("models"):
        return ()
    found = settings["weights"]
    if weights:
        found = next(row["weights"] for row in tables.read(weights, "weights").to_pylist() if row["chosen"])
    return list(zip(found, settings["models"], strict=True))


def _data(queries: Path, pairs: Path) -> list[words.Data]:
    """Counts by dataset, in the order of the table."""
    asked = pl.from_arrow(tables.read(queries, "queries", ["query_id", "dataset", "split"]))
    labels = pl.from_arrow(tables.read(pairs, "pairs", ["query_id", "label"]))
    by_query = labels.group_by("query_id").agg(
        (pl.col("label") > 0).sum().alias("positives"), (pl.col("label") <= 0).sum().alias("negatives")
    )
    counts = (
        asked.join(by_query, on="query_id", how="left", maintain_order="left")
        .group_by("dataset", maintain_order=True)
        .agg(pl.len(), (pl.col("split") == "dev").sum(), pl.col("positives").sum(), pl.col("negatives").sum())
    )
    return [words.Data(*row) for row in counts.iter_rows()]


def _values(path: Path) -> list[words.Value]:
    """Means of nDCG and MRR at 10 (or the cutoff nearest to it) and of Recall at the largest cutoff."""
    columns = ["benchmark", "model", "measure", "cutoff", "query_id", "value", "low", "high", "p_value"]
    rows = pl.from_arrow(tables.read(path, "metrics", columns)).filter(pl.col("query_id").is_null())
    cutoffs = sorted(rows["cutoff"].unique())
    near = min(cutoffs, key=lambda cutoff: abs(cutoff - 10))
    wanted = [("nDCG", near), ("MRR", near), ("Recall", cutoffs[-1])]
    return [
        words.Value(
            row["benchmark"], row["model"], f"{row['measure']}@{row['cutoff']}", row["value"], row["low"],
            row["high"], row["p_value"],
        )
        for row in rows.iter_rows(named=True)
        if (row["measure"], row["cutoff"]) in wanted
    ]  # fmt: skip
