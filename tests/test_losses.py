"""Losses and the recipe, against hand-made numbers and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retune.objective.losses import info_nce, kl_div, listwise
from retune.objective.recipe import Candidates, Recipe
from retune.objective.scores import group_columns, group_scores, known_positives, score_matrix

NONE = torch.zeros(0, dtype=torch.long)


def test_info_nce_by_hand():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert info_nce(scores, torch.tensor([0, 1])).item() == pytest.approx(math.log(1 + math.exp(-1)))  # 0.31326
    assert info_nce(scores, torch.tensor([0, 1]), 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))  # 0.12693
    assert info_nce(scores, torch.tensor([1, 0])).item() == pytest.approx(math.log(1 + math.exp(1)))  # 1.31326


def test_excluded_columns_count_for_nothing_and_the_target_stays():
    scores = torch.tensor([[1.0, 3.0, 0.0]])
    excluded = torch.tensor([[True, True, False]])
    assert info_nce(scores, torch.tensor([0]), 1.0, excluded).item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_all_others_excluded_is_zero_and_not_nan():
    scores = torch.tensor([[1.0, 3.0]], requires_grad=True)
    loss = info_nce(scores, torch.tensor([0]), 1.0, torch.tensor([[False, True]]))
    loss.backward()
    assert loss.item() == 0 and torch.equal(scores.grad, torch.zeros(1, 2))


def test_kl_div_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, -1.0]])
    assert kl_div(student, teacher).item() == pytest.approx(math.log(2))  # a uniform student, whatever the teacher
    wanted = 1 / (1 + math.exp(-2))  # the teacher's share of the first: 0.880797
    first = 1 / (1 + math.exp(-(1.0 - 0.5) / 0.5))  # the student's: 0.731059
    expected = -(wanted * math.log(first) + (1 - wanted) * math.log(1 - first))
    assert kl_div(torch.tensor([[1.0, 0.5]]), torch.tensor([[2.0, 0.0]]), 0.5).item() == pytest.approx(expected)


def test_kl_div_has_the_gradient_of_the_kl_divergence():
    torch.manual_seed(0)
    student, teacher = (
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 4, dtype=torch.float64),
    )
    kl_div(student, teacher, 0.1).backward()
    expected = ((student / 0.1).softmax(-1) - teacher.softmax(-1)) / 0.1 / 3
    torch.testing.assert_close(student.grad, expected.detach())


def test_listwise_wants_the_first():
    assert listwise(torch.tensor([[2.0, 0.0]])).item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_scores_are_query_major():
    queries, passages = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 1], [0, 1], [5, 0], [0, 7]])
    assert score_matrix(queries, passages).tolist() == [[3, 0, 5, 0], [2, 2, 0, 14]]
    assert group_scores(queries, passages).tolist() == [[3, 0], [0, 14]]
    assert group_columns(2, 2, 4).tolist() == [[4, 5], [6, 7]]


def test_known_positives_by_hand():
    found = known_positives(torch.tensor([7, 3, 7, 9]), torch.tensor([0, 1, 1]), torch.tensor([7, 9, 100]), 2)
    assert found.tolist() == [[True, False, True, False], [False, False, False, True]]
    assert not known_positives(torch.tensor([7, 3]), NONE, NONE, 2).any()


@st.composite
def batches(draw):
    n_queries, group, dim = draw(st.integers(1, 4)), draw(st.integers(1, 3)), 3
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    ids = rng.integers(0, 5, n_queries * group)
    known = [set(rng.choice(5, 2).tolist()) | {int(ids[q * group])} for q in range(n_queries)]
    return {
        "queries": rng.normal(size=(n_queries, dim)), "passages": rng.normal(size=(n_queries * group, dim)), "ids": ids,
        "known": known, "in_batch": rng.random(n_queries) < 0.7, "teacher": rng.normal(size=(n_queries, group)),
    }  # fmt: skip


def plain(batch: dict, temperature: float, scope: str, mask: bool, distil: bool) -> float:
    """The recipe in loops."""
    n = len(batch["queries"])
    group = len(batch["passages"]) // n
    total = 0.0
    for q in range(n):
        own = range(q * group, (q + 1) * group)
        terms = {}
        for p in range(n * group):
            others = scope == "batch" and batch["in_batch"][q] and not (mask and batch["ids"][p] in batch["known"][q])
            if p in own or others:
                terms[p] = math.exp(float(batch["queries"][q] @ batch["passages"][p]) / temperature)
        total -= math.log(terms[q * group] / sum(terms.values()))
        if distil:
            mine = [terms[p] for p in own]
            teacher = [math.exp(score) for score in batch["teacher"][q]]
            total -= sum(t / sum(teacher) * math.log(m / sum(mine)) for t, m in zip(teacher, mine, strict=True))
    return total / n


@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from(["batch", "group"]), st.booleans(), st.booleans())
def test_recipe_equals_loops(batch, scope, mask, distil):
    rows = [(q, id) for q, known in enumerate(batch["known"]) for id in sorted(known)]
    candidates = Candidates(
        torch.from_numpy(batch["ids"]), torch.tensor([q for q, _ in rows]), torch.tensor([id for _, id in rows]),
        torch.from_numpy(batch["in_batch"]), torch.from_numpy(batch["teacher"]),
    )  # fmt: skip
    recipe = Recipe(scope, 0.7, "kl_div" if distil else None, mask)
    loss = recipe(torch.from_numpy(batch["queries"]), torch.from_numpy(batch["passages"]), candidates)
    assert loss.item() == pytest.approx(plain(batch, 0.7, scope, mask, distil), rel=1e-9)
