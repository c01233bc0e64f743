"""GradCache: the plain gradient, bit for bit, in the memory of one chunk."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from pair import as_torchrun, two_processes
from tiny import tiny_bert
from torch import Tensor
from toy import toy_tables
from transformers import BertConfig, BertModel

from retune import tables
from retune.config import EmbedderConfig, TrainConfig
from retune.model.device import default_token_budget
from retune.objective import gradcache
from retune.objective.gather import gather_with_gradient
from retune.runtime import UserError
from retune.stages.train import train
from retune.training import memory
from retune.training.tasks import Task
from retune.training.trainer import GroupTrainer

LENGTH, ROWS = 16, 4


class Encoder(torch.nn.Module):
    """A BERT with dropout and random weights: a chunk → vectors [rows, hidden]."""

    def __init__(self, hidden: int = 32, layers: int = 2, length: int = LENGTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=100, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=4 * hidden, max_position_embeddings=length, hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )  # fmt: skip
        self.backbone = BertModel(config, add_pooling_layer=False)
        self.train()

    def forward(self, **chunk: Tensor) -> Tensor:
        return torch.nn.functional.normalize(self.backbone(**chunk).last_hidden_state.mean(1).float(), dim=-1)


def chunks_of(n: int, rows: int = ROWS, length: int = LENGTH, seed: int = 1) -> list[dict[str, Tensor]]:
    """`n` chunks, each a little shorter than the one before, the last row of each padded."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        ids = torch.randint(0, 100, (rows, max(2, length - i)), generator=random)
        mask = torch.ones_like(ids)
        mask[-1, -1] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def contrastive(vectors: Tensor, everyone: Tensor | None = None, first: int = 0) -> Tensor:
    """InfoNCE of each vector against its right neighbour: every vector's gradient depends on all the others."""
    scores = vectors @ (vectors if everyone is None else everyone).T / 0.1
    own = torch.arange(len(vectors)) + first
    return torch.nn.functional.cross_entropy(scores, (own + 1) % scores.shape[1])


def gradients(encoder: Encoder, chunks: list, keep: int | None, scale: float = 1.0) -> tuple[float, dict, Tensor]:
    """Loss, gradients by weight, and what is drawn next."""
    encoder.zero_grad()
    torch.manual_seed(3)
    loss = contrastive(torch.cat(gradcache.outputs(encoder, chunks, keep)))
    (loss * scale).backward()
    return loss.item(), {n: w.grad.clone() for n, w in encoder.named_parameters()}, torch.rand(3)


def assert_equal(found: tuple, wanted: tuple) -> None:
    assert found[0] == wanted[0] and torch.equal(found[2], wanted[2])
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert torch.equal(found[1][name], gradient), name


# ---- equality with the plain form ---------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 2 * ROWS * LENGTH, 10**9])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_with_dropout_are_the_plain_ones(keep, checkpointing):
    encoder, chunks = Encoder(), chunks_of(5)
    plain = gradients(encoder, chunks, None)
    assert max(gradient.abs().max() for gradient in plain[1].values()) > 1e-3
    if checkpointing:
        encoder.backbone.activation_checkpointing_enable()
    assert_equal(gradients(encoder, chunks, keep), plain)


def test_the_plain_gradient_is_that_of_one_graph_written_out():
    """Against representations, gradients and chunks handled by hand, as the paper has it."""
    encoder, chunks = Encoder(), chunks_of(4)
    found = gradients(encoder, chunks, 0)
    encoder.zero_grad()
    torch.manual_seed(3)
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(torch.get_rng_state())
            parts.append(encoder(**chunk))
    leaves = torch.cat(parts).requires_grad_()
    contrastive(leaves).backward()
    for chunk, state, cached in zip(chunks, states, leaves.grad.split(ROWS), strict=True):
        torch.set_rng_state(state)
        encoder(**chunk).backward(cached)
    for name, weight in encoder.named_parameters():
        torch.testing.assert_close(found[1][name], weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_with_a_scaled_loss(dtype):
    encoder, chunks = Encoder(hidden=8, layers=1), chunks_of(3, length=6)
    with torch.autocast("cpu", dtype):
        plain, cached = (gradients(encoder, chunks, keep, 2.0**10) for keep in (None, 0))
    assert_equal(cached, plain)


def test_accumulated_gradients_are_the_plain_ones():
    encoder, batches = Encoder(), [chunks_of(3, seed=seed) for seed in (1, 2)]
    found = []
    for keep in (None, 0):
        encoder.zero_grad()
        torch.manual_seed(5)
        for chunks in batches:
            (contrastive(torch.cat(gradcache.outputs(encoder, chunks, keep))) / 2).backward()
        found.append(torch.cat([weight.grad.flatten() for weight in encoder.parameters()]))
    assert torch.equal(*found)


def test_without_gradients_nothing_is_recomputed():
    encoder = Encoder()
    with torch.no_grad():
        one, other = (torch.cat(gradcache.outputs(encoder.eval(), chunks_of(3), keep)) for keep in (None, 0))
    assert torch.equal(one, other) and not other.requires_grad


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 200))
def test_the_last_chunks_within_the_bound_are_kept(sizes, keep):
    chunks = [{"input_ids": torch.zeros(size, 1)} for size in sizes]
    first = gradcache.first_kept(chunks, keep)
    assert first == len(sizes) - 1 or sum(sizes[first:]) <= keep
    assert first == 0 or sum(sizes[first - 1 :]) > keep
    assert gradcache.first_kept(chunks, None) == 0


# ---- memory -------------------------------------------------------------------------------------


def peak(encoder: Encoder, chunks: list, keep: int | None) -> int:
    """Bytes allocated at once, at most, during a forward and a backward pass."""
    encoder.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        contrastive(torch.cat(gradcache.outputs(encoder, chunks, keep))).backward()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@pytest.fixture(scope="module")
def wide() -> tuple[Encoder, list]:
    """256 texts in 16 chunks, for a model whose activations dwarf its weights."""
    return Encoder(64, 2, 32), [chunks_of(1, 16, 32, seed)[0] for seed in range(16)]


def test_a_batch_of_256_takes_the_memory_of_one_chunk(wide):
    encoder, chunks = wide
    one, plain, cached = peak(encoder, chunks[:1], None), peak(encoder, chunks, None), peak(encoder, chunks, 0)
    assert plain > 10 * one and cached < 1.3 * one


def test_kept_graphs_take_what_they_are_said_to_take(wide):
    encoder, chunks = wide
    a_token = memory.bytes_per_token(encoder, chunks[0])
    four, eight = (peak(encoder, chunks, n * chunks[0]["input_ids"].numel()) for n in (4, 8))
    assert (eight - four) / (4 * chunks[0]["input_ids"].numel()) == pytest.approx(a_token, rel=0.1)


def test_measuring_draws_nothing():
    encoder = Encoder()
    torch.manual_seed(1)
    memory.bytes_per_token(encoder, chunks_of(1)[0])
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3)) and all(weight.grad is None for weight in encoder.parameters())


def test_as_many_graphs_are_kept_as_fit(monkeypatch):
    encoder, chunks = Encoder(), chunks_of(5)
    a_token = memory.bytes_per_token(encoder, chunks[0])
    weights = 16 * sum(weight.numel() for weight in encoder.parameters())
    monkeypatch.setattr(memory, "free_memory", lambda _: 2 * (weights + int(100.5 * a_token)))
    assert memory.WhatFits()(encoder, chunks) == 100
    monkeypatch.setattr(memory, "free_memory", lambda _: 2**60)
    assert memory.WhatFits()(encoder, chunks) is None
    monkeypatch.setattr(memory, "free_memory", lambda _: 0)
    assert memory.WhatFits()(encoder, chunks) == 0


def test_auto_bounds_the_memory_where_the_user_bounds_a_chunk():
    chunks = chunks_of(3)
    assert memory.policy(False, True)(None, chunks) is None
    assert memory.policy(True, False)(None, chunks) == memory.policy("auto", True)(None, chunks) == 0
    assert isinstance(memory.policy("auto", False), memory.WhatFits)


@pytest.mark.parametrize(
    ("line", "names"),
    [("0::/job/step", ("memory.max", "memory.current")), ("4:memory:/job/step", ("limit_in_bytes", "usage_in_bytes"))],
)
def test_the_limit_of_a_control_group_counts(tmp_path, line, names):
    """A scheduler's limit lies on the job, above the step whose processes run."""
    old = "limit" in names[0]
    job = tmp_path / ("memory/job" if old else "job")
    (job / "step").mkdir(parents=True)
    limit, used = (f"memory.{name}" if old else name for name in names)
    (job / "step" / limit).write_text("max\n")
    (job / limit).write_text("1000\n")
    (job / used).write_text("700\n")
    (job / "memory.stat").write_text(f"anon 500\n{'total_' if old else ''}inactive_file 150\n")
    (tmp_path / "own").write_text(f"7:cpuset:/\n{line}\n")
    assert min(memory._left_of_the_groups(tmp_path, tmp_path / "own")) == 450
    assert memory.free_memory(torch.device("cpu")) > 0


def test_chunks_are_small_where_memory_is_asked_for():
    device = torch.device("cpu")
    whole, small = default_token_budget(device), memory.chunk_tokens(None, True, device)
    assert 0 < small <= whole / 4
    assert memory.chunk_tokens(None, "auto", device) is memory.chunk_tokens(None, False, device) is None
    assert memory.chunk_tokens(64, True, device) == memory.chunk_tokens(64, "auto", device) == 64


# ---- several processes --------------------------------------------------------------------------


class WithLoss(torch.nn.Module):
    """Encoder and loss in one forward; the loss is over both processes' vectors."""

    def __init__(self, keep: int | None) -> None:
        super().__init__()
        self.encoder, self.keep = Encoder(), keep

    def forward(self, chunks: list) -> Tensor:
        vectors = torch.cat(gradcache.outputs(self.encoder, chunks, self.keep))
        first = len(vectors) * (dist.get_rank() if dist.is_initialized() else 0)
        return contrastive(vectors, gather_with_gradient(vectors), first)


def shared_gradient(rank: int, port: int, folder: Path) -> None:
    limit = timedelta(minutes=2)  # who waits longer than that fails, and says for what it waited
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", limit, world_size=2, rank=rank)
    found = []
    for keep, dropout in ((None, True), (0, True), (0, False)):
        model = torch.nn.parallel.DistributedDataParallel(WithLoss(keep).train(dropout))
        torch.manual_seed(10 + rank)
        for step in (0, 1):  # the second step would show what the first left behind
            model.zero_grad()
            model(chunks_of(6, seed=step)[rank * 3 : rank * 3 + 3]).backward()
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    torch.save(found, folder / f"{rank}.pt")
    del model  # outliving its group it may wait for ever
    dist.destroy_process_group()


def test_two_processes_give_the_plain_gradient_and_that_of_one(tmp_path):
    assert two_processes(shared_gradient, tmp_path) == [0, 0]
    (plain, cached, without), others = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(plain, cached) and all(map(torch.equal, (plain, cached, without), others))
    alone = WithLoss(None).eval()
    alone(chunks_of(6, seed=1)).backward()
    wanted = torch.cat([weight.grad.flatten() for weight in alone.parameters()])
    assert (without.norm() / wanted.norm()).item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(without, wanted, rtol=1e-4, atol=1e-6)


# ---- the stage ----------------------------------------------------------------------------------

ARGS = {
    "learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 8, "save_steps": 2, "logging_steps": 1,
    "max_grad_norm": 0.5, "gradient_accumulation_steps": 1,
}  # fmt: skip


def job(folder: Path, paths: dict[str, Path], args: dict | None = None, **settings) -> dict:
    """Arguments of `train`: 24 queries in batches of 8 (two processes of 4), 6 steps in all."""
    settings = {"train_group_size": 3, "temperature": 0.05} | settings
    return {
        **paths, "bins": None, "settings": TrainConfig(args=ARGS | (args or {}), **settings),
        "embedder": EmbedderConfig(model=str(paths["texts"].parent / "base")), "seed": 1, "drop_longer_than": None,
        "state": folder / "state", "model_out": folder / "model", "history_out": folder / "history.parquet",
    }  # fmt: skip


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tables")
    tiny_bert(folder / "base")
    return toy_tables(folder)


def test_the_stage_gives_the_same_model_with_and_without(paths, tmp_path):
    recomputed = []
    plain_call = gradcache._recomputed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradcache, "_recomputed", lambda *given: recomputed.append(1) or plain_call(*given))
        for name, settings in {
            "plain": {"grad_cache": False}, "cached": {"grad_cache": True}, "bounded": {},
        }.items():  # fmt: skip
            before = len(recomputed)
            accumulated = {"gradient_accumulation_steps": 2, "activation_checkpointing": name == "cached"}
            train(**job(tmp_path / name, paths, accumulated, max_tokens_per_batch=128, **settings))
            assert (len(recomputed) > before) == (name != "plain")
    assert weights(tmp_path / "plain") == weights(tmp_path / "cached") == weights(tmp_path / "bounded")


def test_sub_batch_size_bounds_the_texts_of_a_chunk(paths, tmp_path, monkeypatch):
    seen, plain = [], gradcache.outputs
    monkeypatch.setattr(
        gradcache, "outputs", lambda f, chunks, keep: seen.append((chunks, keep)) or plain(f, chunks, keep)
    )
    train(**job(tmp_path, paths, {"max_steps": 2}, sub_batch_size=5))
    assert len(seen) == 2 and {keep for _, keep in seen} == {0}
    sizes = [len(chunk["input_ids"]) for chunks, _ in seen for chunk in chunks]
    assert max(sizes) == 5


def test_the_history_has_what_the_batches_showed(paths, tmp_path):
    each, thrice = (
        train(**job(tmp_path / str(every), paths, {"logging_steps": every, "save_steps": 6}))
        or tables.read(tmp_path / str(every) / "history.parquet", "history").to_pylist()
        for every in (1, 3)
    )
    assert [row["step"] for row in each] == [1, 2, 3, 4, 5, 6] and [row["step"] for row in thrice] == [3, 6]
    for row in each:
        assert row.pop("dev") is None and row.pop("sparse_nonzero") is None and None not in row.values()
        assert -1 <= row["negative_similarity"] < row["positive_similarity"] <= 1 + 1e-6
        assert row["accuracy"] * 8 == pytest.approx(round(row["accuracy"] * 8))  # of 8 queries
        assert 0 <= row["padding"] < 1 and row["tokens_per_second"] > 0
    for rows, mean in ((each[:3], thrice[0]), (each[3:], thrice[1])):
        for name in ("loss", "positive_similarity", "negative_similarity", "accuracy"):
            assert mean[name] == pytest.approx(sum(row[name] for row in rows) / 3, rel=1e-5)


def test_nothing_to_measure_is_no_number():
    task = Task(torch.nn.Linear(1, 1))
    for value in (0.5, torch.nan, 1.0):
        task.note({"some": torch.tensor(value), "none": torch.tensor(torch.nan)})
    found = {name: values.tolist() for name, values in task.noted().items()}
    assert found == {"some": [1.5, 2], "none": [0, 0]} and task.noted() == {}


def trained_by_one_of_two(rank: int, port: int, job: dict, killed_at: int | None) -> None:
    """The stage as torchrun would have it run; the second process dies before it takes step `killed_at`."""
    plain = GroupTrainer.compute_loss

    def watched(self, *given, **named):
        if rank == 1 and self.state.global_step + 1 == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *given, **named)

    def alone() -> None:
        held = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.parallel.DistributedDataParallel)]
        assert not held, "outliving its group it may wait for ever"
        destroy()

    GroupTrainer.compute_loss = watched
    destroy, dist.destroy_process_group = dist.destroy_process_group, alone
    as_torchrun(rank, port)
    train(**job)


def test_two_processes_one_of_them_killed_go_on_as_if_nothing_had_happened(paths, tmp_path):
    settings = {"nproc_per_node": 2, "negatives_cross_device": True, "max_tokens_per_batch": 64}
    whole, parts = (
        job(tmp_path / name, paths, {"per_device_train_batch_size": 4}, **settings) for name in ("whole", "parts")
    )
    assert two_processes(trained_by_one_of_two, whole, None) == [0, 0]
    assert two_processes(trained_by_one_of_two, parts, 4)[1] == -signal.SIGKILL
    assert (tmp_path / "parts" / "state" / "checkpoints" / "checkpoint-2" / "complete").exists()
    assert not (tmp_path / "parts" / "model").exists()
    assert two_processes(trained_by_one_of_two, parts, None) == [0, 0]
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    one, other = (tables.read(tmp_path / name / "history.parquet", "history") for name in ("parts", "whole"))
    assert one.drop_columns("tokens_per_second") == other.drop_columns("tokens_per_second")


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    """Else they would write into the state of the run that is started next."""
    (tmp_path / "sleeper.py").write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).with_name('pid').write_text(str(os.getpid()))\ntime.sleep(120)\n"
    )
    code = "import pathlib, sys; from retune.training.launch import launch\n"
    code += "launch('sleeper', {}, 1, pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    child = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not running(child))


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_zero_3_is_refused(paths, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(UserError, match=r"train\.args\.deepspeed: ZeRO stage 3"):
        train(**job(tmp_path, paths, {"deepspeed": str(tmp_path / "ds.json")}))
    assert not (tmp_path / "model").exists()
