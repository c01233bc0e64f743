"""What a checkpoint's folder holds, as one hash of its content.

Paths and dates say whose a model is, not which: one that is trained again lies in the same place.
Hashing 14 GB takes half a minute, so a file's hash is remembered by its size and times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

# Never read when a model is loaded.
IRRELEVANT = {".md", ".onnx", ".gguf", ".h5", ".msgpack", ".ot", ".png", ".jpg", ".tflite", ".pb"}
FOLDERS = {"onnx", "openvino"}
SETTLED = 2.0  # seconds after its last change from which on a file's times tell of a next one


def folder_hash(folder: Path, memory: Path) -> str:
    """A hash of the names and contents of a checkpoint's files: weights, tokenizer, configs, code.

    Args:
        memory: folder that keeps the hashes of single files; it may be lost at any time.
    """
    folder = Path(folder).resolve()
    memo = memory / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.json"
    known = _recall(memo)
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if _counts(file, folder)}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = dict(zip(files, pool.map(_entry, files.values(), map(known.get, files)), strict=True))
    settled = {name: entry for name, entry in found.items() if _is_settled(entry)}
    if settled != known:
        _remember(memo, settled)
    return hashlib.sha256(json.dumps([[name, entry[-1]] for name, entry in found.items()]).encode()).hexdigest()


def _counts(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and parts[0] not in FOLDERS and file.suffix not in IRRELEVANT and file.is_file()


def _entry(file: Path, known: list | None) -> list:
    """[size, time of content, time of any change, sha256]; the hash is taken from `known` where the rest agrees."""
    stat = file.stat()  # before reading, so that a change meanwhile shows the next time
    seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    if known and known[:3] == seen:
        return known
    with open(file, "rb") as stream:
        return [*seen, hashlib.file_digest(stream, "sha256").hexdigest()]


def _is_settled(entry: list) -> bool:
    """Whether a change after this look would change the file's times too: clocks of file systems are coarse."""
    return max(entry[1:3]) < (time.time() - SETTLED) * 1e9


def _recall(memo: Path) -> dict[str, Any]:
    try:
        found = json.loads(memo.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(memo: Path, entries: dict[str, list]) -> None:
    part = memo.with_name(f".{memo.name}.{uuid4().hex}")
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(entries, indent=1))
        os.replace(part, memo)
    except OSError:  # no room or no right: it is hashed again the next time
        with contextlib.suppress(OSError):
            part.unlink()
