"""merge: checkpoints of one architecture → one checkpoint, the weighted sum of their weights.

How it is done is told in `retune/model/mixture.py`; weights are given, or were found by the stage `weigh`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retune import tables
from retune.model.mixture import mix


def merge(
    *, models: Sequence[str | Path], weights: Sequence[float] | Path, out: Path,
    revisions: Sequence[str | None] | None = None,
) -> None:  # fmt: skip
    """Write the weighted sum of `models` as a checkpoint folder; configuration, tokenizer, prompts and modules are
    those of the last model whose weight is not 0.

    Args:
        weights: one for each model, or a table `weights` that has them.
        models, out, revisions: see `mixture.mix`.

    Raises:
        UserError: for models that do not fit together (all differences at once), and for sums that are not finite.
    """
    mix(models, _chosen(weights) if isinstance(weights, Path) else weights, out, revisions)


def _chosen(path: Path) -> list[float]:
    """The weights of the mixture that a table `weights` has chosen."""
    rows = tables.read(path, "weights").to_pylist()
    return next(row["weights"] for row in rows if row["chosen"])
