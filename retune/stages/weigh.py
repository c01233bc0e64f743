"""weigh: models and data → the weights that they are merged with, and the table of all that were tried.

By examples: softmax(−loss / temperature) of each model's loss (LM-Cocktail, arXiv:2311.13534).  By search:
every mixture of a grid is made and measured on the queries that were set aside; the best one counts of those
that lose no more on any guard set than they may.  Merging itself is the stage `merge`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retune import tables
from retune.config import EmbedderConfig, SearchConfig
from retune.runtime import log, progress

EXAMPLES, DEV = "examples", "dev"
Row = dict[str, Any]


def by_examples(
    *, models: Sequence[str | Path], embedders: Sequence[EmbedderConfig], examples: Path, temperature: float, out: Path
) -> None:
    """Write the table `weights` with the loss of each model and the weights that follow.

    Args:
        models: folders, hub ids or `package:<python package>`.
        embedders: how each of them makes vectors of texts, and its revision; their `model` does not count.
        examples: a file of rows {query, pos, neg}.
        temperature: losses are divided by it.

    Raises:
        UserError: for rows of another form and models that cannot be loaded.
    """
    from retune.data.examples import read
    from retune.training.appraisal import Limits, losses, shares

    found = losses(models, "encoder", read(examples), Limits(), embedders)
    alone = np.eye(len(models)).tolist()
    rows = [_row(i, alone[i], EXAMPLES, "loss", loss) for i, loss in enumerate(found)]
    chosen = shares(found, temperature)
    log.info("weights: %s", _shown(models, chosen))
    _write(out, models, [*rows, _row(len(models), chosen) | {"chosen": True}])


def by_search(
    *, models: Sequence[str | Path], aside: Mapping[str, Path], guards: Mapping[str, Mapping[str, Path]],
    settings: SearchConfig, embedder: EmbedderConfig, seed: int, out: Path,
    revisions: Sequence[str | None] | None = None, levels: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """Write the table `weights` with the measure of every mixture of a grid, and which one is taken.

    Args:
        models: see `by_examples`.
        aside: tables texts, queries and pairs with the queries that were set aside.
        guards: {name: the same tables of a guard set}.
        embedder: how mixtures make vectors of texts; its model does not count.
        seed: of the draws of queries and passages.
        revisions: see `mixture.mix`.
        levels: lowest grade of a relevant passage, by guard set; 1 where not given.

    Raises:
        UserError: if no query was set aside, or models do not fit together.
    """
    from retune.data.trial import collections, value
    from retune.model.embedder import Embedder
    from retune.model.mixture import mix

    levels = levels or {}
    found = collections(aside, guards, levels, seed=seed, queries=settings.queries, passages=settings.passages)
    mixtures, rows = grid(len(models), settings.step), []
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".mixture-", dir=out.parent) as scratch,
        progress(len(mixtures), "weigh", "mixtures") as bar,
    ):
        made = Path(scratch) / "model"
        for place, weights in enumerate(mixtures):
            mix(models, weights, made, revisions)
            mixture = Embedder.load(embedder.model_copy(update={"model": str(made)}))
            for name, collection in found.items():
                reached = value(mixture, collection, settings.measure, levels.get(name, 1))
                rows.append(_row(place, weights, name, settings.measure, reached))
            said = ", ".join(f"{row['collection']} {row['value']:.4f}" for row in rows[-len(found) :])
            log.info("%s: %s of %s", _shown(models, weights), settings.measure, said)
            bar.update()
    best = choose(rows, settings.max_guard_loss)
    log.info("taken: %s", _shown(models, mixtures[best]))
    _write(out, models, [row | {"chosen": row["mixture"] == best} for row in rows])


def grid(models: int, step: float) -> list[list[float]]:
    """All weights that are multiples of `step` and sum to 1; the first model alone comes first.

    >>> grid(2, 0.5)
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    steps = round(1 / step)
    return [[parts / steps for parts in one] for one in _parts(models, steps)]


def _parts(models: int, steps: int) -> Iterator[list[int]]:
    """All ways to deal `steps` to `models`, the most to the first ones first."""
    if models == 1:
        yield [steps]
        return
    for mine in range(steps, -1, -1):
        for rest in _parts(models - 1, steps - mine):
            yield [mine, *rest]


def choose(rows: Sequence[Row], max_guard_loss: float) -> int:
    """The mixture that is best on the dev set, of those that no guard set has less of than the first one, the first
    model alone, less `max_guard_loss`; of equal ones the first."""
    values = {(row["mixture"], row["collection"]): row["value"] for row in rows}
    mixtures = list(dict.fromkeys(row["mixture"] for row in rows))
    guards = dict.fromkeys(row["collection"] for row in rows if row["collection"] != DEV)

    def loss(mixture: int) -> float:
        return max((values[mixtures[0], guard] - values[mixture, guard] for guard in guards), default=0.0)

    kept = [mixture for mixture in mixtures if loss(mixture) <= max_guard_loss + 1e-12]
    return max(kept, key=lambda mixture: (values[mixture, DEV], -mixture))


def _row(mixture: int, weights: Sequence[float], collection: str | None = None, measure: str | None = None,
         value: float | None = None) -> Row:  # fmt: skip
    return {
        "mixture": mixture, "weights": list(weights), "collection": collection, "measure": measure, "value": value,
        "chosen": False,
    }  # fmt: skip


def _shown(models: Sequence[str | Path], weights: Sequence[float]) -> str:
    return " + ".join(f"{weight:.3g} × {model}" for model, weight in zip(models, weights, strict=True))


def _write(out: Path, models: Sequence[str | Path], rows: Sequence[Row]) -> None:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    tables.write(out, "weights", columns, {"models": json.dumps([str(model) for model in models])})
