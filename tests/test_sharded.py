"""Training whose weights, gradients or optimiser are cut up among two processes gives what training without gives.

accelerate knows FSDP on GPUs alone: here it is told that these CPUs are some, and cuts the model with the same code.
DeepSpeed is tried where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from pair import as_torchrun, two_processes
from safetensors.numpy import load_file
from tiny import tiny_bert
from toy import toy_tables

from retune import tables
from retune.config import EmbedderConfig, TrainConfig
from retune.data import devset
from retune.model.embedder import Embedder
from retune.stages.train import train
from retune.training.dev import evaluator

N = 32
ARGS = {"learning_rate": 2e-3, "num_train_epochs": 4, "per_device_train_batch_size": 4, "eval_steps": 2}
ZERO = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}  # fmt: skip
KINDS: dict[str, dict] = {
    "whole": {},
    "fsdp": {"fsdp": True},
    "fsdp, one unit": {"fsdp": "full_shard", "fsdp_config": {"auto_wrap_policy": "NO_WRAP"}},
    "fsdp, what fits": {"fsdp": True},
    "fsdp, sharded state": {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
    "zero 1": {"deepspeed": ZERO | {"zero_optimization": {"stage": 1}}},
    "zero 2": {"deepspeed": ZERO | {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}},
}
SETTINGS: dict[str, dict] = {
    "fsdp": {"grad_cache": True},
    "fsdp, one unit": {"grad_cache": False},
    "fsdp, what fits": {"grad_cache": "auto", "max_tokens_per_batch": None},
    "zero 1": {"grad_cache": False},
    "zero 2": {"grad_cache": True},
}
DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def kinds(*names: str) -> list:
    return [pytest.param(name, marks=DEEPSPEED if name.startswith("zero") else ()) for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("sharded")
    tiny_bert(found / "base")
    toy_tables(found / "tables", N, split=["dev" if row % 4 == 0 else "train" for row in range(N)])
    return found


def job(folder: Path, name: str, args: dict, **settings) -> dict:
    """24 training queries in two processes, so 3 steps an epoch, and 8 set aside."""
    paths = {part: folder / f"tables/{part}.parquet" for part in ("texts", "queries", "pairs")}
    settings = {
        "train_group_size": 3, "temperature": 0.05, "dev_passages": 30, "negatives_cross_device": True,
        "nproc_per_node": 2, "max_tokens_per_batch": 64, "dropout": 0.0,
    } | settings  # fmt: skip
    return {
        **paths, "bins": None, "judgments": paths["pairs"], "seed": 1, "drop_longer_than": None,
        "settings": TrainConfig(args=ARGS | args, **settings), "embedder": EmbedderConfig(model=str(folder / "base")),
        "state": folder / name / "state", "model_out": folder / name / "model",
        "history_out": folder / name / "history.parquet",
    }  # fmt: skip


def process(
    rank: int, port: int, job: dict, killed_at: int | None, dies_in: str | None = None, cut: bool = True
) -> None:  # fmt: skip
    """The stage in one of two; the second dies before it takes step `killed_at`, the first where it would save.

    The second is late to look for checkpoints, which the first removes in the end.

    Args:
        cut: whether accelerate is told that it has GPUs.
    """
    import accelerate.state
    from torch.distributed.tensor import DTensor

    from retune.model import trainable
    from retune.objective import lockstep
    from retune.training import run
    from retune.training.trainer import GroupTrainer

    prepared, computed, filler = accelerate.state.AcceleratorState.__init__, GroupTrainer.compute_loss, lockstep._filler
    seen = {"fillers": 0}

    def on_gpus(self, *given, fsdp_plugin=None, **named) -> None:
        prepared(self, *given, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = accelerate.DistributedType.FSDP, fsdp_plugin

    def watched(self, *given, **named):
        if rank == 1 and self.state.global_step + 1 == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        weights = list(self.task.parameters())
        seen["cut"] = all(isinstance(weight, DTensor) for weight in weights)
        if seen["cut"]:
            seen["share"] = sum(weight.to_local().numel() for weight in weights) / sum(
                weight.numel() for weight in weights
            )
        return computed(self, *given, **named)

    def counted(chunks):
        seen["fillers"] += 1
        return filler(chunks)

    def dies(*_, **__) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def late(folder: Path) -> list[Path]:
        time.sleep(2.0 * rank)
        return complete(folder)

    if dies_in == "save":
        trainable.save = dies
    complete, run.complete_checkpoints = run.complete_checkpoints, late
    if cut:
        accelerate.state.AcceleratorState.__init__ = on_gpus
    GroupTrainer.compute_loss, lockstep._filler = watched, counted
    as_torchrun(rank, port)
    train(**job)
    Path(job["model_out"]).with_name(f"seen{rank}.json").write_text(json.dumps(seen))


def history(folder: Path) -> dict[str, np.ndarray]:
    found = tables.read(folder / "history.parquet", "history").drop_columns("tokens_per_second")
    return {name: np.array(found[name].to_pylist(), dtype=float) for name in found.column_names}


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model" / "model.safetensors")


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], by: float = 2e-5) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=by, err_msg=name)


@pytest.fixture(scope="module")
def plain(folder) -> Path:
    """What the same run makes that cuts nothing up."""
    assert two_processes(process, job(folder, "plain", {}), None) == [0, 0]
    return folder / "plain"


@pytest.mark.parametrize("kind", kinds(*SETTINGS))
def test_the_model_is_that_of_whole_weights(folder, plain, kind):
    assert two_processes(process, job(folder, kind, KINDS[kind], **SETTINGS[kind]), None) == [0, 0]
    seen = [json.loads((folder / kind / f"seen{rank}.json").read_text()) for rank in (0, 1)]
    if kind.startswith("fsdp"):
        assert all(one["cut"] and 0.4 < one["share"] < 0.6 for one in seen), "each process has its half"
        fillers = sum(one["fillers"] for one in seen)
        assert kind == "fsdp, what fits" or fillers, "their batches have different numbers of chunks"
    one, other = history(folder / kind), history(plain)
    for column in other.keys() - ({"padding"} if kind == "fsdp, what fits" else set()):  # its chunks are others
        np.testing.assert_allclose(one[column], other[column], rtol=1e-4, atol=1e-6, err_msg=column)
    close(weights(folder / kind), weights(plain))
    base, found = load_file(folder / "base" / "model.safetensors"), weights(plain)
    assert max(np.abs(found[name] - base[name]).max() for name in found) > 5e-3, "training moves weights by more"


def test_the_model_is_the_best_checkpoint(folder, plain):
    given = job(folder, "plain", {})
    aside = devset.load(given["texts"], given["queries"], given["judgments"], seed=1, most_queries=500, passages=30)
    found = history(folder / "plain")["dev"]
    own = evaluator(Embedder.load(str(plain / "model")), aside, None)()
    assert own == pytest.approx(np.nanmax(found), abs=1e-6) and len(found[~np.isnan(found)]) == 6


@pytest.mark.parametrize("kind", kinds("fsdp", "fsdp, sharded state", "zero 2"))
def test_one_of_them_killed_they_go_on_as_if_nothing_had_happened(folder, kind):
    """With dropout, between two checkpoints; one of them with adapters."""
    chosen = {"dropout": 0.1, "use_lora": kind == "fsdp, sharded state", "lora_dropout": 0.1}
    whole, parts = (job(folder, f"{kind} {name}", KINDS[kind], **chosen) for name in ("whole", "parts"))
    assert two_processes(process, whole, None) == [0, 0]
    assert two_processes(process, parts, 6)[1] == -signal.SIGKILL
    state = folder / f"{kind} parts" / "state"
    assert (state / "checkpoints" / "checkpoint-4" / "complete").exists()
    assert two_processes(process, parts, None) == [0, 0]
    assert not state.exists()
    one, other = (history(folder / f"{kind} {name}") for name in ("parts", "whole"))
    for column in other:
        np.testing.assert_array_equal(one[column], other[column], err_msg=column)
    close(*(weights(folder / f"{kind} {name}") for name in ("parts", "whole")), by=0)


@pytest.mark.parametrize("kind", kinds("whole", "fsdp", "zero 2"))
def test_a_run_that_ended_is_only_saved_again(folder, plain, kind):
    """Killed between its last checkpoint and the model: the checkpoint alone is enough."""
    name = f"{kind} ended"
    assert two_processes(process, job(folder, name, KINDS[kind]), None, "save")[0] == -signal.SIGKILL
    assert not (folder / name / "model").exists()
    assert two_processes(process, job(folder, name, KINDS[kind]), None) == [0, 0]
    seen = json.loads((folder / name / "seen0.json").read_text())
    assert "cut" not in seen, "no step was taken"
    close(weights(folder / name), weights(plain))


def test_on_cpus_nothing_is_cut(folder, plain):
    assert two_processes(process, job(folder, "cpus", {"fsdp": True}), None, None, False) == [0, 0]
    seen = [json.loads((folder / "cpus" / f"seen{rank}.json").read_text()) for rank in (0, 1)]
    assert not any(one["cut"] for one in seen)
    close(weights(folder / "cpus"), weights(plain))
