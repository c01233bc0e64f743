"""The order of batches: complete, seeded, homogeneous where asked, free of duplicates where that can be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retune.data.sampler import GroupSampler, Kind, Order, kinds
from retune.data.sampler import marks as marks_of

LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def of_one_kind(n_queries: int, batch_size: int) -> list[Kind]:
    return [Kind(np.arange(n_queries), batch_size)]


def epochs(found, epoch: int, **how) -> list[list[list[int]]]:
    """Batches of each process of a world, in an epoch: [world][batch] → rows."""
    world = how.pop("world", 1)
    shown = []
    for rank in range(world):
        sampler = GroupSampler(Order(found, how.get("marks")), 7, how.get("drop_last", False), rank, world)
        sampler.epoch = epoch
        batches = [[query for _, query in batch] for batch in sampler]
        assert len(batches) == len(sampler)
        shown.append(batches)
    return shown


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_every_batch_is_of_one_kind_and_every_query_comes_once(labels, batch_size, world, drop_last):
    labels = np.array(labels)
    found = kinds(len(labels), batch_size, [labels])
    ranks = epochs(found, 0, world=world, drop_last=drop_last)
    seen = [query for batches in ranks for batch in batches for query in batch]
    assert len(seen) == len(set(seen)) <= len(labels)
    for step in zip(*ranks, strict=True):
        together = [query for batch in step for query in batch]
        assert len(set(labels[together])) == 1 and len({len(batch) for batch in step}) == 1
    left_out = np.bincount(labels, minlength=4) - np.bincount(labels[seen], minlength=4)
    most = batch_size * world - 1 if drop_last else world - 1
    assert (left_out <= most).all() and (left_out >= 0).all()


def test_order_depends_on_seed_and_epoch_alone_and_kinds_are_mixed():
    labels = np.repeat([0, 1, 2], 40)
    found = kinds(120, 4, [labels])
    first, again, later = (epochs(found, epoch)[0] for epoch in (0, 0, 1))
    assert first == again != later
    kinds_in_order = [labels[batch[0]] for batch in first]
    assert kinds_in_order != sorted(kinds_in_order), "batches of all kinds are shuffled among each other"


def test_labels_combine_and_a_kind_has_its_own_batch_size():
    dataset, length = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 0, 0, 1, 1])
    own = np.where(dataset == 1, 2.0, np.nan)
    own[4] = 1
    found = kinds(8, 4, [dataset, length], own)
    assert [kind.rows.tolist() for kind in found] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [kind.batch_size for kind in found] == [4, 4, 1, 2]
    assert sorted(map(len, epochs(found, 0)[0])) == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("drop, expected", [(0, [[0, 1, 2, 3], [4, 5, 6]]), (4, [[0, 1, 2, 3]])])
def test_small_datasets_are_merged_and_what_is_still_small_dropped(drop, expected, caplog):
    dataset = np.array([0, 0, 0, 0, 1, 1, 2])
    found = kinds(7, 4, [dataset], names=["big", "little", "tiny"], small_threshold=3, drop_threshold=drop)
    assert [kind.rows.tolist() for kind in found] == expected
    if drop:
        assert "3 queries of 2 small datasets are left out (little, tiny)" in caplog.text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=40), st.integers(1, 5))
def test_duplicates_are_kept_apart_where_that_can_be(marks, batch_size):
    """Nothing is lost, and a batch has duplicates only where nothing else was left for it."""
    marks = [np.array(sorted(set(own))) for own in marks]
    [batches] = epochs(of_one_kind(len(marks), batch_size), 0, marks=marks)
    assert sorted(query for batch in batches for query in batch) == list(range(len(marks)))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    for number, batch in enumerate(batches):
        seen: set[int] = set()
        fitting = []
        for query in batch:
            if seen.isdisjoint(marks[query].tolist()):
                fitting.append(query)
                seen.update(marks[query].tolist())
        if len(fitting) < len(batch):  # then no later query would have fitted
            later = [query for other in batches[number + 1 :] for query in other]
            assert all(not seen.isdisjoint(marks[query].tolist()) for query in later)


def test_pairs_of_equal_queries_never_meet():
    marks = [np.array([query // 2]) for query in range(64)]
    for epoch in range(5):
        [batches] = epochs(of_one_kind(64, 8), epoch, marks=marks)
        assert all(len({query // 2 for query in batch}) == 8 for batch in batches[:-1])


def test_marks_are_the_texts_of_queries_and_their_positives():
    """Queries 0 and 2 have one text; 0 and 1 share the positive 7; negatives (8, 9) count for nothing."""
    found = marks_of(np.array([0, 1, 0]), np.array([2, 1, 1]), np.array([0, 3, 5]), np.array([7, 7, 8, 7, 9, 3]))
    shared = [[bool(set(a.tolist()) & set(b.tolist())) for b in found] for a in found]
    assert shared == [[True, True, True], [True, True, False], [True, False, True]]
