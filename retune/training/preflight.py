"""What is said before the first step: settings that cannot teach anything are errors, those that waste data warnings.

Each message tells what to change.  What needs no tokens is checked where it arises: missing teacher scores in
`data/candidates.py`, groups larger than the negatives in `data/task_types.py`, a pooling that contradicts the
checkpoint's in `model/usage.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retune.config import TrainConfig
from retune.data.candidates import TrainSet
from retune.data.sampler import Order
from retune.model import checkpoint, parts
from retune.model.embedder import Embedder
from retune.model.engine import Tokens
from retune.runtime import UserError, log

SHARE = 0.05  # of texts that may be cut without a word
SAMPLE = 1000  # texts as long as the limit that are looked at again, to tell those that are cut from those that fit


def check_candidates(settings: TrainConfig, order: Order, processes: int, data: TrainSet) -> None:
    """A query with no passage but its positive teaches nothing: its loss is 0.

    Args:
        order: the batches of each of `processes`.

    Raises:
        UserError: if there is such a query, or no query at all.
    """
    if not order.kinds:
        raise UserError(
            f"train.drop_threshold: {settings.drop_threshold} leaves none of the {len(data)} training queries; lower "
            "it, or train.small_threshold"
        )
    if settings.train_group_size > 1:
        return
    smallest = min(order.kinds, key=lambda kind: kind.batch_size)
    alone = smallest.batch_size * (processes if settings.negatives_cross_device else 1) == 1
    own = data.batch_sizes[smallest.rows] == 1  # asked for by the dataset, not by the usual batch size
    if alone and settings.use_inbatch_neg and own.any():
        name = data.datasets[smallest.rows[own.argmax()]]
        raise UserError(
            f"ingest.train: the batch_size 1 of {name} leaves its queries nothing but their positives, so the loss is "
            "0; raise it, or train.train_group_size"
        )
    if not settings.use_inbatch_neg or alone:
        raise UserError(
            "train.train_group_size: 1 leaves a query nothing but its positive, so the loss is 0; raise it, "
            "or use train.use_inbatch_neg with train.args.per_device_train_batch_size above 1"
        )
    if not data.in_batch.all():
        source = data.sources[int((~data.in_batch).argmax())]
        raise UserError(f"{source}: in_batch_negatives is false here, so train.train_group_size must be at least 2")


def tokenized(
    model: Embedder, texts: Sequence[str], kind: str, instructions: Sequence[str | None] | None = None,
    section: str = "embedder",
) -> Tokens:  # fmt: skip
    """`model.tokenize`, with a warning where more than `SHARE` of the texts are cut.

    Args:
        section: of the config, whose key the warning names.
    """
    tokens = model.tokenize(texts, kind, instructions)
    if (share := cut_share(model, tokens, texts, kind, instructions)) > SHARE:
        log.warning(
            "%s.%s_max_length: %.0f%% of %d %s are longer than %d tokens, and cut there; %s",
            section, kind, 100 * share, len(texts), _named(kind), model.max_lengths[kind], _advice(model, kind),
        )  # fmt: skip
    return tokens


def cut_share(
    model: Embedder, tokens: Tokens, texts: Sequence[str], kind: str, instructions: Sequence[str | None] | None
) -> float:
    """Share of the texts of which an end is cut off, estimated from `SAMPLE` of them where that many may be."""
    full = np.flatnonzero(tokens.lengths >= model.max_lengths[kind])  # cut, or just as long as the limit
    if len(full) <= SHARE * len(texts):
        return 0.0
    sample = full[np.linspace(0, len(full) - 1, min(len(full), SAMPLE)).astype(np.int64)]
    own = None if instructions is None else [instructions[row] for row in sample]
    cut = model.cut([texts[row] for row in sample], kind, own)
    return float(cut.mean()) * len(full) / len(texts)


def _named(kind: str) -> str:
    return {"query": "queries", "passage": "passages"}[kind]


def _advice(model: Embedder, kind: str) -> str:
    most = model.card.max_length
    if most is None or model.max_lengths[kind] < most:
        return "raise it" + (f" (the model takes {most})" if most else "")
    return (
        f"{most} is the model's own limit: cut the texts up, leave long ones out (split.drop_longer_than), "
        "or start from a model that takes more"
    )


def check_padding(model: Embedder, longest: int, multiple: int) -> None:
    """Raise a UserError where padding to `multiple` takes a text beyond the model's positions.

    Args:
        longest: tokens of the longest text.
    """
    made_of = parts.locate(model.settings)
    most, padded = checkpoint.positions(made_of.config or made_of.weights), -(-longest // multiple) * multiple
    if most is not None and padded > most:
        raise UserError(
            f"train.pad_to_multiple_of: a text of {longest} tokens would be padded to {padded}, but the model has "
            f"positions for {most}; set a divisor of {most}"
        )
