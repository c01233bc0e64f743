"""Groups, their order, and the cutting of a batch into chunks."""

from __future__ import annotations

from functools import lru_cache
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_tables

from retune import tables
from retune.data import candidates
from retune.data.batches import (
    Chunker,
    EmbedderCollate,
    GroupDataset,
    RerankerCollate,
    joined,
    length_chunks,
    loader,
)
from retune.data.sampler import GroupSampler, Kind, Order
from retune.model.engine import tokens_of
from retune.runtime import UserError


def load(paths, group_size=3, seed=1, **options):
    return candidates.load(**paths, group_size=group_size, seed=seed, **options)


# ---- candidates ---------------------------------------------------------------------------------


def test_candidates_are_the_tables(tmp_path):
    paths = toy_tables(tmp_path, 10)
    data, pairs = load(paths), tables.read(paths["pairs"], "pairs").to_pylist()
    for row in range(10):
        mine = [pair for pair in pairs if pair["query_id"] == data.query_ids[row]]
        start, end = data.starts[row], data.starts[row] + data.n_positives[row] + data.n_negatives[row]
        assert data.text_ids[start:end].tolist() == [pair["text_id"] for pair in mine]
        assert data.n_positives[row] == 1 and np.isnan(data.scores[start:end]).all()


def test_dev_queries_long_queries_and_those_without_positives_are_left_out(tmp_path):
    labels = [1, 0, 0, 0] * 10
    labels[4 * 2] = 0
    paths = toy_tables(tmp_path, 10, split=["dev"] + ["train"] * 9, label=labels)
    bins = tmp_path / "bins.parquet"
    lengths = [5, 50, *[5] * 8]
    tables.write(bins, "bins", {"query_id": range(10), "n_tokens": lengths, "length_bin": ["len-0-500"] * 10})
    assert load(paths, bins=bins, drop_longer_than=20).query_ids.tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert load(paths, bins=bins, drop_longer_than=50).query_ids.tolist() == [1, 3, 4, 5, 6, 7, 8, 9]


def test_no_query_left_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no training query"):
        load(toy_tables(tmp_path, 3, split=["dev"] * 3))


def test_a_missing_teacher_score_names_the_query(tmp_path):
    scores = [0.5] * 40
    scores[4 * 3 + 2] = None
    with pytest.raises(UserError, match=r"1 of 40 pairs have no teacher score, the first for query toy\.jsonl:4"):
        load(toy_tables(tmp_path, 10, score=scores), scored=True)
    data = load(toy_tables(tmp_path, 10, score=np.arange(40.0).tolist()), scored=True)
    assert data.scores.tolist() == list(range(40))


def test_random_negatives_are_no_positives_of_the_same_text(tmp_path):
    texts = [f"query {row}" for row in range(6)]
    texts[1] = "QUERY  0"  # the same as query 0 to a reader: its positive is one of query 0's
    labels = [1, 0, 0, 0] * 6
    labels[1:4] = [1, 1, 1]  # query 0 has no negatives
    paths = toy_tables(tmp_path, 6, text=texts, label=labels)
    data = load(paths, group_size=4)
    start = data.starts[0] + data.n_positives[0]
    drawn = data.text_ids[start : start + data.n_negatives[0]].tolist()
    known = set(data.text_ids[:4].tolist()) | {1}
    assert len(known) == 5 and len(drawn) == len(set(drawn)) == 7  # 12 texts less 5
    assert not known & set(drawn)
    with pytest.raises(UserError, match=r"toy\.jsonl:1: no negatives"):
        load(toy_tables(tmp_path / "scored", 6, label=labels, score=[1.0] * 24), scored=True)


def test_max_queries_draws_with_the_seed(tmp_path):
    paths = toy_tables(tmp_path, 20)
    first, again, other = (load(paths, max_queries=5, seed=seed).query_ids.tolist() for seed in (1, 1, 2))
    assert len(first) == 5 and first == again != other


def test_texts_are_read_by_id(tmp_path):
    paths = toy_tables(tmp_path, 6)
    every = tables.read(paths["texts"], "texts")["text"].to_pylist()
    assert candidates.read_texts(paths["texts"], np.array([1, 4, 11])) == [every[1], every[4], every[11]]
    with pytest.raises(UserError, match="text_id 12"):
        candidates.read_texts(paths["texts"], np.array([1, 12]))


# ---- groups and their order ---------------------------------------------------------------------


def test_groups_depend_on_seed_epoch_and_query_alone(tmp_path):
    data = load(toy_tables(tmp_path, 10))
    draws = [GroupDataset(data, 3, seed)[epoch, 4].candidates.tolist() for seed in (1, 2) for epoch in range(8)]
    assert draws[:8] == [GroupDataset(data, 3, 1)[epoch, 4].candidates.tolist() for epoch in range(8)]
    assert len({tuple(draw) for draw in draws}) > 3
    for draw in draws:
        assert draw[0] == data.starts[4] and len(set(draw)) == 3
        assert all(data.starts[4] < row < data.starts[4] + 4 for row in draw[1:])


def test_too_few_negatives_are_repeated(tmp_path):
    data = load(toy_tables(tmp_path, 4, n_negatives=2), group_size=6)
    for epoch in range(20):
        negatives = GroupDataset(data, 6, 0)[epoch, 1].candidates[1:]
        assert len(negatives) == 5 and np.bincount(negatives - data.starts[1])[1:].max() <= 3


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 5))
def test_processes_share_every_batch_of_one(n_queries, batch_size, world, drop_last, epoch):
    def keys(rank, size, world):
        sampler = GroupSampler(Order([Kind(np.arange(n_queries), size)]), 3, drop_last, rank, world)
        sampler.epoch = epoch
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    alone = keys(0, batch_size * world, 1)
    shares = [keys(rank, batch_size, world) for rank in range(world)]
    assert len({tuple(map(len, share)) for share in shares}) == 1  # equal sizes on all processes
    together = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    lost = len(alone) - len(together)
    assert lost in (0, 1) and (lost == 0 or len(alone[-1]) < world)
    for one, many in zip(alone, together, strict=False):
        assert many == one[: len(many)] and len(one) - len(many) < world
    rows = [row for batch in together for _, row in batch]
    assert len(set(rows)) == len(rows) and {e for batch in alone for e, _ in batch} <= {epoch}
    if not drop_last:
        assert n_queries - len(rows) < world


def test_the_order_changes_with_the_epoch():
    sampler = GroupSampler(Order([Kind(np.arange(50), 50)]), 0)
    first = [row for _, row in next(iter(sampler))]
    sampler.epoch = 1
    second = [row for _, row in next(iter(sampler))]
    assert sorted(first) == sorted(second) == list(range(50)) and first != second


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_do_as_the_arguments_say_and_batches_stay_the_same(tmp_path, persistent):
    """prefetch_factor and persistent_workers are the DataLoader's; a worker that outlives an epoch knows the next."""
    data = load(toy_tables(tmp_path, 12))
    dataset, order = GroupDataset(data, 3, 1), Order([Kind(np.arange(12), 4)])
    seen = []
    for workers in (0, 1):
        sampler = GroupSampler(order, 1)
        made = loader(dataset, sampler, _drawn, workers, prefetch_factor=3, persistent_workers=persistent)
        seen.append([])
        for sampler.epoch in range(2):
            seen[-1].append(list(made))
    assert seen[0] == seen[1] and seen[0][0] != seen[0][1]
    assert (made.prefetch_factor, made.persistent_workers) == (3, persistent)


def _drawn(groups) -> list:
    return [(group.query, group.candidates.tolist(), group.epoch) for group in groups]


# ---- chunks -------------------------------------------------------------------------------------


def price(lengths, chunks, multiple, overhead) -> int:
    return sum(overhead + len(rows) * -(-max(lengths[row] for row in rows) // multiple) * multiple for rows in chunks)


def cheapest(lengths, max_tokens, multiple, overhead) -> int:
    """Over all ways to cut the sorted lengths."""
    widths = sorted((-(-n // multiple) * multiple for n in lengths), reverse=True)

    @lru_cache(None)
    def cost(start: int) -> int:
        ends = [
            end
            for end in range(start + 1, len(widths) + 1)
            if end == start + 1 or (end - start) * widths[start] <= max_tokens
        ]
        return min((overhead + (end - start) * widths[start] + cost(end) for end in ends), default=0)

    return cost(0)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=14), st.integers(1, 120), st.integers(1, 8), st.integers(0, 50),
    st.none() | st.integers(1, 5),
)  # fmt: skip
def test_chunks_hold_every_row_once_within_the_budget(lengths, max_tokens, multiple, overhead, max_rows):
    chunks = length_chunks(np.array(lengths), max_tokens, multiple, overhead, max_rows)
    assert sorted(np.concatenate(chunks).tolist()) == list(range(len(lengths)))
    for rows in chunks:
        width = -(-max(lengths[row] for row in rows) // multiple) * multiple
        assert len(rows) == 1 or len(rows) * width <= max_tokens
        assert max_rows is None or len(rows) <= max_rows


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 50))
def test_chunks_are_the_cheapest(lengths, multiple, overhead):
    chunks = length_chunks(np.array(lengths), 10**6, multiple, overhead)
    assert price(lengths, chunks, multiple, overhead) == cheapest(tuple(lengths), 10**6, multiple, overhead)


def test_chunks_give_back_every_row_in_its_place():
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 100, rng.integers(1, 12)).tolist() for _ in range(20)]
    rows = np.array([3, 3, 17, 0, 9, 3, 19])
    batch, places = Chunker(tokens_of(texts), 0, 30, 1, 4)(rows)
    assert sum(len(chunk["input_ids"]) for chunk in batch["chunks"]) == 5  # distinct rows
    assert batch["n_tokens"] == sum(len(texts[row]) for row in set(rows.tolist()))
    sums = np.concatenate([chunk["input_ids"].sum(1).numpy() for chunk in batch["chunks"]])
    assert sums[places].tolist() == [sum(texts[row]) for row in rows]


def test_joined_tokens_follow_each_other():
    both = joined([tokens_of([[1, 2], [3]]), tokens_of([[], [4, 5, 6]])])
    assert both.ids.tolist() == [1, 2, 3, 4, 5, 6] and both.offsets.tolist() == [0, 2, 3, 3, 6]


def test_embedder_batch_by_hand(tmp_path):
    texts = ["same query", "other", "SAME  query", "another"]
    data = load(toy_tables(tmp_path, 4, text=texts, score=np.arange(16.0).tolist()), scored=True)
    ids, which = np.unique(data.text_ids, return_inverse=True)
    tokens = tokens_of([[row] for row in range(4)] + [[100 + id] for id in ids])
    collate = EmbedderCollate(data, Chunker(tokens, 0, 64), 4 + which, scored=True)
    groups = [GroupDataset(data, 3, 0)[0, row] for row in (2, 1)]
    batch = collate(groups)
    flat = torch.cat([chunk["input_ids"][:, 0] for chunk in batch["chunks"]])
    assert flat[batch["query_places"]].tolist() == [2, 1] == batch["queries"].tolist()
    passages = [data.text_ids[row] for group in groups for row in group.candidates]
    assert (flat[batch["passage_places"]] - 100).tolist() == passages == batch["passage_ids"].tolist()
    assert batch["passage_ids"][[0, 3]].tolist() == [2, 1]  # the positives come first
    known = set(zip(batch["positive_rows"].tolist(), batch["positive_ids"].tolist(), strict=True))
    assert known == {(0, 0), (0, 2), (1, 1)}  # queries 0 and 2 have the same text
    assert batch["teacher"].tolist() == [data.scores[group.candidates].tolist() for group in groups]


def test_reranker_batch_points_at_the_pairs(tmp_path):
    data = load(toy_tables(tmp_path, 4))
    tokens = tokens_of([[row] * (1 + row % 3) for row in range(len(data.text_ids))])
    groups = [GroupDataset(data, 3, 0)[0, row] for row in (3, 0)]
    batch = RerankerCollate(Chunker(tokens, 0, 4, 1, 0))(groups)
    flat = torch.cat([chunk["input_ids"][:, 0] for chunk in batch["chunks"]])
    assert flat[batch["pair_places"]].tolist() == [group.candidates.tolist() for group in groups]
