"""Shuffled passages: what is drawn, what becomes of it, and how a batch takes it up."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retune.data.batches import Chunker
from retune.data.shuffle import Shuffler, shuffled
from retune.model.engine import tokens_of

LONG = "".join(chr(ord("a") + i % 26) for i in range(120))


def letters(texts: list[str]):
    """A letter a token."""
    return tokens_of([[ord(letter) for letter in text] for text in texts])


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=101, max_size=400), st.integers(0, 99))
def test_three_thirds_change_places_and_nothing_is_lost(text, seed):
    size = len(text) // 3 + 1
    found = shuffled(text, np.random.default_rng(seed))
    thirds = [text[:size], text[size : 2 * size], text[2 * size :]]
    orders = [" ".join(order) for order in permutations(thirds)]
    assert found in orders


def test_a_short_text_stays():
    assert shuffled("x" * 100, np.random.default_rng(0)) == "x" * 100


def test_the_share_is_drawn_anew_each_epoch_and_depends_on_the_seed_alone():
    texts = [LONG] * 300 + ["short"] * 300
    first = Shuffler(texts, 10, letters, 0.3, 7)
    rows = np.arange(610)  # 10 queries, then the passages
    drawn, tokens = first(0, rows)
    assert not drawn[:10].any() and not drawn[310:].any()
    assert 60 <= drawn.sum() <= 120 and len(tokens) == drawn.sum()
    again, same = Shuffler(texts, 10, letters, 0.3, 7)(0, rows)
    assert (again == drawn).all() and same.ids.tolist() == tokens.ids.tolist()
    assert (first(1, rows)[0] != drawn).any() and (Shuffler(texts, 10, letters, 0.3, 8)(0, rows)[0] != drawn).any()
    part = first(0, rows[50:90])[0]
    assert (part == drawn[50:90]).all(), "what else is in the batch changes nothing"


def test_a_batch_reads_the_shuffled_tokens_in_their_places():
    plain = [[7], [1, 2, 3], [4], [5, 6]]
    other = {1: [3, 2, 1, 9], 3: [6, 5]}

    def instead(rows: np.ndarray):
        changed = np.isin(rows, list(other))
        return changed, tokens_of([other[row] for row in rows[changed].tolist()])

    rows = np.array([3, 0, 1, 1, 2])
    batch, places = Chunker(tokens_of(plain), 0, 8, 1, 0)(rows, instead)
    read = [
        row[mask > 0].tolist() if mask is not None else row.tolist()
        for chunk in batch["chunks"]
        for row, mask in zip(chunk["input_ids"], _masks(chunk), strict=True)
    ]
    assert [read[place] for place in places] == [other.get(row, plain[row]) for row in rows.tolist()]
    assert batch["n_tokens"] == sum(len(other.get(row, plain[row])) for row in range(4))


def _masks(chunk):
    mask = chunk.get("attention_mask")
    return [None] * len(chunk["input_ids"]) if mask is None else mask
