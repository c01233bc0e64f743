"""A finished model into its folder, among what else lies there.

Files are moved one by one, config.json last (adapter_config.json of adapters alone): until it is there, nothing takes
the folder for a model.
Interrupted at any point, the same call goes on.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from retune.runtime import atomic

LAST = ("adapter_config.json", "config.json")
# Files of an earlier model that a loader would read even where the new one has none of that name.
STALE = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_model*", "adapter/adapter_*",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "modules.json", "retune.json", "sparse_linear.pt", "colbert_linear.pt", *LAST,
)  # fmt: skip


def holds_model(folder: Path) -> bool:
    """Whether a model, or the adapters of one, lie in the folder."""
    return any((folder / name).exists() for name in LAST)


def place(model: Path, history: Path | None, output: Path) -> None:
    """Move the folder `model`'s files and the table `history`, where there is one, to the folder `output`.

    An earlier model there is removed first; other files stay.
    """
    output.mkdir(parents=True, exist_ok=True)
    if holds_model(output):
        for pattern in STALE:  # what marks a model goes last, so that an interruption is noticed
            for path in sorted(output.glob(pattern)):
                path.unlink()
    if history is not None and history.exists():
        _move(history, output / history.name)
    for path in sorted(model.rglob("*"), key=lambda path: (path.parent == model and path.name in LAST, path)):
        target = output / path.relative_to(model)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            _move(path, target)
    shutil.rmtree(model)


def _move(path: Path, target: Path) -> None:
    try:
        os.replace(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with atomic(target) as part:  # on another disk
            shutil.copyfile(path, part)
        path.unlink()
