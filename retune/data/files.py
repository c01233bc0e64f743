"""Which files a path, folder or glob stands for.

Imports nothing heavy, so that a workflow can ask for its inputs while it is being parsed.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from retune.runtime import UserError

FORMS = (".jsonl", ".json", ".parquet")
COMPRESSED = (".gz", ".zst")
DECIDING = (
    ".safetensors",
    ".bin",
    ".pt",
    ".json",
    ".txt",
    ".model",
    ".py",
    ".jinja",
)  # weights, tokenizer, configs, code


def expand(patterns: Sequence[str], key: str) -> list[Path]:
    """The files behind paths, folders and globs: each once, a pattern's own in natural order (part-2, part-10).

    A folder stands for all JSONL and Parquet files in it and below, hidden ones excepted; a file
    that is named, or that a glob matches, is taken whatever its name.

    Args:
        key: the config key that holds `patterns`, named in errors.

    Raises:
        UserError: for a pattern that stands for no file.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        if Path(pattern).exists():
            matches = [Path(pattern)]
        else:
            matches = [Path(match) for match in glob.glob(str(Path(pattern).expanduser()), recursive=True)]
        files = [file for match in matches for file in (_data_files(match) if match.is_dir() else [match])]
        if not files:
            raise UserError(f"{key}: {_nothing(pattern, matches)}")
        found |= dict.fromkeys(sorted(files, key=natural))
    return list(found)


def natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key that reads numbers as numbers."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"([0-9]+)", str(path))]


def is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _data_files(folder: Path) -> Iterable[Path]:
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and re.sub(r"\.(gz|zst)$", "", name).endswith(FORMS):
                yield Path(root, name)


def _nothing(pattern: str, matches: Sequence[Path]) -> str:
    if matches:
        return f"{pattern}: no file in this folder ends in {', '.join(FORMS)} (plain or with {', '.join(COMPRESSED)})"
    return f"{pattern}: no such file, folder or match; relative paths start at {Path.cwd()}"


def deciding(model: str) -> list[str]:
    """The files that decide what a model in a folder is; none where the reference is not to a folder."""
    folder = Path(model).expanduser()
    if ":" in model or not folder.is_dir():
        return []
    own = sorted(str(file) for file in folder.iterdir() if file.suffix in DECIDING)
    return own + sorted(str(file) for file in folder.glob("*/config.json"))  # of its modules, such as pooling
