"""Two processes against one with both batches: the gradients must be equal, not merely parallel."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from retune.objective.recipe import TO_PASSAGE, TO_QUERY, Candidates, Recipe

OBJECTIVES = {
    "info_nce": Recipe(temperature=0.2),
    "unmasked": Recipe(temperature=0.2, mask_false_negatives=False),
    "margin": Recipe(temperature=0.2, false_negative_margin=0.1),
    "kl_div": Recipe(temperature=0.2, distillation="kl_div"),
    "m3_kd_loss": Recipe(temperature=0.2, distillation="m3_kd_loss"),
    "margin_mse": Recipe(temperature=0.2, distillation="margin_mse"),
    "margin_mse_info_nce": Recipe(temperature=0.2, distillation="margin_mse", info_nce_weight=0.5),
    "back": Recipe(temperature=0.2, directions=(TO_QUERY,)),
    "both": Recipe(temperature=0.2, directions=(TO_PASSAGE, TO_QUERY), false_negative_margin=0.1),
    "matryoshka": Recipe(temperature=0.2, dims=(4, 2)),
    "all": Recipe("batch", 0.2, "m3_kd_loss", True, 0.1, (TO_PASSAGE, TO_QUERY), (4, 3, 1), False, 0.3),
}
CASES = {
    (name, scope): replace(recipe, scope=scope)
    for name, recipe in OBJECTIVES.items()
    for scope in ("group", "batch", "world")
    if scope != "group" or TO_QUERY not in recipe.directions
}
Q, G, DIM = 3, 3, 4  # of one process


def model() -> torch.nn.Linear:
    torch.manual_seed(5)
    return torch.nn.Linear(DIM, DIM, dtype=torch.float64)


def both_batches() -> tuple[torch.Tensor, torch.Tensor, Candidates]:
    """Inputs of both processes, one after the other: queries [2Q, DIM], passages [2Q * G, DIM]."""
    torch.manual_seed(7)
    queries, passages = torch.randn(2 * Q, DIM, dtype=torch.float64), torch.randn(2 * Q * G, DIM, dtype=torch.float64)
    ids = torch.arange(2 * Q * G)
    ids[4 * G] = 0  # the first process's first positive is one of the second process's too
    ids[5 * G + 1] = 1  # the same negative in groups of both
    counted = torch.ones(2 * Q, G, dtype=torch.bool)
    counted[2, 2] = counted[4, 1:] = False
    rows = torch.arange(2 * Q)
    in_batch = torch.ones(2 * Q, dtype=torch.bool)
    in_batch[1] = False
    teacher = torch.randn(2 * Q, G, dtype=torch.float64)
    return queries, passages, Candidates(ids, rows, ids[::G], in_batch, teacher, counted)


def share(rank: int) -> tuple[torch.Tensor, torch.Tensor, Candidates]:
    queries, passages, all_of_it = both_batches()
    q, p = slice(rank * Q, (rank + 1) * Q), slice(rank * Q * G, (rank + 1) * Q * G)
    part = Candidates(
        all_of_it.passage_ids[p], torch.arange(Q), all_of_it.positive_ids[q], all_of_it.in_batch[q],
        all_of_it.teacher[q], all_of_it.counted[q],
    )  # fmt: skip
    return queries[q], passages[p], part


class Both(torch.nn.Module):
    """Encodes queries and passages in one forward, as DistributedDataParallel wants it."""

    def __init__(self, encoder: torch.nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.encoder, self.recipe = encoder, recipe

    def forward(self, queries, passages, candidates):
        return self.recipe(self.encoder(queries), self.encoder(passages), candidates)


def gradient(recipe: Recipe, inputs: tuple) -> tuple[float, torch.Tensor]:
    encoder = model()
    loss = Both(encoder, recipe)(*inputs)
    loss.backward()
    return loss.item(), encoder.weight.grad


def process(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    found = {}
    for case, recipe in CASES.items():
        encoder = model()
        parallel = torch.nn.parallel.DistributedDataParallel(Both(encoder, recipe))  # its hooks go with it
        loss = parallel(*share(rank))
        loss.backward()
        dist.all_reduce(value := loss.detach().clone())
        with torch.no_grad():
            queries, passages, candidates = share(rank)
            measures = recipe.measures(encoder(queries), encoder(passages), candidates)
        found[case] = (value.item() / 2, encoder.weight.grad, measures)
    torch.save(found, Path(folder) / f"{rank}.pt")
    del parallel, loss  # outliving the group it may wait for ever
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gather")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.start_processes(process, (port, str(folder)), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def of(scope: str) -> list[tuple[str, str]]:
    return [case for case in CASES if case[1] == scope]


@pytest.mark.parametrize("case", of("world") + of("group"), ids="-".join)
def test_two_processes_equal_one_with_the_joint_batch(distributed, case):
    recipe = replace(CASES[case], scope="batch" if case[1] == "world" else "group")
    loss, wanted = gradient(recipe, both_batches())
    for found_loss, found, _ in (rank[case] for rank in distributed):
        assert found_loss == pytest.approx(loss, rel=1e-9)
        assert (found.norm() / wanted.norm()).item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("case", of("batch"), ids="-".join)
def test_batch_is_the_mean_of_both(distributed, case):
    parts = [gradient(CASES[case], share(rank)) for rank in (0, 1)]
    wanted = (parts[0][1] + parts[1][1]) / 2
    for found_loss, found, _ in (rank[case] for rank in distributed):
        assert found_loss == pytest.approx(sum(loss for loss, _ in parts) / 2, rel=1e-9)
        assert (found.norm() / wanted.norm()).item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("case", of("world"), ids="-".join)
def test_measures_see_the_joint_batch(distributed, case):
    queries, passages, candidates = both_batches()
    with torch.no_grad():
        encoder = model()
        wanted = replace(CASES[case], scope="batch").measures(encoder(queries), encoder(passages), candidates)
    for name in ("accuracy", "positive_similarity"):
        found = sum(rank[case][2][name] for rank in distributed) / 2
        torch.testing.assert_close(found, wanted[name])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("info_nce", "margin_mse")])
def test_every_case_is_another_objective(name):
    """Equality of what is the same anyway would show nothing."""
    recipe = CASES[name, "batch"]
    assert gradient(recipe, both_batches())[0] != pytest.approx(gradient(CASES["info_nce", "batch"], both_batches())[0])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "margin_mse"])
def test_other_processes_count(name):
    """The cases of scope `world` would pass with no gathering, were both scopes' gradients equal."""
    joint = gradient(CASES[name, "batch"], both_batches())[1]
    parts = [gradient(CASES[name, "batch"], share(rank))[1] for rank in (0, 1)]
    assert not torch.allclose(joint, (parts[0] + parts[1]) / 2, rtol=1e-3)


def test_the_shared_positive_is_masked_across_processes():
    """The cases above would pass with no mask anywhere, were the masked and unmasked losses equal."""
    for name in ("info_nce", "back"):
        masked, _ = gradient(CASES[name, "batch"], both_batches())
        unmasked, _ = gradient(replace(CASES[name, "batch"], mask_false_negatives=False), both_batches())
        assert masked < unmasked - 1e-4
