"""What an embedder is made of: checkpoint, config, tokenizer, adapters, each of which may lie in a folder of its own.

Adapters that were trained with new tokens have their tokenizer beside them: a model gets both or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from retune.config import EmbedderConfig
from retune.model import adapters as lora
from retune.model import checkpoint, heads
from retune.model.backbone import load_backbone, load_tokenizer
from retune.model.vocabulary import grow
from retune.runtime import UserError

KEY = "embedder.peft_path"


@dataclass(frozen=True)
class Parts:
    """Folders that an embedder is read from.

    checkpoint: says how it is used. weights: the same, but for a checkpoint that is adapters alone, which names its
    base. config, tokenizer: None where they lie with the weights. adapters: in the order in which they are folded in.
    """

    checkpoint: Path
    weights: Path
    config: Path | None
    tokenizer: Path | None
    adapters: tuple[Path, ...]

    @property
    def folders(self) -> list[Path]:
        """All of them, each once."""
        found = (self.checkpoint, self.weights, self.config, self.tokenizer, *self.adapters)
        return list(dict.fromkeys(folder for folder in found if folder is not None))

    @property
    def texts_by(self) -> Path:
        """The folder of the tokenizer that is used."""
        own = (folder for folder in reversed(self.adapters) if checkpoint.has_tokenizer(folder))
        return self.tokenizer or next(own, self.weights)

    @property
    def heads(self) -> Path:
        """The folder whose heads hold, where it is an M3 model: those beside adapters were trained with these."""
        own = (folder for folder in (*reversed(self.adapters), self.checkpoint) if heads.there(folder))
        return next(own, self.weights)


def locate(settings: EmbedderConfig) -> Parts:
    """Find all folders of the section `embedder`; what the hub has is downloaded.

    Raises:
        UserError: for a reference that leads nowhere.
    """
    folder = checkpoint.resolve(settings.model, settings.revision, settings.sha256, adapters_alone=True)
    adapters = [lora.located(settings.peft_path, KEY)] if settings.peft_path else []
    weights = folder
    if is_adapters_alone(folder):
        weights, adapters = _base(folder), [folder, *adapters]
    config = checkpoint.resolve(settings.config_name) if settings.config_name else None
    tokenizer = checkpoint.tokenizer(settings.tokenizer_name) if settings.tokenizer_name else None
    return Parts(folder, weights, config, tokenizer, tuple(adapters))


def is_adapters_alone(folder: Path) -> bool:
    """Whether a checkpoint holds adapters without the model that they are for."""
    return (folder / checkpoint.ADAPTERS).is_file() and not (folder / "config.json").is_file()


def _base(folder: Path) -> Path:
    said = checkpoint.read_json(folder / checkpoint.ADAPTERS)
    base = said.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"model {folder}: its {checkpoint.ADAPTERS} names no base model; set embedder.model to that, and {KEY} to "
            "this folder"
        )
    return checkpoint.resolve(base, said.get("revision"))


def load(
    parts: Parts, settings: EmbedderConfig, dtype: torch.dtype, both_ways: bool = False
) -> tuple[torch.nn.Module, object]:
    """(backbone with all adapters folded in, tokenizer).

    Args:
        both_ways: see `backbone.load_backbone`.

    Raises:
        UserError: for parts that are broken, or do not fit each other.
    """
    trusted = settings.trust_remote_code
    tokenizer = load_tokenizer(parts.tokenizer or parts.weights, trusted)
    backbone = load_backbone(parts.weights, dtype, trusted, parts.config, settings.use_flash_attn, both_ways)
    if parts.tokenizer and len(tokenizer) > (rows := len(backbone.get_input_embeddings().weight)):
        raise UserError(
            f"embedder.tokenizer_name: its {len(tokenizer)} tokens are more than the {rows} that {settings.model} has "
            "vectors for"
        )
    for folder in parts.adapters:
        if parts.tokenizer is None:
            tokenizer = with_tokens_of(folder, tokenizer, backbone, trusted)
        where = "embedder.model" if folder == parts.checkpoint else KEY
        backbone = lora.fold(backbone, folder, where)
    return backbone, tokenizer


def with_tokens_of(adapters: Path, tokenizer, backbone: torch.nn.Module, trust_remote_code: bool):
    """The tokenizer that lies with adapters, for which the backbone gets new rows; the given one if there is none."""
    if not checkpoint.has_tokenizer(adapters):
        return tokenizer
    theirs = load_tokenizer(adapters, trust_remote_code)
    grow(backbone, len(tokenizer), len(theirs))
    return theirs
