"""Checkpoints of one architecture → one checkpoint, the weighted sum of their weights.

A mix of the tuned model and its base keeps much of what the base knew (LM-Cocktail,
arXiv:2311.13534).  Everything is compared before anything is read, then piece after piece is summed
and written: memory does not grow with the models.  No model code runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from retune.model import checkpoint, companions, summing
from retune.model.weights import SINGLE, Tensor, tensors, write_safetensors
from retune.runtime import UserError, atomic, log, progress


def mix(
    models: Sequence[str | Path], weights: Sequence[float], out: Path, revisions: Sequence[str | None] | None = None,
    donor: int | None = None,
) -> None:  # fmt: skip
    """Write the weighted sum of `models` as a checkpoint folder.

    Args:
        models: folders, hub ids or `package:<python package>`.
        weights: one for each model; a model of weight 0 is compared, but not read.
        out: the folder, replaced as a whole.
        revisions: branch, tag or commit of each model that is a hub id; the newest state of each where not given.
        donor: place of the model whose configuration, tokenizer, prompts and modules it gets; the last one whose
            weight is not 0 where not given.

    Raises:
        UserError: for models that do not fit together (all differences at once), and for sums that are not finite.
    """
    check_weights(models, weights)
    folders = [checkpoint.resolve(*one) for one in zip(models, revisions or [None] * len(models), strict=True)]
    names = [str(model) for model in models]
    if donor is None:
        donor = max(index for index, weight in enumerate(weights) if weight)
    main, side = _aligned(names, folders, donor)
    companions.compare_vocabularies(names, folders, donor)

    mixed = [(mine, weight) for mine, weight in zip(main, weights, strict=True) if weight]
    merged = list(dict.fromkeys(name for mine, _ in mixed for name in mine))
    with atomic(out) as part:
        companions.copy_rest(folders[donor], part)
        with progress(sum(summing.first(mixed, name).size for name in merged), "merge", "weights") as bar:
            write_safetensors(part / SINGLE, [summing.entry(name, mixed, bar.update) for name in merged])
        for file in side[donor]:
            own = [(mine[file], weight) for mine, weight in zip(side, weights, strict=True) if weight]
            companions.write_side(part / file, [summing.entry(n, own, lambda _: None) for n in side[donor][file]])
        companions.join_heads(part)
        companions.state_dtype(part / "config.json", [summing.first(mixed, name).dtype for name in merged])
    shares = [f"{weight:g} × {model}" for model, weight in zip(models, weights, strict=True)]
    log.info("merged %d tensors of %s", len(merged), ", ".join(shares))


def check_weights(models: Sequence[str | Path], weights: Sequence[float]) -> None:
    """Warn of weights that do not sum to 1.

    Raises:
        UserError: if there is not one for each model, or they cannot be weights.
    """
    if len(models) != len(weights):
        raise UserError(f"merge.weights: expected one weight a model, found {len(weights)} for {len(models)}")
    if not any(weights) or not all(map(math.isfinite, weights)):
        raise UserError(f"merge.weights: expected finite numbers, not all 0, found {list(weights)}")
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        log.warning("merge.weights: they sum to %g, not to 1", sum(weights))


def _aligned(
    models: Sequence[str], folders: Sequence[Path], donor: int
) -> tuple[list[dict[str, Tensor]], list[dict[str, dict[str, Tensor]]]]:
    """The models' own tensors and those of their heads and modules, by the donor's names, compared.

    Raises:
        UserError: if they do not fit together.
    """
    found = summing.tied([tensors(folder) for folder in folders])
    main = [summing.with_names_of(found[donor], mine, name) for mine, name in zip(found, models, strict=True)]
    side = companions.matched(models, [companions.side_weights(folder) for folder in folders], donor)
    everything = [
        own | {f"{file}: {name}": tensor for file, beside in more.items() for name, tensor in beside.items()}
        for own, more in zip(main, side, strict=True)
    ]
    summing.compare(models, everything, donor)
    return main, side
