"""A model and its loss as one module: chunks of tokens in, the loss out.

One forward a step, however many chunks, is what DistributedDataParallel expects.  Knows nothing of
tables, epochs or optimisers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from retune.objective import gradcache, lockstep
from retune.training.memory import Keep, everything


class Task(nn.Module):
    """A model under training; `forward` takes a batch's entries and returns the loss, a scalar.

    Args:
        keep: how many activations of a batch are kept, see `training/memory.py`.
    """

    def __init__(self, model: nn.Module, keep: Keep = everything) -> None:
        super().__init__()
        self.model, self.keep = model, keep
        self._noted: dict[str, Tensor] = {}
        self.step = 0  # steps taken so far, told by the trainer
        self.in_step = False  # whether all processes must run each layer equally often, told by the trainer
        self.register_state_dict_post_hook(_without_frozen)
        self.register_load_state_dict_post_hook(_frozen_are_there)

    @property
    def config(self) -> Any:
        """The backbone's config, a copy: trainers read sizes from it (DeepSpeed's `auto`) and set what is their own."""
        return deepcopy(self.model.backbone.config)

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the layers, by which trainers cut a model (FSDP); what there is one of, such as all embeddings of
        an encoder, is no layer.
        """
        named = getattr(self.model.backbone, "_no_split_modules", None) or []
        found = Counter(type(module).__name__ for module in self.model.modules())
        return [name for name in sorted(named) if found[name] > 1]

    def chunk_outputs(self, chunks: list[dict[str, Tensor]]) -> list[Any]:
        """What the model makes of each chunk, with as many graphs kept as `keep` says."""
        keep = self.keep(self.model, chunks) if torch.is_grad_enabled() else None
        return (lockstep if self.in_step else gradcache).outputs(self.model, chunks, keep)

    def outputs(self, chunks: list[dict[str, Tensor]]) -> Tensor:
        """The model's rows for all chunks, one after the other: float32 [n, ...]."""
        return torch.cat([rows.float() for rows in self.chunk_outputs(chunks)])

    def note(self, measures: Mapping[str, Tensor]) -> None:
        """Add what a batch showed to what is logged next: scalars, which stay on their device; NaN for nothing."""
        for name, value in measures.items():
            value = value.detach().float()
            counted = torch.stack([value.nan_to_num(), (~value.isnan()).float()])  # [2]: sum, number
            self._noted[name] = self._noted.get(name, 0) + counted

    def noted(self) -> dict[str, Tensor]:
        """Sum and number of what was noted since the last call, by name: float32 [2]."""
        found, self._noted = self._noted, {}
        return found

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass; asked for by `activation_checkpointing` of the arguments."""
        self._let_gradients_in()
        self.model.backbone.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The older name of the same."""
        self._let_gradients_in()
        self.model.backbone.gradient_checkpointing_enable(**options)

    def get_input_embeddings(self) -> nn.Module:
        """The layer on whose output `neftune_noise_alpha` of the arguments puts noise."""
        return self.model.backbone.get_input_embeddings()

    def _let_gradients_in(self) -> None:
        """A layer that is recomputed by torch's older, reentrant way gets no gradient where its input needs none."""
        if not all(weight.requires_grad for weight in self.get_input_embeddings().parameters()):
            self.model.backbone.enable_input_require_grads()


def _frozen(task: nn.Module) -> list[str]:
    return [name for name, weight in task.named_parameters(remove_duplicate=False) if not weight.requires_grad]


def _without_frozen(task: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave out of a checkpoint what training does not change: it is as the model was loaded."""
    for name in _frozen(task):
        state.pop(prefix + name, None)


def _frozen_are_there(task: nn.Module, keys: Any) -> None:
    for name in _frozen(task):
        if name in keys.missing_keys:
            keys.missing_keys.remove(name)
