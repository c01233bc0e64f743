"""Reciprocal rank fusion: the paper's formula by hand, and against a dictionary's sums."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retune.data.fusion import fuse


def test_by_hand():
    """Text 7 is 1st and 3rd, 5 is 2nd and 1st, 9 is 3rd alone, 2 is 2nd alone."""
    scores, ids = fuse([np.array([[7, 5, 9]]), np.array([[5, 2, 7]])], 5)
    assert ids.tolist() == [[5, 7, 2, 9, -1]]
    expected = [1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62, 1 / 63, -np.inf]
    np.testing.assert_allclose(scores[0], expected, rtol=1e-7)
    assert (scores.dtype, ids.dtype) == (np.float32, np.int64)


def test_the_constant_counts():
    """With 0, first in one ranking is worth more than second and third together; with 60 it is not."""
    rankings = [np.array([[1, 2, 3]]), np.array([[4, 5, 2]])]
    assert fuse(rankings, 2, constant=0)[1].tolist() == [[1, 4]]
    assert fuse(rankings, 2)[1].tolist() == [[2, 1]]
    np.testing.assert_allclose(fuse(rankings, 1, constant=0)[0], [[1.0]])


def test_ties_are_by_id_and_ranks_are_symmetric():
    first, second = np.array([[8, 3, 6]]), np.array([[6, 3, 8]])
    scores, ids = fuse([first, second], 3)
    assert ids.tolist() == [[6, 8, 3]]  # 1/61 + 1/63 twice, a little more than 2/62
    assert scores[0, 0] == scores[0, 1] > scores[0, 2]
    for one, two in zip(fuse([second, first], 3), (scores, ids), strict=True):
        np.testing.assert_array_equal(one, two)


def test_none_is_no_text():
    nothing = np.full((2, 3), -1)
    scores, ids = fuse([nothing, nothing], 2)
    assert (ids == -1).all() and np.isneginf(scores).all()
    assert fuse([nothing, np.array([[4, -1], [-1, -1]])], 2)[1].tolist() == [[4, -1], [-1, -1]]
    assert fuse([np.empty((3, 0), int)], 2)[1].tolist() == [[-1, -1]] * 3
    assert fuse([np.empty((0, 4), int)], 2)[1].shape == (0, 2)


def plain(rankings, k: int, constant: int):
    """Row by row, with a dictionary."""
    rows = []
    for row in range(len(rankings[0])):
        sums: dict[int, float] = {}
        for ranking in rankings:
            for rank, text in enumerate(ranking[row].tolist(), 1):
                if text >= 0:
                    sums[text] = sums.get(text, 0.0) + 1 / (constant + rank)
        best = sorted(sums, key=lambda text: (-np.float32(sums[text]), text))[:k]
        rows.append(([np.float32(sums[text]) for text in best], best))
    return rows


@given(data=st.data())
def test_equals_the_plain_sums(data):
    n, k, constant = (data.draw(st.integers(1, top)) for top in (4, 12, 100))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    rankings = []
    for width in data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)):
        ranking = np.stack([rng.permutation(12)[:width] for _ in range(n)])
        ranking[rng.random(ranking.shape) < 0.2] = -1
        rankings.append(ranking)
    scores, ids = fuse(rankings, k, constant)
    for row, (wanted_scores, wanted) in enumerate(plain(rankings, k, constant)):
        assert ids[row, : len(wanted)].tolist() == wanted and (ids[row, len(wanted) :] == -1).all()
        np.testing.assert_array_equal(scores[row, : len(wanted)], wanted_scores)
        assert np.isneginf(scores[row, len(wanted) :]).all()
