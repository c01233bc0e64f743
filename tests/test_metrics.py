"""Measures against hand-made numbers, plain-Python definitions and the reference library; intervals and tests."""

import itertools
import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retune.data import metrics
from retune.data.significance import bootstrap_interval, randomisation_test

CUTOFFS = (1, 3, 10, 100)


def ranking(run: dict[int, list[int]], qrels: dict[int, dict[int, int]], level: int = 1) -> metrics.Ranking:
    """A `Ranking` from {query: passages in order} and {query: {passage: grade}}."""
    judged = [(q, d, grade) for q, grades in qrels.items() for d, grade in grades.items()]
    found = [(q, d, rank) for q, ids in run.items() for rank, d in enumerate(ids, 1)]
    columns = np.array(found, np.int64).reshape(-1, 3).T
    return metrics.align(*columns, metrics.judge(*np.array(judged, np.int64).reshape(-1, 3).T, level))


def random_benchmark(n: int, seed: int, top_grade: int = 1):
    """Scores with many ties; the run breaks them by id, as the search does."""
    rng = np.random.default_rng(seed)
    scores, run, qrels = {}, {}, {}
    for q in range(n):
        ids = rng.choice(200, int(rng.integers(1, 121)), replace=False)
        scores[q] = {int(d): int(s) / 4 for d, s in zip(ids, rng.integers(0, 12, len(ids)), strict=True)}
        run[q] = sorted(scores[q], key=lambda d: (-scores[q][d], d))
        relevant = rng.choice(200, int(rng.integers(1, 16)), replace=False)
        qrels[q] = {
            int(d): int(g) for d, g in zip(relevant, rng.integers(0, top_grade + 1, len(relevant)), strict=True)
        }
        qrels[q][int(relevant[0])] = 1
    return scores, run, qrels


# ---- definitions --------------------------------------------------------------------------------


def test_hand_made_numbers():
    # relevant at ranks 2 and 4, a third one never retrieved
    found = metrics.values(ranking({7: [50, 51, 52, 53, 54]}, {7: {51: 1, 53: 1, 99: 1}}), [1, 2, 4, 10])
    expected = {
        "MRR": [0, 1 / 2, 1 / 2, 1 / 2],
        "Recall": [0, 1 / 2, 2 / 3, 2 / 3],
        "Hit": [0, 1, 1, 1],
        "P": [0, 1 / 2, 2 / 4, 2 / 10],
        "MAP": [0, (1 / 2) / 3, (1 / 2 + 2 / 4) / 3, (1 / 2 + 2 / 4) / 3],
    }
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    expected["nDCG"] = [0, (1 / math.log2(3)) / (1 + 1 / math.log2(3)), gain / ideal, gain / ideal]
    for measure, numbers in expected.items():
        assert [found[measure, k][0] for k in (1, 2, 4, 10)] == pytest.approx(numbers, abs=1e-12), measure


def test_recall_reaches_one_where_fewer_places_than_positives():
    found = metrics.values(ranking({0: [1, 2, 3]}, {0: dict.fromkeys(range(1, 9), 1)}), [3])
    assert found["Recall", 3].tolist() == [1.0]


def test_seeds_definitions_on_a_thousand_random_rankings_with_ties():
    scores, run, qrels = random_benchmark(1000, seed=1)
    found = metrics.values(ranking(run, qrels), CUTOFFS)
    for q, k in itertools.product(range(1000), CUTOFFS):
        top = sorted(scores[q].items(), key=lambda item: (-item[1], item[0]))[:k]
        relevant = {d for d, grade in qrels[q].items() if grade > 0}
        hits = [rank for rank, (d, _) in enumerate(top, 1) if d in relevant]
        assert found["MRR", k][q] == (1 / hits[0] if hits else 0)
        assert found["Recall", k][q] == pytest.approx(len(hits) / min(k, len(relevant)), abs=1e-12)
        assert found["Hit", k][q] == bool(hits)


@pytest.mark.parametrize(("top_grade", "level"), [(1, 1), (3, 1), (3, 2)])
def test_equal_to_the_reference_library_on_a_thousand_random_rankings_with_ties(top_grade, level):
    """The library sorts by score and breaks ties in its own way, so it is told our order."""
    _, run, qrels = random_benchmark(1000, seed=2, top_grade=top_grade)
    aligned = ranking(run, qrels, level)
    found, n_relevant = metrics.values(aligned, CUTOFFS), aligned.judgments.n_relevant
    scored = {str(q): {str(d): 1 / rank for rank, d in enumerate(ids, 1)} for q, ids in run.items()}
    judged = {str(q): {str(d): grade for d, grade in grades.items()} for q, grades in qrels.items()}
    binary = {"MRR": "RR", "Hit": "Success", "MAP": "AP", "P": "P", "Recall": "R"}
    same = {name: f"{theirs}(rel={level})" for name, theirs in binary.items()} | {"nDCG": "nDCG"}
    for (ours, theirs), k in itertools.product(same.items(), CUTOFFS):
        seen = 0
        for metric in ir_measures.iter_calc([ir_measures.parse_measure(f"{theirs}@{k}")], judged, scored):
            q, value = int(metric.query_id), metric.value
            if ours == "Recall":  # theirs is divided by all relevant passages
                value *= n_relevant[q] / max(min(n_relevant[q], k), 1)
            assert found[ours, k][q] == pytest.approx(value, abs=1e-9), (ours, k)
            seen += 1
        assert seen == 1000


def test_ndcg_and_map_by_their_formulas():
    """Independent of the library: graded, linear gain, log2 discount."""
    _, run, qrels = random_benchmark(200, seed=3, top_grade=3)
    found = metrics.values(ranking(run, qrels), [10])
    for q in range(200):
        gains = [qrels[q].get(d, 0) for d in run[q][:10]]
        best = sorted(qrels[q].values(), reverse=True)[:10]
        ndcg, ideal = (sum(g / math.log2(i + 2) for i, g in enumerate(x)) for x in (gains, best))
        assert found["nDCG", 10][q] == pytest.approx(ndcg / ideal, abs=1e-12)
        hits = [i for i, g in enumerate(gains) if g > 0]
        precisions = [(n + 1) / (i + 1) for n, i in enumerate(hits)]
        n_relevant = sum(g > 0 for g in qrels[q].values())
        assert found["MAP", 10][q] == pytest.approx(sum(precisions) / n_relevant, abs=1e-12)
        assert found["P", 10][q] == pytest.approx(len(hits) / 10, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 20), unique=True, max_size=12), max_size=8),
    st.dictionaries(
        st.integers(0, 9), st.dictionaries(st.integers(0, 20), st.integers(0, 2), min_size=1), min_size=1, max_size=8
    ),
)
def test_properties(run, qrels):
    aligned = ranking(run, qrels)
    found = metrics.values(aligned, [1, 5, 20])
    assert aligned.judgments.query_ids.tolist() == sorted(qrels)  # a row for every judged query, and for no other
    for (measure, k), column in found.items():
        assert ((column >= 0) & (column <= 1 + 1e-12)).all(), (measure, k)
    for measure in ("MRR", "Hit"):
        assert (found[measure, 1] <= found[measure, 5]).all() and (found[measure, 5] <= found[measure, 20]).all()
    for row, q in enumerate(sorted(qrels)):
        relevant = {d for d, grade in qrels[q].items() if grade}
        if not relevant & set(run.get(q, [])):
            assert all(column[row] == 0 for column in found.values())
        if relevant and run.get(q, [])[: len(relevant)] and set(run[q][: len(relevant)]) == relevant:
            assert found["Recall", 20][row] == found["MRR", 1][row] == 1


def test_a_pair_judged_twice_counts_once_with_the_higher_grade():
    judgments = metrics.judge(np.array([3, 3, 3]), np.array([8, 8, 9]), np.array([0, 2, 1], np.int8))
    assert judgments.text_ids.tolist() == [8, 9]
    assert judgments.grades.tolist() == [2, 1]
    assert judgments.n_relevant.tolist() == [2]


def test_ids_of_any_size_do_not_collide():
    big = 3_000_000_000
    aligned = ranking({big: [big, 1], 2: [1]}, {big: {1: 1}, 2: {big: 1}})
    assert aligned.grades.tolist() == [[0, 0], [0, 1]]  # rows by rising query id


def test_chunks_do_not_change_the_values(monkeypatch):
    _, run, qrels = random_benchmark(50, seed=4)
    whole = metrics.values(ranking(run, qrels), [10])
    monkeypatch.setattr(metrics, "CHUNK", 7)
    pieces = metrics.values(ranking(run, qrels), [10])
    assert all(np.array_equal(whole[key], pieces[key]) for key in whole)


# ---- intervals and tests ------------------------------------------------------------------------


def test_bootstrap_interval_of_three_values_by_enumeration():
    """27 equally likely resamples of [0, 0, 1]: the mean is 0 with 8/27, 1/3 with 12/27, 2/3 with 6/27, 1 with 1/27."""
    values = np.array([[0.0], [0.0], [1.0]])
    low, high = bootstrap_interval(values, seed=5)
    assert (low[0], high[0]) == (0.0, 1.0)  # 1/27 > 2.5%
    low, high = bootstrap_interval(values, seed=5, confidence=0.9)
    assert (low[0], high[0]) == (0.0, pytest.approx(2 / 3))  # 1/27 < 5%


def test_bootstrap_interval_equals_scipys():
    from scipy import stats

    values = np.random.default_rng(0).beta(0.5, 1, size=(120, 3))
    low, high = bootstrap_interval(values, seed=1)
    for m in range(3):
        reference = stats.bootstrap((values[:, m],), np.mean, n_resamples=20_000, method="percentile", rng=2)
        spread = reference.confidence_interval.high - reference.confidence_interval.low
        assert low[m] == pytest.approx(reference.confidence_interval.low, abs=0.03 * spread)
        assert high[m] == pytest.approx(reference.confidence_interval.high, abs=0.03 * spread)


def test_bootstrap_intervals_cover_the_true_mean():
    rng = np.random.default_rng(3)
    low, high = bootstrap_interval(rng.random((80, 300)), seed=0)  # 300 samples of 80 from a mean of 0.5
    assert 0.90 <= ((low <= 0.5) & (high >= 0.5)).mean() <= 0.99


def test_randomisation_test_of_few_queries_is_exact():
    from scipy import stats

    differences = np.round(np.random.default_rng(1).normal(0.3, 1, size=(8, 4)), 1)  # ties among the sums
    found = randomisation_test(differences, seed=0)
    for m in range(4):
        d = differences[:, m]
        sums = [abs(float(np.dot(signs, d))) for signs in itertools.product((1, -1), repeat=8)]
        assert found[m] == np.mean(np.array(sums) >= abs(d.sum()) - 1e-9)
        reference = stats.permutation_test(
            (d,), np.mean, permutation_type="samples", vectorized=False, n_resamples=np.inf
        )
        assert found[m] == pytest.approx(reference.pvalue)


def test_randomisation_test_of_many_queries_equals_the_normal_limit():
    from scipy import stats

    differences = np.random.default_rng(2).normal(0.05, 1, size=(900, 3))
    z = np.abs(differences.sum(0)) / np.sqrt((differences**2).sum(0))
    assert randomisation_test(differences, seed=0) == pytest.approx(2 * stats.norm.sf(z), abs=0.015)


def test_randomisation_test_at_its_ends():
    assert randomisation_test(np.zeros((200, 1)), seed=0).tolist() == [1.0]
    assert randomisation_test(np.ones((200, 1)), seed=0).tolist() == [1 / 10_001]
    assert randomisation_test(np.ones((3, 1)), seed=0).tolist() == [2 / 8]


def test_same_seed_same_numbers_another_seed_others():
    values = np.random.default_rng(0).random((50, 2))
    assert np.array_equal(bootstrap_interval(values, 1), bootstrap_interval(values, 1))
    assert not np.array_equal(bootstrap_interval(values, 1), bootstrap_interval(values, 2))
    assert np.array_equal(randomisation_test(values - 0.5, 1), randomisation_test(values - 0.5, 1))
    assert not np.array_equal(randomisation_test(values - 0.5, 1), randomisation_test(values - 0.5, 2))
