"""The engine: batches cover all rows under the budget, and results do not depend on how they are cut."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import some_texts, tiny_tokenizer

from retune.model import engine
from retune.model.budget import TokenBudget, budget_for, out_of_memory
from retune.model.engine import Tokenizer, Tokens, pad, rounded, tokens_of
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


def batches_of(lengths, budget, multiple=1) -> list[tuple[int, int]]:
    """(texts, width) of each batch that `run` makes."""
    shapes = []

    def watched(input_ids, attention_mask=None):
        shapes.append(tuple(input_ids.shape))
        return checksum(input_ids, attention_mask)

    run(watched, tokens_with(lengths), budget, multiple)
    return shapes


@given(lengths_of_texts, st.integers(1, 600), st.sampled_from([1, 8, 16]))
def test_batches_are_under_the_budget_longest_first_and_full(lengths, budget, multiple):
    shapes = batches_of(lengths, budget, multiple)
    assert sum(texts for texts, _ in shapes) == len(lengths)
    widths = rounded(np.array(sorted(lengths, reverse=True), np.int64), multiple)
    for texts, width in shapes:
        assert width == widths[0], "the longest that is left"
        assert texts == 1 or texts * width <= budget
        assert texts == len(widths) or (texts + 1) * width > budget
        widths = widths[texts:]


def test_rounding_by_hand():
    lengths = np.array([0, 1, 15, 16, 31, 32, 33, 63, 65, 127, 129, 200, 255, 257, 500, 513, 2000])
    assert rounded(lengths, 1).tolist() == lengths.tolist()
    expected = [0, 1, 15, 16, 31, 32, 34, 64, 68, 128, 136, 200, 256, 272, 512, 528, 2000]
    assert rounded(lengths, 16).tolist() == expected
    assert rounded(lengths, 8).tolist() == [*expected[:13], 264, 504, 520, 2000]
    every = np.arange(1, 4000)
    assert (rounded(every, 16) <= every * 17 / 16).all()
    assert len(set(rounded(np.arange(1, 513), 16).tolist())) == 96, "few shapes"


@pytest.mark.parametrize(("multiple", "limit"), [(1, 0.01), (8, 0.03), (16, 0.03)])
def test_padding_is_under_three_percent_of_computed_tokens(multiple, limit):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.4, 0.9, 20_000).astype(int), 3, 512)  # docstrings: median 81, mean 112
    computed = sum(texts * width for texts, width in batches_of(lengths, 4096, multiple))
    assert 1 - lengths.sum() / computed < limit


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


MESSAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    MemoryError("Unable to allocate 3 GiB for an array"),
]


@pytest.mark.parametrize("error", MESSAGES, ids=lambda error: type(error).__name__)
def test_memory_of_the_host_may_run_out_too(error):
    tokens, sizes = tokens_with([20] * 40), []

    def small(input_ids):
        sizes.append(input_ids.numel())
        if input_ids.numel() > 100:
            raise error
        return checksum(input_ids)

    np.testing.assert_array_equal(run(small, tokens, 400), run(checksum, tokens, 400))
    assert sizes[:3] == [400, 160, 60], "half, less an eighth, in whole texts"
    assert sum(size for size in sizes if size <= 100) == 800


def test_other_errors_are_raised_as_they_are():
    def broken(**batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(broken, tokens_with([3, 4]))
    assert not out_of_memory(ValueError("out of memory"))


# ---- finding the budget -------------------------------------------------------------------------


def probe(fits: int, budget: TokenBudget, lengths) -> list[tuple[int, bool]]:
    """(padded tokens, whether they fitted) of each batch of a run on a device where `fits` tokens fit."""
    tokens, tries, computed = tokens_with(lengths), [], []

    def limited(input_ids, attention_mask=None):
        tries.append((input_ids.numel(), input_ids.numel() <= fits))
        if input_ids.numel() > fits:
            raise torch.OutOfMemoryError("too much")
        computed.append(len(input_ids))
        return checksum(input_ids, attention_mask)

    np.testing.assert_array_equal(run(limited, tokens, budget), run(checksum, tokens, 64))
    assert sum(computed) == len(lengths), "no text is computed twice"
    return tries


@given(st.integers(200, 5000), lengths_of_texts.filter(lambda lengths: len(lengths) > 5))
def test_the_probe_grows_to_what_fits_with_at_most_one_failure(fits, lengths):
    budget = TokenBudget(200, 4000)
    tries = probe(fits, budget, lengths)
    assert sum(not fitted for _, fitted in tries) <= 1
    assert budget.tokens <= 4000


def test_the_probe_doubles_while_it_fits_then_stays():
    lengths = [10] * 2000
    budget = TokenBudget(100, 1600)
    sizes = [size for size, _ in probe(10**6, budget, lengths)]
    assert sizes[:5] == [100, 200, 400, 800, 1600]
    assert set(sizes[4:-1]) == {1600}
    assert (budget.tokens, budget.growing) == (1600, False)


def test_the_probe_goes_back_below_half_of_what_did_not_fit_and_tells_the_next_run():
    budget = TokenBudget(100, 10**6)
    tries = probe(1000, budget, [10] * 2000)
    assert tries[:6] == [(100, True), (200, True), (400, True), (800, True), (1600, False), (700, True)]
    assert {size for size, _ in tries[5:-1]} == {700}
    assert {size for size, _ in probe(1000, budget, [10] * 700)} == {700}


def test_the_probe_halves_where_even_the_first_batch_is_too_large():
    budget = TokenBudget(1000, 8000)
    tries = probe(300, budget, [10] * 500)
    assert tries[:4] == [(1000, False), (430, False), (180, True), (180, True)]


def test_small_batches_prove_nothing():
    budget = TokenBudget(100, 800)
    budget.fitted(50)
    assert budget.tokens == 100
    budget.fitted(60)
    assert budget.tokens == 200
    budget.fitted(200, room=False)
    assert (budget.tokens, budget.growing) == (200, False)


def test_the_budget_of_a_device():
    gpu, cpu = budget_for(torch.device("cuda"), torch.bfloat16), budget_for(CPU, torch.float32)
    assert gpu.growing and gpu.ceiling > gpu.tokens
    assert not cpu.growing
    assert not budget_for(CPU, torch.bfloat16).growing


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
