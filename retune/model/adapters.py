"""LoRA adapters: put around a model that is to be trained, and folded into the weights of one that is not."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from retune.model import checkpoint
from retune.model.backbone import BROKEN
from retune.runtime import UserError, log
from retune.sections.lora import LoraKeys

BESIDE = "adapter"  # folder of the adapters within that of a model into which they are folded
UNUSED = "pooler"  # of BERT and its kin: no vector goes through it, so adapters there would never get a gradient


def wrap(model: nn.Module, keys: LoraKeys, task: str) -> nn.Module:
    """`model` with new LoRA adapters (Hu et al., arXiv:2106.09685), which alone are trained, and what `keys` adds.

    Args:
        task: peft's name of what the model does: FEATURE_EXTRACTION, or SEQ_CLS, whose new head is trained whole.

    Raises:
        UserError: if no layer has such a name.
    """
    from peft import LoraConfig, get_peft_model

    _check_names(model, keys)
    unused = task == "FEATURE_EXTRACTION" and isinstance(getattr(model, UNUSED, None), nn.Module)
    config = LoraConfig(
        r=keys.lora_rank, lora_alpha=keys.lora_alpha, lora_dropout=keys.lora_dropout, task_type=task,
        target_modules=keys.target_modules or "all-linear", modules_to_save=keys.modules_to_save,
        exclude_modules=[f"{UNUSED}.{name}" for name in _linear(getattr(model, UNUSED))] if unused else None,
    )  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing had to be excluded
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"target_modules: {str(error).strip().splitlines()[0]}") from None


def _linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _check_names(model: nn.Module, keys: LoraKeys) -> None:
    """Raise a UserError for a name that stands for no module, which peft would pass over or not name."""
    modules = [f".{name}" for name, _ in model.named_modules()]

    def unknown(names: list[str] | None) -> list[str]:
        return [name for name in names or [] if not any(module.endswith(f".{name}") for module in modules)]

    if wrong := unknown(keys.modules_to_save):
        raise UserError(f"modules_to_save: the model has no module named {wrong[0]!r}")
    if keys.target_modules and len(wrong := unknown(keys.target_modules)) == len(keys.target_modules):
        known = dict.fromkeys(name.rsplit(".", 1)[-1] for name in _linear(model))
        raise UserError(f"target_modules: the model has no {' or '.join(wrong)}; its linear layers: {', '.join(known)}")


def go_on(model: nn.Module, adapters: Path, where: str) -> nn.Module:
    """`model`, an embedder's, with the adapters in a folder, to be trained further.

    Args:
        where: the config key that names the folder.

    Raises:
        UserError: if there are none, or if they do not fit the model.
    """
    found = _attached(model, adapters, where, True)
    for name, weight in found.named_parameters():
        if f".{UNUSED}." in name:
            weight.requires_grad_(False)
    return found


def is_wrapped(model: nn.Module) -> bool:
    """Whether the model has adapters around it."""
    return hasattr(model, "merge_and_unload")


def unwrap(model: nn.Module) -> nn.Module:
    """The model under `wrap`, with what its adapters have learnt in its own weights; others as they are."""
    return model.merge_and_unload() if is_wrapped(model) else model


def fold(model: nn.Module, adapters: str | Path | None, where: str = "reranker.peft_path") -> nn.Module:
    """Fold the LoRA adapters in a folder (or of a hub id) into a model's weights; None changes nothing.

    Raises:
        UserError: if there are none, or if they do not fit the model.
    """
    if adapters is None:
        return model
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    folded = unwrap(_attached(model, located(adapters, where), where, False))
    for name, weight in folded.named_parameters():
        weight.requires_grad_(name in trained)  # which peft takes from the model that it wraps
    return folded


def located(adapters: str | Path, where: str) -> Path:
    """The folder of adapters, downloaded where they are a hub id's.

    Raises:
        UserError: if there are none.
    """
    found = checkpoint.located(str(adapters))
    if found is None or not (found / checkpoint.ADAPTERS).is_file():
        raise UserError(f"{where}: {adapters}: no adapters there ({checkpoint.ADAPTERS})")
    return found


def save(model: nn.Module, folder: Path, base: str, revision: str | None) -> None:
    """Write the adapters of a wrapped model, as peft loads them.

    Args:
        base: what they are for: a folder or a hub id. revision: of the hub id.
    """
    settings = model.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = base, revision
    model.save_pretrained(folder, save_embedding_layers=False)  # trained ones are in modules_to_save
    (Path(folder) / "README.md").unlink(missing_ok=True)  # a form to be filled in


def _attached(model: nn.Module, adapters: Path, where: str, trainable: bool) -> nn.Module:
    from peft import PeftModel

    where = f"{where}: {adapters}"
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = PeftModel.from_pretrained(model, str(adapters), is_trainable=trainable)
    except (*BROKEN, AttributeError, TypeError) as error:
        raise UserError(f"{where}: {str(error).strip().splitlines()[0]}") from None
    missing = [str(one.message) for one in said if "missing adapter keys" in str(one.message)]
    if missing:
        raise UserError(f"{where}: made for another model: {missing[0][:200]}")
    log.info("%s: %s", where, "trained further" if trainable else "folded into the model")
    return found
