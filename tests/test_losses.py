"""Losses, scores and masks: hand-made numbers, and the same by loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retune.objective.losses import DISTILLATION, info_nce, kl_div, listwise, m3_kd_loss, margin_mse
from retune.objective.masks import above_margin, columns_holding, outside
from retune.objective.scores import first_dims, group_columns, group_scores, score_matrix

NONE = torch.zeros(0, dtype=torch.long)
LN2 = math.log(2)


# ---- by hand ------------------------------------------------------------------------------------


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


def test_listwise_wants_the_first():
    assert listwise(torch.tensor([[2.0, 0.0]])).item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_kl_div_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, -1.0]])
    assert kl_div(student, teacher).item() == pytest.approx(LN2)  # a uniform student, whatever the teacher
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


def test_margin_mse_by_hand():
    student, teacher = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.2, 0.4]]), torch.tensor([[7.0, 4.0, 1.0], [1.0, 1, 1]])
    # margins 0.4, 0.8 against 3, 6, and 0, -0.2 against 0, 0
    assert margin_mse(student, teacher).item() == pytest.approx((2.6**2 + 5.2**2 + 0 + 0.04) / 4)
    # over 0.1: margins 4, 8 and 0, -2
    assert margin_mse(student, teacher, 0.1).item() == pytest.approx((1 + 4 + 0 + 4) / 4)
    excluded = torch.tensor([[False, False, True], [False, False, False]])
    assert margin_mse(student, teacher, 0.1, excluded).item() == pytest.approx((1 + (0 + 4) / 2) / 2)


def test_m3_kd_loss_by_hand():
    """Two queries with groups of two, all scores equal: each turn is a choice among those that are left."""
    scores, own = torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]])
    teacher = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])  # shares 1/2, 1/2 and 3/4, 1/4
    first, second = math.log(4), math.log(3)  # the second has one column less
    expected = ((first + second) / 2 + (3 * first + second) / 4) / 2
    assert m3_kd_loss(scores, own, teacher).item() == pytest.approx(expected)
    alone = m3_kd_loss(
        scores, own, teacher, 1.0, torch.tensor([[False, False, True, True], [True, True, False, False]])
    )
    assert alone.item() == pytest.approx((LN2 / 2 + 3 * LN2 / 4) / 2)  # within the group the last has no rival


def test_m3_kd_loss_of_a_sure_teacher_is_info_nce():
    torch.manual_seed(1)
    scores, own = torch.randn(3, 6, dtype=torch.float64), torch.arange(6).view(3, 2)
    teacher = torch.tensor([[0.0, -1e4]] * 3, dtype=torch.float64)
    torch.testing.assert_close(m3_kd_loss(scores, own, teacher, 0.3), info_nce(scores, own[:, 0], 0.3))


def test_incumbents_weights_of_info_nce():
    assert {name: found.info_nce_weight for name, found in DISTILLATION.items()} == {
        "kl_div": 1, "m3_kd_loss": 0, "margin_mse": 0,
    }  # fmt: skip


# ---- by loops -----------------------------------------------------------------------------------


@st.composite
def score_tables(draw):
    n, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = rng.normal(scale=draw(st.sampled_from([1.0, 30.0])), size=(n, n * size))
    own = np.arange(n * size).reshape(n, size)
    excluded = rng.random((n, n * size)) < 0.4
    excluded[np.arange(n), own[:, 0]] = False
    return scores, own, rng.normal(scale=3, size=(n, size)), excluded


def soft(values: list[float]) -> list[float]:
    total = sum(math.exp(value - max(values)) for value in values)
    return [math.exp(value - max(values)) / total for value in values]


def by_loops(name: str, scores, own, teacher, temperature: float, excluded) -> float:
    """A distillation, query after query, from its description."""
    losses = []
    for row, columns in enumerate(own):
        members = [column for column in columns if not excluded[row, column]]
        said = [teacher[row, i] for i, column in enumerate(columns) if column in members]
        logit = {column: scores[row, column] / temperature for column in range(scores.shape[1])}
        if name == "kl_div":
            shares = soft([logit[column] for column in members])
            losses.append(-sum(t * math.log(s) for t, s in zip(soft(said), shares, strict=True)))
        elif name == "margin_mse":
            pairs = list(zip(members, said, strict=True))[1:]
            errors = [(logit[members[0]] - logit[column] - (said[0] - value)) ** 2 for column, value in pairs]
            losses.append(sum(errors) / max(1, len(errors)))
        else:
            left, total = [column for column in logit if not excluded[row, column]], 0.0
            for column, share in zip(members, soft(said), strict=True):
                best = max(logit[other] for other in left)
                rest = best + math.log(sum(math.exp(logit[other] - best) for other in left))
                total += share * (rest - logit[column])
                left.remove(column)
            losses.append(total)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", DISTILLATION)
@settings(deadline=None, max_examples=60)
@given(score_tables(), st.sampled_from([1.0, 0.3]), st.booleans())
def test_distillation_equals_loops(name, table, temperature, with_mask):
    scores, own, teacher, excluded = table
    if name == "kl_div":
        scores = scores / 10  # the loops take logarithms of shares
    tensors = map(torch.from_numpy, (scores, own, teacher))
    loss = DISTILLATION[name].loss(*tensors, temperature, torch.from_numpy(excluded) if with_mask else None)
    wanted = by_loops(name, scores, own, teacher, temperature, excluded if with_mask else np.zeros_like(excluded))
    assert loss.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_m3_kd_loss_has_the_gradient_of_its_description():
    """Cross entropies over a mask that grows, in float32, where groups have members that do not count."""
    torch.manual_seed(2)
    own, teacher, temperature = torch.arange(12).view(4, 3), torch.randn(4, 3), 0.05
    excluded = torch.rand(4, 12) < 0.5
    excluded[:, ::3] = False
    excluded[3] = True  # one has nothing but its positive
    excluded[3, 9] = False
    one, other = (torch.randn(4, 12, generator=torch.Generator().manual_seed(3), requires_grad=True) for _ in range(2))
    m3_kd_loss(one, own, teacher, temperature, excluded).backward()

    total, masked = 0.0, excluded.clone()
    weights = teacher.masked_fill(excluded.gather(1, own), -torch.inf).softmax(1)
    for turn in range(3):
        rows = ~excluded.gather(1, own[:, turn : turn + 1])[:, 0]
        logits = (other / temperature).masked_fill(masked, -torch.inf)[rows]
        losses = torch.nn.functional.cross_entropy(logits, own[rows, turn], reduction="none")
        total = total + (weights[rows, turn] * losses).sum() / 4
        masked = masked.scatter(1, own[:, turn : turn + 1], True)
    total.backward()
    assert torch.isfinite(one.grad).all()
    torch.testing.assert_close(one.grad, other.grad)


# ---- scores and masks ---------------------------------------------------------------------------


def test_scores_are_query_major():
    queries, passages = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 1], [0, 1], [5, 0], [0, 7]])
    assert score_matrix(queries, passages).tolist() == [[3, 0, 5, 0], [2, 2, 0, 14]]
    assert group_scores(queries, passages).tolist() == [[3, 0], [0, 14]]
    assert group_columns(2, 2, 4).tolist() == [[4, 5], [6, 7]]


def test_first_dims_by_hand():
    vectors = torch.tensor([[3.0, 4.0, 12.0]])
    assert first_dims(vectors, 2, False).tolist() == [[3, 4]]
    torch.testing.assert_close(first_dims(vectors, 2, True), torch.tensor([[0.6, 0.8]]))
    assert first_dims(vectors, 3, True) is vectors  # as the model gave them


def test_columns_holding_by_hand():
    found = columns_holding(torch.tensor([7, 3, 7, 9]), torch.tensor([0, 1, 1]), torch.tensor([7, 9, 100]), 2)
    assert found.tolist() == [[True, False, True, False], [False, False, False, True]]
    assert not columns_holding(torch.tensor([7, 3]), NONE, NONE, 2).any()


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=9), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)))
)  # fmt: skip
def test_columns_holding_equals_loops(columns, named):
    rows, ids = torch.tensor([row for row, _ in named]).long(), torch.tensor([id for _, id in named]).long()
    found = columns_holding(torch.tensor(columns), rows, ids, 4)
    assert found.tolist() == [[(row, id) in named for id in columns] for row in range(4)]


def test_above_margin_by_hand():
    scores = torch.tensor([[0.5, 0.41, 0.39, 0.6], [0.9, 0.5, 0.65, 0.2]], requires_grad=True)
    targets = torch.tensor([0, 1])
    found = above_margin(scores, targets, 0.1)
    assert found.tolist() == [[True, True, False, True], [True, True, True, False]] and not found.requires_grad
    assert above_margin(scores, targets, -0.2).tolist() == [[False] * 4, [True, False, False, False]]
    own = torch.tensor([[0, 1], [1, 2]])
    assert outside(found, own).tolist() == [[False, False, False, True], [True, False, False, False]]
    filled = torch.tensor([[False, True], [False, False]])
    assert outside(found, own, filled).tolist() == [[False, True, False, True], [True, False, False, False]]
