"""BM25: the formula by hand, every ranking against plain sums, and words of all scripts."""

import math
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retune import tables
from retune.data import lexical
from retune.data.lexical import words
from retune.data.text import normalise


def table(folder: Path, texts: list[str]) -> Path:
    path = folder / "texts.parquet"
    tables.write(path, "texts", {"text_id": range(len(texts)), "text": texts, "key": [None] * len(texts)})
    return path


def plain(texts: list[str], query: str) -> list[float]:
    """BM25 of the query and each text, by the formula (Robertson and Zaragoza 2009, idf as Lucene has it)."""
    split = [words(text) for text in texts]
    mean = sum(map(len, split)) / len(split) or 1.0
    scores = []
    for text in split:
        counts, score = Counter(text), 0.0
        for word in words(query):
            df = sum(word in other for other in split)
            idf = math.log(1 + (len(split) - df + 0.5) / (df + 0.5))
            score += idf * counts[word] / (counts[word] + 1.5 * (1 - 0.75 + 0.75 * len(text) / mean))
        scores.append(score)
    return scores


# ---- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Vitamin C, x-ray; snake_case 42!", ["vitamin", "c", "x", "ray", "snake_case", "42"]),
        ("naïve CAFÉ Straße ﬁne ＡＢＣ", ["naïve", "café", "strasse", "fine", "abc"]),
        ("cafe\u0301", ["café"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # the vowel signs are marks, no letters
        ("لُغَة عربية", ["لُغَة", "عربية"]),
        ("한국어 검색", ["한국어", "검색"]),
        ("東京タワー。高い", ["東京", "京タ", "タワ", "ワー", "高い"]),
        ("東 京", ["東", "京"]),
        ("ภาษา", ["ภา", "าษ", "ษา"]),
        ("GPT模型v2", ["gpt", "模型", "v2"]),
        (" \t…?!", []),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == [normalise(word) for word in expected]


@given(st.text(st.characters(max_codepoint=127)))
def test_the_fast_way_of_ascii_is_the_same(text):
    """What `words` does to a text with one letter beyond ASCII, it does to any."""
    assert [*words(text), "é"] == words(text + " é")


@given(st.text())
def test_words_hold_all_letters_and_digits(text):
    found = words(text)
    assert all(found) and {sign for sign in normalise(text) if sign.isalnum()} <= set("".join(found))
    assert found == words(normalise(text))


# ---- scores -------------------------------------------------------------------------------------


def test_by_hand(tmp_path):
    """Three texts of 2, 3 and 1 words: the mean is 2.  "cat" is in two of them, "dog" in one."""
    index = lexical.build(table(tmp_path, ["cat sat", "Cat, cat: dog", "bird"]))
    scores, ids = index.search(["cat", "DOG cat", "bird bird", "fish", ""], 3)
    assert ids.tolist() == [[1, 0, -1], [1, 0, -1], [2, -1, -1], [-1] * 3, [-1] * 3]
    cat, rare = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)
    first = cat * 2 / (2 + 1.5 * (0.25 + 0.75 * 1.5))
    zeroth = cat / (1 + 1.5)
    np.testing.assert_allclose(scores[0, :2], [first, zeroth], rtol=1e-6)
    np.testing.assert_allclose(scores[1, 0], first + rare / (1 + 1.5 * (0.25 + 0.75 * 1.5)), rtol=1e-6)
    np.testing.assert_allclose(scores[2, 0], 2 * rare / (1 + 1.5 * (0.25 + 0.75 * 0.5)), rtol=1e-6)
    assert np.isneginf(scores[ids < 0]).all() and (scores.dtype, ids.dtype) == (np.float32, np.int64)


WORDS = st.lists(st.sampled_from(["a", "b", "c", "dd", "東京", "é"]), max_size=6).map(" ".join)


@settings(max_examples=60)
@given(data=st.data())
def test_equals_the_plain_sums_with_ties_by_id(tmp_path_factory, data):
    texts = data.draw(st.lists(WORDS, min_size=1, max_size=25))
    queries = data.draw(st.lists(WORDS, min_size=1, max_size=4))
    k = data.draw(st.integers(1, 30))
    only = np.array(data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))))
    only = only if data.draw(st.booleans()) else None
    index = lexical.build(table(tmp_path_factory.mktemp("bm25"), texts))
    scores, ids = index.search(queries, k, only)
    rows, columns = (axis.ravel() for axis in np.indices((len(queries), len(texts))))
    pairs = index.pair_scores(queries, rows, columns).reshape(len(queries), len(texts))
    for row, query in enumerate(queries):
        np.testing.assert_allclose(pairs[row], plain(texts, query), rtol=1e-5)
        fitting = [i for i in range(len(texts)) if pairs[row, i] > 0 and (only is None or only[i])]
        best = sorted(fitting, key=lambda i: (-pairs[row, i], i))[:k]
        assert ids[row].tolist() == best + [-1] * (k - len(best))
        np.testing.assert_array_equal(scores[row, : len(best)], pairs[row, best])
        assert np.isneginf(scores[row, len(best) :]).all()


def test_many_texts_and_ties(tmp_path):
    """More texts than are asked for, most of them alike: the first by id, with or without a mask."""
    texts = ["red apple" if i % 3 else f"apple {i}" for i in range(2000)]
    index = lexical.build(table(tmp_path, texts))
    scores, ids = index.search(["red apple", "apple"], 50)
    assert ids[0].tolist() == [i for i in range(2000) if i % 3][:50]
    assert ids[1].tolist() == list(range(50)) and len(set(scores[1].tolist())) == 1
    only = np.arange(2000) % 5 == 0
    assert index.search(["red apple"], 50, only)[1][0].tolist() == [i for i in range(0, 2000, 5) if i % 3][:50]


def test_pairs_without_a_text_or_a_common_word(tmp_path):
    index = lexical.build(table(tmp_path, ["cat", "dog"]))
    found = index.pair_scores(["cat", "fish", ""], np.array([2, 0, 0, 1, 0]), np.array([0, -1, 1, 0, 0]))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:4], [0, -np.inf, 0, 0])
    assert found[4] == index.search(["cat"], 1)[0][0, 0] > 0
    assert index.pair_scores([], np.empty(0, int), np.empty(0, int)).shape == (0,)


@pytest.mark.parametrize("texts", [[], ["", "…"]])
def test_texts_without_words(tmp_path, texts):
    index = lexical.build(table(tmp_path, texts))
    scores, ids = index.search(["cat", ""], 2)
    assert (ids == -1).all() and np.isneginf(scores).all()
    if texts:
        np.testing.assert_array_equal(index.pair_scores(["cat"], np.array([0, 0]), np.array([1, -1])), [0, -np.inf])


def test_streamed_texts_give_the_librarys_own_index(tmp_path):
    """The flat array of words in place of lists, and batches of the table, change nothing."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.zipf(1.5, rng.integers(1, 20)) % 500) for _ in range(5000)]
    index = lexical.build(table(tmp_path, texts))
    own = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    own.index([words(text) for text in texts], show_progress=False)
    for query in texts[:20]:
        found = index._model.get_scores_from_ids(index._numbers(query))
        np.testing.assert_array_equal(found, own.get_scores(words(query)))


def test_the_same_twice(tmp_path):
    texts = [f"w{i % 7} w{i % 11} w{i % 13}" for i in range(500)]
    one, two = (lexical.build(table(tmp_path, texts)).search(texts[:30], 40) for _ in range(2))
    for left, right in zip(one, two, strict=True):
        assert left.tobytes() == right.tobytes()
