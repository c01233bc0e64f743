"""Queries and passages of benchmarks, row by row, whatever their form, and what is said where some are missing.

A file is JSONL, Parquet or, where its name says so, a TSV of ids and texts.  Knows nothing of judgments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retune.data import sources
from retune.data.rows import check_document
from retune.runtime import UserError, log, progress

SHOWN = 10

Files = Mapping[str, Sequence[Path]]  # a benchmark's, by role: queries, corpus and qrels


def watched(paths: Sequence[Path]) -> Iterator[tuple[Path, sources.Raw]]:
    """(file, row) of all files in turn, with a progress bar."""
    size = sum(path.stat().st_size for path in paths if path.exists())
    with progress(size or None, paths[0].name, "B") as bar:
        for path in paths:
            read = _tsv if re.search(r"\.tsv(\.gz|\.zst)?$", path.name) else sources.rows
            for raw in read(path, bar.update):
                yield path, raw


def identified(paths: Sequence[Path]) -> Iterator[tuple[Path, sources.Raw, str]]:
    """(file, row, id) of rows with an `_id`; numbers are ids too, written as text."""
    for path, raw in watched(paths):
        key: Any = raw.value.get("_id") if isinstance(raw.value, dict) else None
        if isinstance(key, int) and not isinstance(key, bool):
            key = str(key)
        if not isinstance(key, str) or not key:
            mistakes = check_document(raw.value)[1] if not isinstance(raw.value, dict) else []
            raise UserError(f"{path}:{raw.line}: {mistakes[0] if mistakes else '_id: expected a string'}")
        yield path, raw, key


def _tsv(path: Path, on_read: sources.OnRead) -> Iterator[sources.Raw]:
    """Lines of an id and a text, as MS MARCO's `collection.tsv` and `queries.tsv` have them."""
    for number, line in sources.lines(path, on_read):
        fields = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace").rstrip("\r").split("\t")
        if len(fields) != 2:
            raise UserError(f"{path}:{number}: expected an id, a tab and a text, found {len(fields)} columns")
        yield sources.Raw(number, {"_id": fields[0], "text": fields[1]}, line)


def same(there: tuple[Path, int], here: Path) -> str:
    """How a message names an earlier row."""
    path, line = there
    return f"on line {line}" if path == here else f"at {path}:{line}"


def missing(names: Sequence[str], total: int, what: str, path: Path, count: int | None = None) -> None:
    """Warn of judged ids or texts that are not there.

    Args:
        names: of them, or of the rows that name them.
        count: how many there are, where not as many as names.

    Raises:
        UserError: where all of them are missing.
    """
    if not names:
        return
    count = len(names) if count is None else count
    named = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    message = f"{path}: {count:,} of {total:,} {what} are not here: {named}"
    if count == total:
        raise UserError(message)
    log.warning(message)


def expect(found: int, wanted: int | None, key: str, what: str, path: Path) -> None:
    """Raise a UserError where a collection is not as large as the config says."""
    if wanted is not None and found != wanted:
        raise UserError(f"{path}: {found:,} {what}, but {key} says {wanted:,}: another version, or not the whole of it")
