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

    unused = task == "FEATURE_EXTRACTION" and isinstance(getattr(model, UNUSED, None), nn.Module)
    names = [f"{UNUSED}.{name}" for name, _ in getattr(model, UNUSED).named_modules() if name] if unused else None
    config = LoraConfig(
        r=keys.lora_rank, lora_alpha=keys.lora_alpha, lora_dropout=keys.lora_dropout, task_type=task,
        target_modules=keys.target_modules or "all-linear", exclude_modules=names, modules_to_save=keys.modules_to_save,
    )  # fmt: skip
    _check_names(model, keys.modules_to_save)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing had to be excluded
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"target_modules: {str(error).strip().splitlines()[0]}") from None


def _check_names(model: nn.Module, names: list[str] | None) -> None:
    """Raise a UserError for a name of `modules_to_save` that no module has: peft passes over it."""
    known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()} | {name for name, _ in model.named_modules()}
    for wanted in names or []:
        if wanted not in known:
            raise UserError(f"modules_to_save: the model has no module named {wanted!r}")


def go_on(model: nn.Module, adapters: Path, where: str) -> nn.Module:
    """`model` with the adapters in a folder, to be trained further.

    Args:
        where: the config key that names the folder.

    Raises:
        UserError: if there are none, or if they do not fit the model.
    """
    return _attached(model, adapters, where, True)


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
    return model if adapters is None else unwrap(_attached(model, located(adapters, where), where, False))


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
