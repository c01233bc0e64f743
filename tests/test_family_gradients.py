"""A step's gradient for M3 and for adapters on a language model: two processes, GradCache and recomputed layers.

Model, batch, objective and task are those of the stage; all must give what one process gives that keeps everything.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import tiny_decoder, tiny_m3
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from toy import toy_tables

from retune.config import EmbedderConfig, TrainConfig
from retune.data import candidates
from retune.data.batches import GroupDataset
from retune.model import trainable
from retune.stages import train as stage
from retune.training.embedding import EmbedderTask
from retune.training.m3 import UnifiedTask, unified
from retune.training.memory import policy
from retune.training.tasks import Task

Q, SEED = 4, 3  # queries of one process
COMMON = {
    "train_group_size": 3, "temperature": 0.1, "negatives_cross_device": True, "sub_batch_size": 5,
    "knowledge_distillation": True, "kd_loss_type": "m3_kd_loss",
}  # fmt: skip
UNIFIED = {"unified_finetuning": True, "colbert_dim": 16}
LORA = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8}
ASKED = {"family": "decoder", "query_instruction": "Find", "query_instruction_format": "Instruct: {}\nQuery: {}"}
CASES = {
    "m3": ("m3", {"family": "m3"}, UNIFIED),
    "m3, distilled": ("m3", {"family": "m3"}, UNIFIED | {"use_self_distill": True}),
    "adapters": ("qwen3", ASKED, LORA),
    "adapters, recomputed layers": ("qwen3", ASKED, LORA),
}
DECODERS = ("gemma2", "mistral", "qwen3")


class Step:
    """A case's task, with adapters that do something already, and its batches.

    Args:
        dropout: of the model and the adapters.
    """

    def __init__(self, folder: Path, case: str, dropout: float = 0.0, model: str = "") -> None:
        base, embedder, chosen = CASES[case]
        settings = TrainConfig(**COMMON | chosen | {"dropout": dropout, "lora_dropout": dropout})
        cpu = torch.device("cpu")
        asked = EmbedderConfig(model=str(folder / (model or base)), **embedder)
        self.model = trainable.load(asked, settings, SEED, cpu).train()
        for name, weight in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        files = {name: folder / f"tables/{name}.parquet" for name in ("texts", "queries", "pairs")}
        data = candidates.load(
            *files.values(), group_size=3, seed=SEED, bins=None, drop_longer_than=None, scored=True
        )  # fmt: skip
        self.groups = GroupDataset(data, 3, SEED)
        self.collate = stage._collate(self.model, data, files["texts"], settings, False, None, SEED)
        recipe = stage._recipe(settings, self.model)
        self.task: Task
        if self.model.heads is None:
            self.task = EmbedderTask(self.model, recipe)
        else:
            self.task = UnifiedTask(self.model, unified(settings, recipe))
        if case.endswith("recomputed layers"):
            self.recompute()

    def recompute(self, options: dict | None = None) -> None:
        """As transformers' trainer asks for it."""
        self.task.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        assert self.model.backbone.is_activation_checkpointing

    def gradient(
        self, queries: range, module: torch.nn.Module | None = None, cached: bool = False
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss on these queries and the gradients by weight.

        Args:
            module: what stands around the task. cached: `train.grad_cache`.
        """
        self.task.keep = policy(cached, True)
        batch = self.collate([self.groups[0, query] for query in queries])
        assert len(batch["chunks"]) > 2
        self.task.zero_grad()
        torch.manual_seed(7)
        loss = (module or self.task)(**{name: batch[name] for name in batch if name not in ("queries", "n_tokens")})
        loss.backward()
        trained = {name: weight.grad for name, weight in self.task.named_parameters() if weight.requires_grad}
        return loss.item(), {name: whole(grad) for name, grad in trained.items()}

    def cut(self) -> None:
        """As accelerate's FSDP has it: the layers, the embedding layer and what is left are cut up one by one."""
        layers = self.task._no_split_modules
        assert len(layers) == 1 and "Embeddings" not in layers[0]
        for module in [*self.task.modules()]:
            if type(module).__name__ in layers:
                fully_shard(module)
        fully_shard(self.task.get_input_embeddings())
        fully_shard(self.task)
        self.task.in_step = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("gradients")
    tiny_m3(found / "m3")
    for kind in DECODERS:
        tiny_decoder(found / kind, kind)
    toy_tables(found / "tables", 2 * Q, score=[float(row % 5) for row in range(8 * Q)])
    return found


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in gradients.values()]).double()


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Weight by weight, up to rounding: some gradients, such as those of keys' biases, are nothing else."""
    assert found.keys() == wanted.keys()
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * largest, msg=name)


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---- two processes ------------------------------------------------------------------------------


def process(rank: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    own, found = range(Q * rank, Q * rank + Q), {}
    for case in CASES:
        for dropout, names in ((0.0, ["plain"]), (0.1, ["dropout", "cached"])):
            step = Step(folder, case, dropout)
            parallel = DistributedDataParallel(step.task)
            for name in names:
                loss, gradients = step.gradient(own, parallel, name == "cached")
                dist.all_reduce(total := torch.tensor(loss, dtype=torch.float64))
                found[case, name] = (total.item() / 2, gradients)
        for name in ("cut", "cut, cached"):
            step = Step(folder, case)
            step.cut()
            step.collate.chunker = replace(step.collate.chunker, max_rows=5 - 2 * rank)  # one has more chunks
            loss, gradients = step.gradient(own, cached=name == "cut, cached")
            dist.all_reduce(total := torch.tensor(loss, dtype=torch.float64))
            found[case, name] = (total.item() / 2, gradients)
    torch.save(found, folder / f"{rank}.pt")
    del parallel, step  # outliving the group it may wait for ever
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(folder: Path) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(process, (port, folder), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_both_batches(distributed: list[dict], folder: Path, case: str) -> None:
    loss, wanted = Step(folder, case).gradient(range(2 * Q))
    for found_loss, found in (rank[case, "plain"] for rank in distributed):
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert (flat(found).norm() / flat(wanted).norm()).item() == pytest.approx(1, abs=1e-5)
        assert torch.nn.functional.cosine_similarity(flat(found), flat(wanted), 0).item() == pytest.approx(1, abs=1e-8)
        close(found, wanted)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["cut", "cut, cached"])
def test_weights_cut_up_change_no_gradient(distributed: list[dict], case: str, name: str) -> None:
    for rank in distributed:
        (loss, wanted), (found_loss, found) = rank[case, "plain"], rank[case, name]
        assert found_loss == pytest.approx(loss, rel=1e-5)
        close(found, wanted)


@pytest.mark.parametrize("case", CASES)
def test_gradcache_in_two_processes_is_the_plain_gradient(distributed: list[dict], case: str) -> None:
    """Bit for bit, with dropout."""
    for rank in distributed:
        (loss, plain), (cached_loss, cached) = rank[case, "dropout"], rank[case, "cached"]
        assert cached_loss == loss != rank[case, "plain"][0]
        assert equal(cached, plain)


def test_the_other_process_and_the_ensemble_count(distributed: list[dict], folder: Path) -> None:
    """The cases would pass with no gathering, or with no self-distillation, were these gradients equal."""
    for case in CASES:
        step = Step(folder, case)
        parts = [flat(step.gradient(range(Q * rank, Q * rank + Q))[1]) for rank in (0, 1)]
        joint = flat(distributed[0][case, "plain"][1])
        assert ((parts[0] + parts[1]) / 2 - joint).norm() > 1e-2 * joint.norm(), case
    plain, distilled = (flat(distributed[0][case, "plain"][1]) for case in ("m3", "m3, distilled"))
    assert (plain - distilled).norm() > 1e-2 * plain.norm()


# ---- recomputed layers --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}], ids=["default", "reentrant"])
def test_recomputed_layers_change_no_gradient_of_adapters(folder: Path, kind: str, options: dict | None) -> None:
    """With dropout on; no gradient comes into a decoder from below, for its embedding layer is frozen."""
    step = Step(folder, "adapters", 0.1, kind)
    loss, wanted = step.gradient(range(Q))
    assert all(grad.norm() > 0 and "lora_" in name for name, grad in wanted.items())
    step.recompute(options)
    for cached in (False, True):
        found_loss, found = step.gradient(range(Q), cached=cached)
        assert found_loss == pytest.approx(loss, rel=1e-6)
        close(found, wanted)
