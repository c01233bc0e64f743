"""Two processes against one with both batches: the gradients must be equal, not merely parallel."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from retune.objective.recipe import Candidates, Recipe

CASES = {
    "info_nce": Recipe("world", 0.2),
    "kl_div": Recipe("world", 0.2, "kl_div"),
    "unmasked": Recipe("world", 0.2, None, False),
    "batch": Recipe("batch", 0.2),
    "batch_kl_div": Recipe("batch", 0.2, "kl_div"),
}
Q, G, DIM = 3, 2, 4  # of one process


def model() -> torch.nn.Linear:
    torch.manual_seed(5)
    return torch.nn.Linear(DIM, DIM, dtype=torch.float64)


def both_batches() -> tuple[torch.Tensor, torch.Tensor, Candidates]:
    """Inputs of both processes, one after the other: queries [2Q, DIM], passages [2Q * G, DIM]."""
    torch.manual_seed(7)
    queries, passages = torch.randn(2 * Q, DIM, dtype=torch.float64), torch.randn(2 * Q * G, DIM, dtype=torch.float64)
    ids = torch.arange(2 * Q * G)
    ids[4 * G] = 0  # the first process's first positive is one of the second process's too
    rows = torch.arange(2 * Q)
    in_batch = torch.ones(2 * Q, dtype=torch.bool)
    in_batch[1] = False
    teacher = torch.randn(2 * Q, G, dtype=torch.float64)
    return queries, passages, Candidates(ids, rows, ids[::G], in_batch, teacher)


def share(rank: int) -> tuple[torch.Tensor, torch.Tensor, Candidates]:
    queries, passages, all_of_it = both_batches()
    q, p = slice(rank * Q, (rank + 1) * Q), slice(rank * Q * G, (rank + 1) * Q * G)
    part = Candidates(
        all_of_it.passage_ids[p], torch.arange(Q), all_of_it.positive_ids[q], all_of_it.in_batch[q],
        all_of_it.teacher[q],
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
    for name, recipe in CASES.items():
        encoder = model()
        parallel = torch.nn.parallel.DistributedDataParallel(Both(encoder, recipe))  # its hooks go with it
        loss = parallel(*share(rank))
        loss.backward()
        dist.all_reduce(value := loss.detach().clone())
        found[name] = (value.item() / 2, encoder.weight.grad)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gather")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.start_processes(process, (port, str(folder)), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", [name for name, recipe in CASES.items() if recipe.scope == "world"])
def test_world_equals_one_big_batch(distributed, case):
    recipe = CASES[case]
    loss, wanted = gradient(replace(recipe, scope="batch"), both_batches())
    for found_loss, found in (rank[case] for rank in distributed):
        assert found_loss == pytest.approx(loss, rel=1e-9)
        assert (found.norm() / wanted.norm()).item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("case", [name for name, recipe in CASES.items() if recipe.scope == "batch"])
def test_batch_is_the_mean_of_both(distributed, case):
    parts = [gradient(CASES[case], share(rank)) for rank in (0, 1)]
    for found_loss, found in (rank[case] for rank in distributed):
        assert found_loss == pytest.approx(sum(loss for loss, _ in parts) / 2, rel=1e-9)
        torch.testing.assert_close(found, (parts[0][1] + parts[1][1]) / 2)


def test_the_shared_positive_is_masked_across_processes():
    """The case above would pass with no mask anywhere, were the masked and unmasked losses equal."""
    masked, _ = gradient(Recipe("batch", 0.2), both_batches())
    unmasked, _ = gradient(Recipe("batch", 0.2, None, False), both_batches())
    assert masked < unmasked - 1e-4
