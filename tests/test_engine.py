"""The engine: batches cover all rows under the budget, and results do not depend on how they are cut."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import some_texts, tiny_tokenizer

from retune.model import engine
from retune.model.engine import Tokenizer, Tokens, pad, token_batches, tokens_of
from retune.runtime import UserError

CPU = torch.device("cpu")
lengths_of_texts = st.lists(st.integers(1, 200), max_size=80)


def tokens_with(lengths, seed: int = 0, segments: bool = False) -> Tokens:
    rng = np.random.default_rng(seed)
    made = tokens_of([rng.integers(5, 100, n).tolist() for n in lengths])
    return Tokens(made.ids, made.offsets, (made.ids % 2).astype(np.int8)) if segments else made


def checksum(input_ids, attention_mask=None, token_type_ids=None):
    """A result that padding must not change: [B, 2], sum of ids and of ids weighted by position."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    places = torch.arange(1, input_ids.shape[1] + 1)
    return torch.stack([(input_ids * mask).sum(1), (input_ids * mask * places).sum(1)], 1).float()


def run(forward, tokens, max_tokens=256, multiple=1):
    return engine.run(forward, tokens, pad_id=0, max_tokens=max_tokens, multiple=multiple, device=CPU)


# ---- flat tokens --------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 30000), max_size=9), max_size=20), st.data())
def test_take_gives_the_texts_asked_for_in_that_order(texts, data):
    tokens = tokens_of(texts)
    tokens = Tokens(tokens.ids, tokens.offsets, (tokens.ids % 2).astype(np.int8))
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=30)) if texts else []
    part = tokens.take(np.array(rows, np.int64))
    back = [part.ids[a:b].tolist() for a, b in zip(part.offsets, part.offsets[1:], strict=False)]
    assert back == [texts[row] for row in rows]
    assert (part.type_ids == part.ids % 2).all()
    assert part.lengths.tolist() == [len(texts[row]) for row in rows]
    assert tokens.ids.dtype == np.int32


# ---- batches ------------------------------------------------------------------------------------


@given(lengths_of_texts, st.integers(1, 600), st.sampled_from([1, 8, 16]))
def test_batches_hold_every_row_once_under_the_budget_longest_first(lengths, budget, multiple):
    lengths = np.array(lengths, np.int64)
    batches = token_batches(lengths, budget, multiple)
    rows = np.concatenate([np.empty(0, int), *batches])
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert (np.diff(lengths[rows]) <= 0).all()
    for batch in batches:
        width = -(-lengths[batch].max() // multiple) * multiple
        assert len(batch) == 1 or len(batch) * width <= budget


def test_batches_are_full_and_waste_little():
    lengths = np.random.default_rng(0).integers(10, 300, 5000)
    batches = token_batches(lengths, 4096)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded / lengths.sum() < 1.02
    assert len(batches) <= 1.1 * lengths.sum() / 4096


def test_pad_by_hand():
    tokens = Tokens(np.array([7, 8, 9, 5], np.int32), np.array([0, 3, 4]), np.array([0, 1, 1, 0], np.int8))
    batch = pad(tokens, np.array([1, 0]), pad_id=2, multiple=4)
    assert batch["input_ids"].tolist() == [[5, 2, 2, 2], [7, 8, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0]]
    whole = pad(Tokens(tokens.ids, tokens.offsets), np.array([0]), pad_id=2)
    assert whole["input_ids"].tolist() == [[7, 8, 9]]
    assert set(whole) == {"input_ids"}, "no mask where nothing is padded, no segments where there are none"


# ---- run ----------------------------------------------------------------------------------------


@given(lengths_of_texts.filter(bool), st.integers(1, 2000), st.sampled_from([1, 8]), st.booleans())
def test_results_are_in_order_whatever_the_budget(lengths, budget, multiple, segments):
    tokens = tokens_with(lengths, segments=segments)
    texts = np.split(tokens.ids.astype(np.int64), tokens.offsets[1:-1])
    expected = [[text.sum(), (text * np.arange(1, len(text) + 1)).sum()] for text in texts]
    found = run(checksum, tokens, budget, multiple)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_nothing_in_nothing_out():
    assert run(checksum, tokens_of([])).shape == (0,)


@pytest.mark.parametrize("fits", [30, 64, 100, 400])
def test_out_of_memory_halves_and_computes_nothing_twice(fits):
    tokens = tokens_with(np.random.default_rng(1).integers(1, 30, 300))
    computed, tries = [], []

    def small(input_ids, attention_mask=None):
        tries.append(input_ids.numel())
        if input_ids.numel() > fits:
            raise torch.OutOfMemoryError("too much")
        computed.append(len(input_ids))
        return checksum(input_ids, attention_mask)

    found = run(small, tokens, 512)
    np.testing.assert_array_equal(found, run(checksum, tokens, 512))
    assert sum(computed) == len(tokens)
    failed = sum(size > fits for size in tries)
    assert 1 <= failed <= 6, "the budget stays halved, so failures do not repeat with every batch"


def test_memory_that_runs_out_later_loses_nothing():
    tokens, calls = tokens_with(np.random.default_rng(1).integers(1, 30, 300)), []

    def shrinking(input_ids, attention_mask=None):
        calls.append(len(input_ids))
        if len(calls) > 5 and input_ids.numel() > 60:
            calls.pop()
            raise torch.OutOfMemoryError("too much")
        return checksum(input_ids, attention_mask)

    np.testing.assert_array_equal(run(shrinking, tokens, 512), run(checksum, tokens, 512))
    assert sum(calls) == len(tokens)


def test_one_text_that_does_not_fit_is_the_users_to_cut():
    def never(**batch):
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(UserError, match=r"one text of 33 tokens .* \*_max_length"):
        run(never, tokens_with([5, 33, 2]), 64)


def test_the_bar_counts_texts():
    class Bar:
        n = 0

        def update(self, by):
            self.n += by

    bar, tokens = Bar(), tokens_with([3] * 50)
    engine.run(checksum, tokens, pad_id=0, max_tokens=10, multiple=1, device=CPU, bar=bar)
    assert bar.n == 50


# ---- tokenizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("limit", [None, 3, 9, 64])
def test_tokenizer_equals_transformers_own_call(tmp_path, special, limit):
    hf = tiny_tokenizer(tmp_path)
    texts = [*some_texts(30), "", "word unknown to it"]
    options = {"truncation": True, "max_length": limit} if limit else {}
    expected = hf(texts, add_special_tokens=special, **options)["input_ids"]
    found = Tokenizer(hf)(texts, limit, special)
    assert [found.ids[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)] == expected


def test_a_saved_tokenizer_is_as_it_was_loaded(tmp_path):
    hf = tiny_tokenizer(tmp_path / "old")
    tokenizer = Tokenizer(hf)
    tokenizer(["bar"], 7)
    tokenizer.save(tmp_path / "new")
    assert (tmp_path / "new/tokenizer.json").read_text() == (tmp_path / "old/tokenizer.json").read_text()
