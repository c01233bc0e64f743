"""What a row's `type` does to its group, to the reading of its passages, and what is warned of."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from tiny import tiny_bert
from toy import toy_tables

from retune import tables
from retune.config import EmbedderConfig, TrainConfig
from retune.data import candidates, task_types
from retune.data.batches import Chunker, EmbedderCollate, GroupDataset
from retune.model.embedder import Embedder
from retune.model.engine import tokens_of
from retune.stages.train import _collate, _group_sizes

TYPES = ["only_1neg", "symmetric_class", "symmetric_sts", "symmetric_clustering", "normal", None]


@pytest.fixture
def data(tmp_path) -> candidates.TrainSet:
    """Six queries with three negatives each, of every type."""
    paths = toy_tables(tmp_path, 6, type=TYPES, prompt=["a", "b", "c", None, None, "d"])
    return candidates.load(**paths, group_size=6, seed=0)


def test_sizes_of_groups():
    n_negatives = np.array([3, 3, 3, 3, 3, 3])
    assert task_types.group_sizes(TYPES, n_negatives, 6).tolist() == [2, 4, 6, 6, 6, 6]
    assert task_types.group_sizes(TYPES, n_negatives, 3).tolist() == [2, 3, 3, 3, 3, 3]
    assert task_types.group_sizes(["only_1neg", "symmetric_class"], np.array([1, 1]), 1).tolist() == [1, 1]


def test_symmetric_passages_are_read_as_queries():
    assert task_types.read_as_queries(TYPES).tolist() == [False, False, True, True, False, False]


def test_short_groups_are_filled_up_and_told(data):
    sizes = _group_sizes(TrainConfig(train_group_size=6), data)
    plain = GroupDataset(data, 6, 1)
    for epoch in range(3):
        groups = [GroupDataset(data, 6, 1, sizes)[epoch, row] for row in range(6)]
        assert all(len(group.candidates) == 6 for group in groups)
        one, classes = groups[0].candidates, groups[1].candidates
        assert len(set(one.tolist())) == 2 and (one[1:] == one[1]).all()
        assert sorted(classes[:4].tolist()) == list(range(4, 8)) and (classes[4:] == classes[3]).all()
        for row in range(2, 6):  # as without any types
            assert groups[row].candidates.tolist() == plain[epoch, row].candidates.tolist()
    tokens = tokens_of([[row] for row in range(6)] + [[100 + m] for m in range(len(data.text_ids))])
    collate = EmbedderCollate(data, Chunker(tokens, 0, 64), 6 + np.arange(24), False, sizes)
    counted = collate([groups[1], groups[0], groups[5]])["counted"]
    assert counted.dtype == torch.bool and counted.sum(1).tolist() == [4, 2, 6] and counted[:, :2].all()


def test_groups_of_one_size_need_no_telling(tmp_path):
    data = candidates.load(**toy_tables(tmp_path, 4), group_size=3, seed=0)
    assert _group_sizes(TrainConfig(train_group_size=3), data) is None


def test_each_passage_is_read_as_its_query_wants_it(data, tmp_path):
    model = Embedder.load(EmbedderConfig(
        model=str(tiny_bert(tmp_path / "model")), query_instruction="foo ", passage_instruction="bar ",
        query_max_length=20, passage_max_length=30,
    ))  # fmt: skip
    collate = _collate(model, data, tmp_path / "texts.parquet", TrainConfig(), False, None, 0)
    tokens = collate.chunker.tokens
    texts = tables.read(tmp_path / "texts.parquet", "texts")["text"].to_pylist()
    for candidate, (row, text_id) in enumerate(zip(collate.text_rows, data.text_ids, strict=True)):
        query = candidate // 4  # one positive, three negatives
        passage = [texts[text_id]]
        if TYPES[query] in ("symmetric_sts", "symmetric_clustering"):
            wanted = model.tokenize(passage, "query", [data.prompts[query]])
        else:
            wanted = model.tokenize(passage, "passage")
        assert tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist() == wanted.ids.tolist()
    shared = {(int(text), kind in ("symmetric_sts", "symmetric_clustering") and (kind, data.prompts[row]))
              for row, kind in enumerate(TYPES) for text in data.text_ids[4 * row : 4 * row + 4]}  # fmt: skip
    assert len(tokens) == 6 + len(shared)  # no reading is there twice


def test_warnings_have_counts(data, caplog):
    with caplog.at_level(logging.WARNING, "retune"):
        _group_sizes(TrainConfig(train_group_size=6), data)
    shared, repeated = sorted(record.getMessage() for record in caplog.records)
    assert shared.startswith("2 queries of type symmetric_class or symmetric_clustering take in-batch negatives")
    assert shared.endswith("for the dataset of toy.jsonl")
    assert "4 of 6 queries have fewer negatives (3.0 on average) than their group takes (5)" in repeated


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"train_group_size": 4, "use_inbatch_neg": False}, {}),
        ({"train_group_size": 4}, {"in_batch_negatives": [True, False, True, False, True, True]}),
    ],
)
def test_no_warning_without_a_reason(tmp_path, caplog, settings, changed):
    data = candidates.load(**toy_tables(tmp_path, 6, type=TYPES, **changed), group_size=4, seed=0)
    with caplog.at_level(logging.WARNING, "retune"):
        _group_sizes(TrainConfig(**settings), data)
    assert not caplog.records
