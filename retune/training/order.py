"""Which training queries may share a batch, as the section `train` says."""

from __future__ import annotations

import numpy as np

from retune.config import TrainConfig
from retune.data.candidates import TrainSet
from retune.data.sampler import Order, kinds, marks
from retune.data.task_types import batch_sizes
from retune.runtime import UserError, log


def order_of(settings: TrainConfig, data: TrainSet, batch_size: int) -> Order:
    """Kinds by dataset, by length bin, by both or none; with marks where duplicates are kept apart.

    Args:
        batch_size: of a process, for datasets that have none of their own; half of it for symmetric ones.

    Raises:
        UserError: for batches of one length bin where bins are not known.
    """
    labels, own = [], None
    if settings.same_dataset_within_batch:
        labels.append(data.datasets)
        own = batch_sizes(data.types, data.batch_sizes, batch_size)
    elif not np.isnan(data.batch_sizes).all():
        log.warning("ingest.train: a dataset's batch_size counts only with train.same_dataset_within_batch")
    if settings.same_length_within_batch:
        if not all(data.length_bins):
            raise UserError("train.same_length_within_batch: needs the table of bins that the stage split makes")
        labels.append(data.length_bins)
    numbers = [np.unique(np.array(label, dtype=object), return_inverse=True) for label in labels]
    found = kinds(
        len(data), batch_size, [number for _, number in numbers], own, names=numbers[0][0] if numbers else (),
        small_threshold=settings.small_threshold, drop_threshold=settings.drop_threshold,
    )  # fmt: skip
    if labels:
        sizes = sorted({kind.batch_size for kind in found})
        log.info("batches of one %s each: %d kinds, batch sizes %s", _of(settings), len(found), sizes)
    apart = settings.no_duplicates_within_batch
    return Order(found, marks(data.same_text, data.n_positives, data.starts, data.text_ids) if apart else None)


def _of(settings: TrainConfig) -> str:
    both = {"dataset": settings.same_dataset_within_batch, "length bin": settings.same_length_within_batch}
    return " and ".join(name for name, asked in both.items() if asked)
