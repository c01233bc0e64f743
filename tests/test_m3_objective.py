"""M3's scorers and objective: by hand, against plain loops in float64, and in two processes."""

from __future__ import annotations

import itertools
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from retune.model.heads import Heads
from retune.objective import heads
from retune.objective.m3 import ENSEMBLE, Unified
from retune.objective.recipe import Candidates, Recipe
from retune.objective.representations import joined, select

VOCABULARY, WIDTH, C = 12, 6, 4
IN_ENSEMBLE = {"dense": 1.0, "sparse": 0.3, "colbert": 1.0}
IN_LOSS = {"dense": 1.0, "ensemble": 1.0, "sparse": 0.1, "colbert": 1.0}
UNIFIED = Unified(Recipe("batch", 0.5), IN_ENSEMBLE, IN_LOSS)


def flat(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


class Model(torch.nn.Module):
    """Ids of texts → texts by head, in float64: an embedding, and a linear layer for each head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        double = {"dtype": torch.float64}
        self.states = torch.nn.Embedding(VOCABULARY, WIDTH, **double)
        self.weigh, self.turn = torch.nn.Linear(WIDTH, 1, **double), torch.nn.Linear(WIDTH, C, **double)

    def forward(self, texts: list[list[int]]) -> dict[str, torch.Tensor]:
        ids, lengths = torch.tensor(flat(texts)), torch.tensor([len(text) for text in texts])
        states = self.states(ids)
        first = torch.zeros(len(ids), dtype=torch.bool)
        first[lengths.cumsum(0) - lengths] = True
        return {
            "dense": torch.nn.functional.normalize(states[first], dim=-1), "lengths": lengths, "ids": ids,
            "sparse": torch.relu(self.weigh(states)).squeeze(-1),
            "colbert": torch.nn.functional.normalize(self.turn(states[~first]), dim=-1),
        }  # fmt: skip


def some(n: int, seed: int, least: int = 2) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, rng.integers(least, 9)).tolist() for _ in range(n)]


def candidates(n: int, size: int, teacher: torch.Tensor | None = None) -> Candidates:
    ids = torch.arange(n * size)
    return Candidates(ids, torch.arange(n), ids[::size], torch.ones(n, dtype=torch.bool), teacher)


# ---- representations ----------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
@settings(max_examples=50, deadline=None)
def test_select_takes_a_texts_own_tokens(lengths, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    texts = [[10 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    all_of_it = {
        "dense": torch.arange(len(lengths))[:, None], "lengths": torch.tensor(lengths),
        "ids": torch.tensor(flat(texts)), "colbert": torch.tensor(flat(text[1:] for text in texts))[:, None],
    }  # fmt: skip
    found = select(all_of_it, torch.tensor(rows))
    assert found["ids"].tolist() == flat(texts[row] for row in rows)
    assert found["colbert"].flatten().tolist() == flat(texts[row][1:] for row in rows)
    assert found["dense"].flatten().tolist() == rows
    twice = joined([all_of_it, found])
    assert twice["lengths"].tolist() == lengths + [lengths[row] for row in rows]


# ---- scorers ------------------------------------------------------------------------------------


def test_scores_by_hand():
    queries = {
        "dense": torch.tensor([[1.0, 0.0]]), "lengths": torch.tensor([3]), "ids": torch.tensor([0, 7, 8]),
        "sparse": torch.tensor([0.0, 2.0, 1.0]), "colbert": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    }  # fmt: skip
    passages = {
        "dense": torch.tensor([[0.5, 9.0], [-1.0, 0.0]]), "lengths": torch.tensor([4, 2]),
        "ids": torch.tensor([0, 7, 7, 9, 0, 8]), "sparse": torch.tensor([0.0, 0.5, 3.0, 9.0, 0.0, 4.0]),
        "colbert": torch.tensor([[0.6, 0.8], [-1.0, 0.0], [0.0, -1.0], [-0.5, -0.25]]),
    }  # fmt: skip
    assert heads.dense(queries, passages).tolist() == [[0.5, -1.0]]
    assert heads.sparse(queries, passages).tolist() == [[6.0, 4.0]]  # 2 × max(.5, 3); 1 × 4
    torch.testing.assert_close(heads.colbert(queries, passages), torch.tensor([[(0.6 + 0.8) / 2, -0.375]]))


def materialised(model: Model, special: list[int], texts: list[list[int]]) -> torch.Tensor:
    """The vocabulary's weights of each text by the form that FlagEmbedding trains: [n, length, vocabulary] at once."""
    rows = []
    for text in texts:
        ids = torch.tensor(text)
        weights = torch.relu(model.weigh(model.states(ids)))  # [L, 1]
        table = torch.zeros(len(text), VOCABULARY, dtype=torch.float64).scatter(1, ids[:, None], weights)
        table = table.max(0).values
        keep = torch.ones(VOCABULARY, dtype=torch.float64)
        keep[special] = 0
        rows.append(table * keep)
    return torch.stack(rows)


def test_sparse_equals_the_materialised_form_and_so_does_its_gradient():
    queries, passages, special = some(4, 1), some(9, 2), [0, 3]
    upstream = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = Model()
    expected = materialised(plain, special, queries) @ materialised(plain, special, passages).T
    (expected * upstream).sum().backward()
    ours = Model()
    left, right = ours(queries), ours(passages)
    for texts in (left, right):
        texts["sparse"] = texts["sparse"] * ~torch.isin(texts["ids"], torch.tensor(special))
    found = heads.sparse(left, right)
    (found * upstream).sum().backward()
    torch.testing.assert_close(found, expected)
    assert found.count_nonzero() > 10
    for name, weight in ours.named_parameters():
        other = dict(plain.named_parameters())[name].grad
        assert (weight.grad is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(weight.grad, other)


def test_the_model_zeroes_special_tokens():
    head = Heads(WIDTH, C, torch.tensor([1, 5]))
    states = torch.randn(6, WIDTH)
    found = head.sparse(states, torch.tensor([1, 5, 2, 2, 7, 1]))
    expected = torch.relu(head.sparse_linear(states)).squeeze(-1)
    assert found[[0, 1, 5]].tolist() == [0, 0, 0]
    torch.testing.assert_close(found[2:5], expected[2:5])


@pytest.mark.parametrize("block", [1, 50, 1 << 24])
def test_colbert_equals_plain_loops_and_so_does_its_gradient(monkeypatch, block):
    monkeypatch.setattr(heads, "BLOCK", block)
    model = Model()
    queries, passages = some(4, 3), [*some(7, 4), [2]]  # the last has no token but its first
    left, right = model(queries), model(passages)
    found = heads.colbert(left, right)

    def vectors(text):
        return torch.nn.functional.normalize(model.turn(model.states(torch.tensor(text[1:], dtype=torch.long))), dim=-1)

    nothing = torch.zeros((), dtype=torch.float64)

    def score(q, p):
        return (vectors(q) @ vectors(p).T).max(1).values.mean() if len(p) > 1 else nothing

    expected = torch.stack([torch.stack([score(q, p) for p in passages]) for q in queries])
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one = torch.autograd.grad((found * upstream).sum(), model.turn.weight, retain_graph=True)[0]
    torch.testing.assert_close(one, torch.autograd.grad((expected * upstream).sum(), model.turn.weight)[0])


# ---- the objective ------------------------------------------------------------------------------


def by_numpy(scores: dict[str, np.ndarray], size: int, temperature: float, teacher=None, distil: bool = False) -> float:
    """The loss from [Q, P] matrices, in float64, written out from the formulas."""

    def log_softmax(x):
        return x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))

    scores = scores | {ENSEMBLE: scores["dense"] + 0.3 * scores["sparse"] + scores["colbert"]}
    rows = np.arange(len(scores["dense"]))
    losses = {}
    for name, each in scores.items():
        losses[name] = -log_softmax(each / temperature)[rows, rows * size].mean()
        if teacher is not None:
            own = np.stack([each[row, row * size : (row + 1) * size] for row in rows])
            losses[name] -= (np.exp(log_softmax(teacher)) * log_softmax(own / temperature)).sum(1).mean()
    total = (losses["dense"] + losses[ENSEMBLE] + 0.1 * losses["sparse"] + losses["colbert"]) / 4
    if not distil:
        return total
    wanted = np.exp(log_softmax(scores[ENSEMBLE] / temperature))
    learnt = {name: -(wanted * log_softmax(scores[name] / temperature)).sum(1).mean() for name in IN_ENSEMBLE}
    return (total + (learnt["dense"] + 0.1 * learnt["sparse"] + learnt["colbert"]) / 3) / 2


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("taught", [False, True])
def test_the_loss_equals_the_formulas(distil, taught):
    model = Model()
    queries, passages = model(some(3, 5)), model(some(9, 6))
    teacher = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) if taught else None
    recipe = Recipe("batch", 0.5, "kl_div" if taught else None)
    ours = replace(UNIFIED, recipe=recipe, self_distillation=4 if distil else None)
    scores = {name: scorer(queries, passages).detach().numpy() for name, scorer in heads.SCORERS.items()}
    given_teacher = None if teacher is None else teacher.numpy()
    expected = by_numpy(scores, 3, 0.5, given_teacher, distil)
    assert ours(queries, passages, candidates(3, 3, teacher), 5).item() == pytest.approx(expected, rel=1e-12)
    before = by_numpy(scores, 3, 0.5, given_teacher)
    assert ours(queries, passages, candidates(3, 3, teacher), 4).item() == pytest.approx(before, rel=1e-12)


def test_the_loss_by_hand():
    """One query, its positive and a negative; at temperature 1 a loss is log(1 + exp(negative - positive))."""
    tokens = {"lengths": torch.tensor([2]), "ids": torch.tensor([0, 7]), "sparse": torch.tensor([0.0, 1.0])}
    queries = tokens | {"dense": torch.tensor([[1.0]]), "colbert": torch.tensor([[1.0]])}
    passages = {
        "dense": torch.tensor([[2.0], [1.0]]), "lengths": torch.tensor([2, 2]), "ids": torch.tensor([0, 7, 0, 7]),
        "sparse": torch.tensor([0.0, 3.0, 0.0, 1.0]), "colbert": torch.tensor([[0.5], [0.0]]),
    }  # fmt: skip
    # margins: dense 1, sparse 2, colbert 0.5, ensemble 1 + 0.6 + 0.5
    expected = (np.log1p(np.exp(-1)) + np.log1p(np.exp(-2.1)) + 0.1 * np.log1p(np.exp(-2)) + np.log1p(np.exp(-0.5))) / 4
    ours = replace(UNIFIED, recipe=Recipe("group", 1.0))
    assert ours(queries, passages, candidates(1, 2)).item() == pytest.approx(expected, rel=1e-6)


def test_the_ensemble_is_no_target_of_its_own():
    """Self-distillation moves the heads towards the ensemble, and no gradient goes into what they learn from."""
    model = Model()
    queries, passages = model(some(3, 5)), model(some(9, 6))
    on, off = replace(UNIFIED, self_distillation=-1), UNIFIED
    first = torch.autograd.grad(on(queries, passages, candidates(3, 3)), model.turn.weight, retain_graph=True)[0]
    scores = {name: scorer(queries, passages) for name, scorer in heads.SCORERS.items()}
    wanted = torch.softmax((scores["dense"] + 0.3 * scores["sparse"] + scores["colbert"]).detach() / 0.5, 1)
    learnt = -(wanted * torch.log_softmax(scores["colbert"] / 0.5, 1)).sum(1).mean()
    loss = (off(queries, passages, candidates(3, 3)) + learnt / 3) / 2
    torch.testing.assert_close(first, torch.autograd.grad(loss, model.turn.weight)[0])


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_what_counts_is_the_same_for_all_heads(scope):
    """A passage that is masked, or of another group within the scope of a group, has no say in any head."""
    model = Model()
    queries, texts = model(some(2, 7)), some(4, 8)
    ours = replace(UNIFIED, recipe=Recipe(scope, 0.5), self_distillation=-1)
    known = candidates(2, 2)
    if scope == "batch":  # of the other group, both passages are positives of the first query, and its own opted out
        in_batch = torch.tensor([True, False])
        known = Candidates(known.passage_ids, torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2, 3, 2]), in_batch)
    before = ours(queries, model(texts), known)
    alone = [
        ours(
            select(queries, torch.tensor([i])), select(model(texts), torch.tensor([2 * i, 2 * i + 1])), candidates(1, 2)
        )
        for i in range(2)
    ]
    torch.testing.assert_close(before, torch.stack(alone).mean())


# ---- two processes ------------------------------------------------------------------------------

CASES = {
    (scope, distil): Unified(Recipe(scope, 0.5), IN_ENSEMBLE, IN_LOSS, -1 if distil else None)
    for scope in ("batch", "world", "group")
    for distil in (False, True)
}
QUERIES, PASSAGES = some(4, 11), some(12, 12)  # of both; texts differ in length


def gradient(objective: Unified, queries: list, passages: list) -> tuple[float, list[torch.Tensor]]:
    model = Model()
    loss = objective(model(queries), model(passages), candidates(len(queries), 3))
    loss.backward()
    return loss.item(), [weight.grad for weight in model.parameters()]


def process(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    found = {}
    for case, objective in CASES.items():
        known = candidates(2, 3)
        if case[0] == "world":  # ids of their own
            known = replace(known, passage_ids=known.passage_ids + 6 * rank, positive_ids=known.positive_ids + 6 * rank)
        model = Model()
        loss = objective(model(QUERIES[2 * rank : 2 * rank + 2]), model(PASSAGES[6 * rank : 6 * rank + 6]), known)
        loss.backward()
        gradients = [weight.grad for weight in model.parameters()]
        for value in (*gradients, value_of := loss.detach().clone()):
            dist.all_reduce(value)
        found[case] = (value_of.item() / 2, [value / 2 for value in gradients])
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    mp.start_processes(process, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    found = torch.load(tmp_path / "found.pt")
    for case, objective in CASES.items():
        plain = replace(objective, recipe=replace(objective.recipe, scope=case[0].replace("world", "batch")))
        if case[0] == "batch":  # each process by itself
            parts = [gradient(plain, QUERIES[2 * i : 2 * i + 2], PASSAGES[6 * i : 6 * i + 6]) for i in range(2)]
            expected = (
                sum(p[0] for p in parts) / 2,
                [(a + b) / 2 for a, b in zip(parts[0][1], parts[1][1], strict=True)],
            )
        else:
            expected = gradient(plain, QUERIES, PASSAGES)
        assert found[case][0] == pytest.approx(expected[0], rel=1e-9), case
        for one, other in zip(found[case][1], expected[1], strict=True):
            torch.testing.assert_close(one, other, msg=str(case))
