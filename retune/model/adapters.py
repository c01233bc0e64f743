"""LoRA adapters: put around a model that is to be trained, and folded into the weights of one that is not."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from retune.model.backbone import BROKEN
from retune.runtime import UserError


def wrap(model: nn.Module, rank: int, alpha: float, dropout: float, targets: list[str] | None, task: str) -> nn.Module:
    """`model` with new LoRA adapters (Hu et al., arXiv:2106.09685), which alone, and a new head, are trained.

    Args:
        alpha: adapters are scaled by alpha / rank.
        targets: names of the linear layers that get adapters; None for all.
        task: peft's name of what the model does, such as SEQ_CLS, whose new head is trained whole.

    Raises:
        UserError: if no layer has such a name.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets or "all-linear", task_type=task
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"target_modules: {str(error).strip().splitlines()[0]}") from None


def unwrap(model: nn.Module) -> nn.Module:
    """The model under `wrap`, with what its adapters have learnt in its own weights; others as they are."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def fold(model: nn.Module, adapters: str | None) -> nn.Module:
    """Fold the LoRA adapters in a folder (or of a hub id) into a model's weights; None changes nothing.

    Raises:
        UserError: if there are none, or if they do not fit the model.
    """
    if adapters is None:
        return model
    from peft import PeftModel

    where = f"reranker.peft_path: {adapters}"
    path = Path(adapters).expanduser()
    if not (path / "adapter_config.json").is_file() and (path.exists() or adapters.startswith((".", "/", "~"))):
        raise UserError(f"{where}: no adapters there (adapter_config.json)")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            folded = PeftModel.from_pretrained(model, str(path) if path.exists() else adapters)
    except BROKEN as error:
        raise UserError(f"{where}: {str(error).strip().splitlines()[0]}") from None
    missing = [str(one.message) for one in said if "missing adapter keys" in str(one.message)]
    if missing:
        raise UserError(f"{where}: made for another model: {missing[0][:200]}")
    return folded.merge_and_unload()
