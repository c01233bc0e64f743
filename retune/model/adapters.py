"""LoRA adapters, folded into the weights of the model they were made for."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from retune.model.backbone import BROKEN
from retune.runtime import UserError


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
