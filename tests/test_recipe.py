"""The whole objective of an embedder, with every option, against loops in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import by_loops

from retune.objective.losses import DISTILLATION
from retune.objective.recipe import TO_PASSAGE, TO_QUERY, Candidates, Recipe

BOTH = (TO_PASSAGE, TO_QUERY)


@st.composite
def batches(draw):
    """Few ids, so that passages are often each other's; groups of which some are filled up."""
    n, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    ids, passages = rng.integers(0, 6, (n, size)), rng.normal(size=(n, size, 4))
    sizes = rng.integers(1, size + 1, n) if draw(st.booleans()) else np.full(n, size)
    for row, count in enumerate(sizes):  # filled up with the last one
        ids[row, count:], passages[row, count:] = ids[row, count - 1], passages[row, count - 1]
    return {
        "queries": rng.normal(size=(n, 4)), "passages": passages.reshape(-1, 4), "ids": ids.ravel(), "sizes": sizes,
        "known": [set(rng.choice(6, 2).tolist()) | {int(ids[row, 0])} for row in range(n)],
        "in_batch": rng.random(n) < 0.7, "teacher": rng.normal(size=(n, size)),
    }  # fmt: skip


RECIPES = st.builds(
    Recipe,
    scope=st.just("batch"),
    temperature=st.sampled_from([1.0, 0.5]),
    distillation=st.sampled_from([None, *DISTILLATION]),
    mask_false_negatives=st.booleans(),
    false_negative_margin=st.sampled_from([None, 0.3, -0.5]),
    directions=st.sampled_from([BOTH[:1], BOTH[1:], BOTH]),
    dims=st.sampled_from([(), (2,), (4, 1, 3)]),
    normalize=st.booleans(),
    info_nce_weight=st.sampled_from([None, 0.0, 0.4]),
)


def given_to(batch: dict) -> tuple:
    rows = [(row, id) for row, known in enumerate(batch["known"]) for id in sorted(known)]
    size = len(batch["passages"]) // len(batch["queries"])
    candidates = Candidates(
        torch.from_numpy(batch["ids"]), torch.tensor([row for row, _ in rows]), torch.tensor([id for _, id in rows]),
        torch.from_numpy(batch["in_batch"]), torch.from_numpy(batch["teacher"]),
        torch.from_numpy(np.arange(size) < batch["sizes"][:, None]),
    )  # fmt: skip
    return torch.from_numpy(batch["queries"]), torch.from_numpy(batch["passages"]), candidates


class Plain:
    """The objective in loops, at a number of dimensions."""

    def __init__(self, batch: dict, recipe: Recipe, dim: int) -> None:
        self.batch, self.recipe = batch, recipe
        self.n, self.size = len(batch["queries"]), len(batch["passages"]) // len(batch["queries"])
        cut = [batch[name][:, :dim] for name in ("queries", "passages")]
        if recipe.normalize and dim < 4:
            cut = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in cut]
        self.scores = cut[0] @ cut[1].T

    def too_near(self, query: int, passage: int, own: float) -> bool:
        margin = self.recipe.false_negative_margin
        return margin is not None and self.scores[query, passage] > own - margin

    def counts(self, query: int, passage: int) -> bool:
        """Whether a passage is in the denominator of a query."""
        batch, group, place = self.batch, *divmod(passage, self.size)
        if place >= batch["sizes"][group]:
            return False
        if group == query:
            return True
        held = batch["known"][query] | set(batch["ids"][query * self.size : (query + 1) * self.size].tolist())
        if self.recipe.scope == "group" or not batch["in_batch"][query]:
            return False
        if self.recipe.mask_false_negatives and batch["ids"][passage] in held:
            return False
        return not self.too_near(query, passage, self.scores[query, query * self.size])

    def counts_back(self, passage: int, query: int) -> bool:
        """Whether a query is in the denominator of the positive of query `passage`."""
        batch, column = self.batch, passage * self.size
        if query == passage:
            return True
        if not (batch["in_batch"][query] and batch["in_batch"][passage]):
            return False
        if self.recipe.mask_false_negatives and batch["ids"][column] in batch["known"][query]:
            return False
        return not self.too_near(query, column, self.scores[passage, column])

    def info_nce(self) -> float:
        heat, directions = self.recipe.temperature, []
        columns = range(self.n * self.size)
        if TO_PASSAGE in self.recipe.directions:
            there = [[self.scores[q, p] for p in columns if self.counts(q, p)] for q in range(self.n)]
            directions.append(there)
        if TO_QUERY in self.recipe.directions:
            back = [
                [self.scores[q, p * self.size] for q in range(self.n) if self.counts_back(p, q)] for p in range(self.n)
            ]
            directions.append(back)
        positives = [self.scores[q, q * self.size] for q in range(self.n)]
        losses = [
            math.log(sum(math.exp(score / heat) for score in row)) - positive / heat
            for rows in directions
            for row, positive in zip(rows, positives, strict=True)
        ]
        return sum(losses) / len(losses)

    def loss(self) -> float:
        recipe, name = self.recipe, self.recipe.distillation
        if name is None:
            return self.info_nce()
        weight = recipe.info_nce_weight
        weight = {"kl_div": 1, "m3_kd_loss": 0, "margin_mse": 0}[name] if weight is None else weight
        out = np.array([[not self.counts(q, p) for p in range(self.n * self.size)] for q in range(self.n)])
        own = np.arange(self.n * self.size).reshape(self.n, -1)
        distilled = by_loops(name, self.scores, own, self.batch["teacher"], recipe.temperature, out)
        return distilled + (weight * self.info_nce() if weight else 0)


@settings(deadline=None, max_examples=300)
@given(batches(), RECIPES, st.booleans())
def test_recipe_equals_loops(batch, recipe, grouped):
    if grouped:
        recipe = replace(recipe, scope="group", directions=(TO_PASSAGE,))
    parts = [Plain(batch, recipe, dim).loss() for dim in recipe.dims or (4,)]
    assert recipe(*given_to(batch)).item() == pytest.approx(sum(parts) / len(parts), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(batches(), st.booleans(), st.sampled_from([None, 0.3]))
def test_measures_equal_loops(batch, mask, margin):
    recipe = Recipe("batch", 0.5, None, mask, margin)
    plain, found = Plain(batch, recipe, 4), recipe.measures(*given_to(batch))
    positives = [plain.scores[q, q * plain.size] for q in range(plain.n)]
    negatives = [
        [plain.scores[q, p] for p in range(plain.n * plain.size) if p != q * plain.size and plain.counts(q, p)]
        for q in range(plain.n)
    ]
    flat = [score for row in negatives for score in row]
    right = [positive > max(row, default=-math.inf) for positive, row in zip(positives, negatives, strict=True)]
    assert found["positive_similarity"].item() == pytest.approx(np.mean(positives))
    assert found["accuracy"].item() == pytest.approx(np.mean(right))
    assert found["negative_similarity"].item() == pytest.approx(np.mean(flat) if flat else math.nan, nan_ok=True)


def hand_made() -> tuple[torch.Tensor, torch.Tensor, Candidates]:
    """Two queries with groups of two.  Query 0's negative, id 5, is also a positive of query 1."""
    queries = torch.eye(2, dtype=torch.float64)
    passages = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.4, 0.8], [0.7, 0.5]], dtype=torch.float64)
    known = torch.tensor([0, 1, 1]), torch.tensor([1, 3, 5])
    return queries, passages, Candidates(torch.tensor([1, 5, 3, 4]), *known, torch.ones(2, dtype=torch.bool))


def lse(*values: float) -> float:
    return math.log(sum(map(math.exp, values)))


def test_a_positive_of_the_query_is_masked_by_hand():
    there = (lse(0.9, 0.2, 0.4, 0.7) - 0.9 + lse(0.8, 0.5, 0.1) - 0.8) / 2  # query 1 does not see 0.3, its positive
    assert Recipe("batch", 1.0)(*hand_made()).item() == pytest.approx(there)
    unmasked = (lse(0.9, 0.2, 0.4, 0.7) - 0.9 + lse(0.8, 0.5, 0.1, 0.3) - 0.8) / 2
    assert Recipe("batch", 1.0, None, False)(*hand_made()).item() == pytest.approx(unmasked)


def test_both_directions_by_hand():
    there = (lse(0.9, 0.2, 0.4, 0.7) - 0.9 + lse(0.8, 0.5, 0.1) - 0.8) / 2
    back = (lse(0.9, 0.1) - 0.9 + lse(0.8, 0.4) - 0.8) / 2
    assert Recipe("batch", 1.0, directions=BOTH[1:])(*hand_made()).item() == pytest.approx(back)
    assert Recipe("batch", 1.0, directions=BOTH)(*hand_made()).item() == pytest.approx((there + back) / 2)


def test_another_query_of_the_positive_is_masked_on_the_way_back():
    queries, passages, known = hand_made()
    known = replace(known, positive_rows=torch.tensor([0, 1, 0]), positive_ids=torch.tensor([1, 3, 3]))
    back = (lse(0.9, 0.1) - 0.9) / 2  # passage 3 is a positive of query 0 too: it has no query against it
    found = Recipe("batch", 1.0, directions=BOTH[1:])(queries, passages, known)
    assert found.item() == pytest.approx(back)


def test_a_duplicate_of_the_own_groups_passage_is_masked():
    """Passage 5 of query 0's group stands in query 1's too; for query 0 it counts once."""
    queries, passages, known = hand_made()
    ids, passages = torch.tensor([1, 5, 3, 5]), passages.clone()
    passages[3] = passages[1]
    known = replace(known, passage_ids=ids, positive_rows=torch.tensor([0, 1]), positive_ids=torch.tensor([1, 3]))
    there = (lse(0.9, 0.2, 0.4) - 0.9 + lse(0.8, 0.3, 0.1) - 0.8) / 2
    assert Recipe("batch", 1.0)(queries, passages, known).item() == pytest.approx(there)


def test_the_margin_masks_other_groups_alone():
    recipe = Recipe("batch", 1.0, false_negative_margin=0.3)
    there = (lse(0.9, 0.2, 0.4) - 0.9 + lse(0.8, 0.5, 0.1) - 0.8) / 2  # 0.7 > 0.9 - 0.3, 0.5 is query 1's own
    assert recipe(*hand_made()).item() == pytest.approx(there)


@pytest.mark.parametrize("name", DISTILLATION)
def test_a_teacher_that_is_not_asked_about_the_batch_has_no_gradient_there(name):
    """margin_mse alone moves nothing across groups; the others do."""
    queries, passages, known = hand_made()
    known = replace(known, teacher=torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64))
    queries = queries.clone().requires_grad_()
    Recipe("batch", 1.0, name)(queries, passages, known).backward()
    wanted = torch.stack([passages[0] - passages[1], passages[2] - passages[3]])
    error = (queries.detach() * wanted).sum(1) - torch.tensor([2.0, 0.0])
    alone = torch.allclose(queries.grad, wanted * error[:, None])
    assert alone == (name == "margin_mse")


def test_matryoshka_is_the_mean_over_truncated_models():
    torch.manual_seed(0)
    queries, passages = (torch.nn.functional.normalize(torch.randn(n, 8, dtype=torch.float64)) for n in (3, 6))
    ids = torch.arange(6)
    known = Candidates(ids, torch.arange(3), ids[::2], torch.ones(3, dtype=torch.bool))
    whole = Recipe("batch", 0.1)
    parts = [
        whole(*(torch.nn.functional.normalize(vectors[:, :dim]) for vectors in (queries, passages)), known)
        for dim in (8, 4, 2)
    ]
    found = Recipe("batch", 0.1, dims=(8, 4, 2))(queries, passages, known)
    torch.testing.assert_close(found, torch.stack(parts).mean())


def test_the_same_numbers_as_sentence_transformers():
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss, MultipleNegativesRankingLoss

    torch.manual_seed(3)
    queries, passages = (torch.nn.functional.normalize(torch.randn(n, 8, dtype=torch.float64)) for n in (4, 12))
    teacher, ids = torch.randn(4, 3, dtype=torch.float64), torch.arange(12)
    known = Candidates(ids, torch.arange(4), ids[::3], torch.ones(4, dtype=torch.bool), teacher)
    columns, model = [queries, *(passages[i::3] for i in range(3))], torch.nn.Module()
    both = MultipleNegativesRankingLoss(
        model, scale=20, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    found = Recipe("batch", 0.05, directions=BOTH)(queries, passages, known)
    torch.testing.assert_close(found, both.compute_loss_from_embeddings(columns, None))
    found = Recipe("batch", 1.0, "margin_mse")(queries, passages, known)
    torch.testing.assert_close(found, MarginMSELoss(model).compute_loss_from_embeddings(columns, teacher))


def test_within_a_group_there_is_no_way_back():
    with pytest.raises(ValueError, match="no query but its own"):
        Recipe("group", directions=BOTH)
