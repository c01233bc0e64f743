"""merge: checkpoints of one architecture → one checkpoint, the weighted sum of their weights.

How it is done is told in `retune/model/mixture.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retune.model.mixture import mix


def merge(*, models: Sequence[str | Path], weights: Sequence[float], out: Path, revision: str | None = None) -> None:
    """Write the weighted sum of `models` as a checkpoint folder; configuration, tokenizer, prompts and modules are
    those of the last model whose weight is not 0.

    Args:
        models, weights, out, revision: see `mixture.mix`.

    Raises:
        UserError: for models that do not fit together (all differences at once), and for sums that are not finite.
    """
    mix(models, weights, out, revision)
