"""Section on merging: the weights that were tried, what they were worth, and which were taken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from retune import tables
from retune.report import plots
from retune.report.page import Html, Section, decimal, figure, join, paragraph, table, tag


def merging(path: Path) -> Section:
    """Of a table `weights`."""
    rows, models = tables.read(path, "weights").to_pylist(), json.loads(tables.metadata(path)["models"])
    taken = next(row["weights"] for row in rows if row["chosen"])
    measured = [row for row in rows if row["collection"] is not None]
    collections = list(dict.fromkeys(row["collection"] for row in measured))
    measure = measured[0]["measure"]
    said = paragraph("Taken: ", join([tag("b", _shown(taken, models))]), ".")
    cells = {(row["mixture"], row["collection"]): decimal(row["value"], 4) for row in measured}
    lines = [
        [_shares(row["weights"]), *(cells[row["mixture"], name] for name in collections)]
        for row in measured
        if row["collection"] == collections[0]
    ]
    head = ["weights", *(f"{measure}, {name}" for name in collections)]
    parts = [said, *_curves(measured, collections, measure), table(head, lines, range(1, len(head)))]
    order = ", ".join(models)
    return Section("merging", "Merging", join([*parts, paragraph(f"Weights in the order of {order}.", css="note")]))


def _curves(rows: Sequence[dict], collections: Sequence[str], measure: str) -> list[Html]:
    """A curve for each collection where two models were mixed in several shares."""
    if any(len(row["weights"]) != 2 for row in rows) or len({row["mixture"] for row in rows}) < 3:
        return []
    drawn = []
    for name in collections:
        points = [{"share": row["weights"][1], "value": row["value"]} for row in rows if row["collection"] == name]
        colour = "good" if name == "dev" else "other"
        curve = plots.lines(
            points, "share", "value", x_title="weight of the second model", y_title=measure, colour=colour
        )
        drawn.append(figure("On the queries that were set aside" if name == "dev" else f"On {name}", curve))
    return [tag("div", *drawn, css="plots")]


def _shares(weights: Sequence[float]) -> str:
    return " : ".join(f"{weight:.3g}" for weight in weights)


def _shown(weights: Sequence[float], models: Sequence[str]) -> str:
    return " + ".join(f"{weight:.3g} × {model}" for weight, model in zip(weights, models, strict=True))
