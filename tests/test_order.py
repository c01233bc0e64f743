"""Homogeneous batches: what the section `train` asks for is what training sees."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_bert
from toy import toy_tables

from retune import tables
from retune.config import EmbedderConfig, TrainConfig
from retune.data import candidates
from retune.data.batches import EmbedderCollate
from retune.data.sampler import GroupSampler
from retune.runtime import UserError
from retune.stages.train import train
from retune.training.order import order_of

N = 24
DATASETS = ["a"] * 12 + ["b"] * 8 + ["c"] * 3 + ["d"]
SIZES = [None] * 12 + [4] * 8 + [None] * 4


def data_of(folder: Path, bins: list[str] | None = None, **changed) -> candidates.TrainSet:
    paths = toy_tables(folder, N, dataset=DATASETS, batch_size=SIZES, **changed)
    file = None
    if bins:
        file = folder / "bins.parquet"
        tables.write(file, "bins", {"query_id": range(N), "n_tokens": [5] * N, "length_bin": bins})
    return candidates.load(**paths, group_size=2, seed=1, bins=file)


def batches(data: candidates.TrainSet, **settings) -> list[list[int]]:
    sampler = GroupSampler(order_of(TrainConfig(**settings), data, 6), 1)
    return [[row for _, row in batch] for batch in sampler]


def test_batches_of_one_dataset_in_its_own_size(tmp_path):
    found = batches(data_of(tmp_path), same_dataset_within_batch=True)
    kinds = Counter((DATASETS[batch[0]], len(batch)) for batch in found)
    assert all(len({DATASETS[row] for row in batch}) == 1 for batch in found)
    assert kinds == {("a", 6): 2, ("b", 4): 2, ("c", 3): 1, ("d", 1): 1}


def test_a_symmetric_dataset_gets_half_the_batch(tmp_path, caplog):
    """As in FlagEmbedding, where it has no batch_size of its own and batches are of one dataset."""
    types = [*["symmetric_sts"] * 12, *["symmetric_class"] * 8, *["only_1neg"] * 3, "symmetric_clustering"]
    data = data_of(tmp_path, type=types)
    found = Counter((DATASETS[batch[0]], len(batch)) for batch in batches(data, same_dataset_within_batch=True))
    assert found == {("a", 3): 4, ("b", 4): 2, ("c", 3): 1, ("d", 1): 1}
    assert {len(batch) for batch in batches(data)} == {6}
    alone = order_of(TrainConfig(same_dataset_within_batch=True), data, 1)
    assert [kind.batch_size for kind in alone.kinds] == [1, 4, 1, 1]


def test_small_datasets_are_put_together_or_left_out(tmp_path, caplog):
    data = data_of(tmp_path)
    found = batches(data, same_dataset_within_batch=True, small_threshold=4)
    assert Counter(tuple(sorted({DATASETS[row] for row in batch})) for batch in found)[("c", "d")] == 1
    found = batches(data, same_dataset_within_batch=True, small_threshold=4, drop_threshold=5)
    assert sorted({DATASETS[row] for batch in found for row in batch}) == ["a", "b"]
    assert "4 queries of 2 small datasets are left out (c, d)" in caplog.text


def test_batches_of_one_length_bin(tmp_path):
    bins = ["len-0-500", "len-500-inf"] * 12
    found = batches(data_of(tmp_path, bins), same_dataset_within_batch=True, same_length_within_batch=True)
    assert all(len({(DATASETS[row], bins[row]) for row in batch}) == 1 for batch in found)
    assert sorted(row for batch in found for row in batch) == list(range(N))
    with pytest.raises(UserError, match="same_length_within_batch: needs the table of bins"):
        batches(data_of(tmp_path / "none"), same_length_within_batch=True)


def test_queries_of_one_text_are_kept_apart(tmp_path):
    texts = [f"query {row // 4}" for row in range(N)]
    found = batches(data_of(tmp_path, text=texts), no_duplicates_within_batch=True)
    assert len(found) == 4 and all(len({texts[row] for row in batch}) == 6 for batch in found)
    mixed = batches(data_of(tmp_path / "mixed", text=texts))
    assert any(len({texts[row] for row in batch}) < 6 for batch in mixed)


def test_a_batch_size_that_does_not_count_is_said(tmp_path, caplog):
    batches(data_of(tmp_path))
    assert "a dataset's batch_size counts only with train.same_dataset_within_batch" in caplog.text


@pytest.mark.parametrize("name", ["small_threshold", "drop_threshold"])
def test_a_threshold_without_homogeneous_batches_is_a_mistake(name):
    with pytest.raises(ValueError, match="counts only with same_dataset_within_batch"):
        TrainConfig(**{name: 3})


def test_training_sees_such_batches(tmp_path, monkeypatch):
    """Through the stage: 12 + 8 + 4 queries, of which the last two datasets are put together."""
    seen, plain = [], EmbedderCollate.__call__

    def watched(self, groups):
        seen.append([group.query for group in groups])
        return plain(self, groups)

    monkeypatch.setattr(EmbedderCollate, "__call__", watched)
    paths = toy_tables(tmp_path / "tables", N, dataset=DATASETS, batch_size=SIZES)
    settings = TrainConfig(
        same_dataset_within_batch=True, small_threshold=4, train_group_size=2, shuffle_ratio=0.5,
        args={"per_device_train_batch_size": 6, "num_train_epochs": 2, "learning_rate": 1e-3},
    )  # fmt: skip
    train(
        **paths, bins=None, settings=settings, embedder=EmbedderConfig(model=str(tiny_bert(tmp_path / "base"))), seed=1,
        drop_longer_than=None, state=tmp_path / "state", model_out=tmp_path / "model",
        history_out=tmp_path / "history.parquet",
    )  # fmt: skip
    names = np.array(DATASETS)
    names[names == "d"] = "c"
    assert len(seen) == 2 * 5 and all(len(set(names[batch])) == 1 for batch in seen)
    assert Counter(len(batch) for batch in seen) == {6: 4, 4: 6}
    assert all(sorted(row for batch in half for row in batch) == list(range(N)) for half in (seen[:5], seen[5:]))
