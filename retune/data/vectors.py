"""Vectors of texts that were embedded before: a cache by content, beside the results.

`<folder>/<key>/<entry>/` is one finished embeddings table.  The key is a hash of all that decides
a vector but the text; an entry holds

    vectors.parquet   a hard link to the table, which takes no space while the result is there
                      (results are replaced by a rename, so what a link shows never changes)
    digests           16 bytes a row: which text it is, as the model reads it, in row order
    about.json        what the key stands for, for people

Entries appear and go by a rename, so jobs side by side see whole ones or none.  Knows digests,
rows and vectors; nothing of models.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retune import tables
from retune.data import text
from retune.runtime import UserError, log

VECTORS, DIGESTS, ABOUT = "vectors.parquet", "digests", "about.json"
DIGEST = 16  # bytes
CHUNK = 1 << 20  # digests compared at a time
WINDOW = 1 << 28  # bytes of vectors read ahead
UNUSED = 7 * 24 * 3600  # seconds after which an entry goes that neither a result nor a job uses


def digests(texts: Iterable[str]) -> np.ndarray:
    """uint64 [n, 2]: `text.digest` of each text, to be compared by its halves."""
    return np.frombuffer(b"".join(text.digests(texts)), np.uint64).reshape(-1, 2)


def stored(table: Path) -> Iterator[np.ndarray]:
    """The vectors of an embeddings table in blocks [b, dim], of the dtype they are stored in."""
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(1 << 14, columns=["vector"]):
            yield tables.vectors(batch)


@dataclass(frozen=True)
class Entry:
    """A finished table, open, so that it can be read even when another job removes it."""

    folder: Path
    file: pq.ParquetFile
    rows: int

    @classmethod
    def open(cls, folder: Path) -> Entry:
        """Raises OSError or ValueError (of which Arrow's are) where it is not whole."""
        file = pq.ParquetFile(folder / VECTORS)  # not mapped: what is cut off under a map kills the reader
        rows, size = file.metadata.num_rows, (folder / DIGESTS).stat().st_size
        if size != rows * DIGEST or not rows:
            raise ValueError(f"{rows} vectors, but {size} bytes of digests")
        return cls(folder, file, rows)

    def digests(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Of rows `start` to `stop`, uint64 [rows, 2]; an OSError where they have gone meanwhile."""
        stop = self.rows if stop is None else stop
        return np.fromfile(self.folder / DIGESTS, np.uint64, 2 * (stop - start), offset=start * DIGEST).reshape(-1, 2)


class Cache:
    """The entries of one key under `folder`.

    Args:
        about: all that decides a vector but its text; JSON-able.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.root, self.about = Path(folder), json.dumps(about, sort_keys=True, indent=1)
        self.folder = self.root / hashlib.sha256(self.about.encode()).hexdigest()[:32]

    def find(self, wanted: np.ndarray) -> Found:
        """Where the vectors of texts lie.

        Args:
            wanted: digests, uint64 [n, 2].
        """
        keys, place = np.unique(wanted[:, 0], return_inverse=True)  # [u], [n]
        source = np.full(len(keys), -1, np.int64)  # row among those of the entries used, one after the other
        other = np.zeros(len(keys), np.uint64)  # the second half of what was found
        used, base = [], 0
        for entry in _entries(self.folder):
            some = False
            for start in range(0, entry.rows if len(keys) else 0, CHUNK):
                first, second = _digests(entry, start, min(start + CHUNK, entry.rows)).T  # [c] each
                order = np.argsort(first)  # sorted ones are looked up four times as fast
                at = np.minimum(np.searchsorted(keys, first[order]), len(keys) - 1)
                hit = np.flatnonzero((keys[at] == first[order]) & (source[at] < 0))
                at, hit = at[hit], order[hit]
                source[at], other[at] = base + start + hit, second[hit]
                some |= bool(len(hit))
            if some:
                used.append(entry)
                base += entry.rows
            else:
                entry.file.close()
        source = source[place]
        source[other[place] != wanted[:, 1]] = -1
        return Found(source, used)

    def add(self, table: Path, rows: np.ndarray, found: Found) -> None:
        """Keep a finished table; what it makes superfluous goes.  A cache that cannot be written is no error.

        Args:
            rows: digests of its rows, uint64 [n, 2].
            found: what `find` gave for them.
        """
        name = f"{time.time_ns():020d}-{uuid4().hex[:8]}"  # entries sort by age
        part = self.folder / f".new-{name}"
        try:
            part.mkdir(parents=True)
            if len(rows) and _link(table, part / VECTORS, copy=not found.mask.all()):
                rows.tofile(part / DIGESTS)
                (part / ABOUT).write_text(self.about + "\n")
                part.rename(self.folder / name)
            self._remove_covered(name)
            _remove_unused(self.root)
        except OSError as error:
            log.warning("vector cache: %s is not kept: %s", table, error)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _remove_covered(self, name: str) -> None:
        """Remove entries older than `name` of which it, with others that are newer, holds every text."""
        newer: list[Entry] = []
        for entry in _entries(self.folder, name):
            entry.file.close()  # digests are enough, and there may be many
            if newer and newer[0].folder.name == name and _covered(entry, newer):
                _remove(entry.folder)
            newer.append(entry)


class Found:
    """Vectors in the cache, for rows of a table.

    Attributes:
        mask: bool [n]: the rows that have one.
    """

    def __init__(self, source: np.ndarray, entries: Sequence[Entry]) -> None:
        self._source, self.mask = source, source >= 0
        self._groups = [(entry, group) for entry in entries for group in range(entry.file.num_row_groups)]
        sizes = [entry.file.metadata.row_group(group).num_rows for entry, group in self._groups]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._rows, self._span, self._vectors = source[:0], (0, 0), np.empty((0, 0))
        for entry in entries:
            with contextlib.suppress(OSError):
                os.utime(entry.folder)  # when it was last used

    @classmethod
    def nothing(cls, n: int) -> Found:
        """Nothing found for any of `n` rows."""
        return cls(np.full(n, -1), [])

    def _group_of(self, source: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, source, side="right") - 1

    def take(self, start: int, stop: int) -> np.ndarray:
        """Vectors of the found ones among rows `start` to `stop`, [found, dim], as they were stored.

        Rows are best asked for in order: vectors are read ahead, each part of an entry once in `WINDOW` bytes.
        """
        if not (self._span[0] <= start and stop <= self._span[1]):
            self._read(start, stop)
        first, last = np.searchsorted(self._rows, [start, stop])
        return self._vectors[first:last]

    def _read(self, start: int, stop: int) -> None:
        if not self.mask[start:stop].any():
            self._rows, self._span = self._source[:0], (start, stop)
            self._vectors = self._vectors[:0]
            return
        sample = self._groups[0][0].file.schema_arrow.field("vector").type
        width, dtype = sample.list_size, sample.value_type.to_pandas_dtype()
        stop = max(stop, start + WINDOW // (width * np.dtype(dtype).itemsize))
        self._rows = start + np.flatnonzero(self.mask[start:stop])
        source = self._source[self._rows]
        del self._vectors  # room for the next
        self._span, self._vectors = (start, stop), np.empty((len(source), width), dtype)
        order = np.argsort(source, kind="stable")
        groups, cuts = np.unique(self._group_of(source[order]), return_index=True)
        for group, rows in zip(groups, np.split(order, cuts[1:]), strict=True):
            self._vectors[rows] = self._group(group)[source[rows] - self._starts[group]]

    def _group(self, number: int) -> np.ndarray:
        entry, group = self._groups[number]
        try:
            return tables.vectors(entry.file.read_row_group(group, columns=["vector"]))
        except (OSError, pa.ArrowInvalid) as error:
            _remove(entry.folder)
            raise UserError(f"{entry.folder}: cannot be read ({_first(error)}); it is removed, run again") from None


def _entries(folder: Path, newest: str | None = None) -> Iterator[Entry]:
    """The whole entries in a folder, open, newest first, from the one named `newest` on; others are removed."""
    names = sorted((path.name for path in folder.iterdir()), reverse=True) if folder.is_dir() else []
    for name in names:
        if name.startswith(".") or (newest and name > newest):
            continue
        try:
            yield Entry.open(folder / name)
        except (OSError, ValueError) as error:
            if not (folder / name).exists():
                continue  # another job has just removed it
            if getattr(error, "errno", None) in (None, errno.ENOENT):
                log.warning("vector cache: %s is not whole and is removed (%s)", folder / name, _first(error))
                _remove(folder / name)
            else:  # no right to it, too many open files: nothing against the entry
                log.warning("vector cache: %s cannot be read (%s)", folder / name, _first(error))


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _digests(entry: Entry, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Of an entry's rows; none where another job has just removed it."""
    try:
        return entry.digests(start, stop)
    except FileNotFoundError:
        return np.empty((0, 2), np.uint64)


def _covered(entry: Entry, newer: Sequence[Entry]) -> bool:
    """Whether the others, the first of them in any part, hold all texts of an entry."""
    rest = _digests(entry)
    for other in newer:
        before = len(rest)
        rest = rest[~_is_in(rest, _digests(other))]
        if other is newer[0] and len(rest) == before:
            return False
        if not len(rest):
            return True
    return False


def _is_in(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [n]: which digests are among others, uint64 [., 2]; one of two with the same first half may be missed."""
    if not len(others):
        return np.zeros(len(some), bool)
    order = np.argsort(others[:, 0], kind="stable")
    at = order[np.minimum(np.searchsorted(others[order, 0], some[:, 0]), len(order) - 1)]
    return (others[at] == some).all(1)


def _link(table: Path, target: Path, copy: bool) -> bool:
    """Link a file, or copy it where the file system cannot link and `copy` is wanted; whether it is there now."""
    try:
        os.link(table, target)
    except OSError:
        if not copy:
            return False
        shutil.copyfile(table, target)
    return True


def _remove(entry: Path) -> None:
    """Take an entry out of sight at once, then delete it."""
    gone = entry.with_name(f".old-{entry.name}-{uuid4().hex[:8]}")
    with contextlib.suppress(OSError):  # another job was faster
        entry.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):  # others are left in it
        entry.parent.rmdir()


def _remove_unused(root: Path) -> None:
    """Remove what no result links and no job has used for a while, and what killed jobs left."""
    for path in sorted(root.glob("*/*")):
        with contextlib.suppress(OSError):
            left = path.name.startswith(".") or os.stat(path / VECTORS).st_nlink == 1
            if path.is_dir() and left and time.time() - path.stat().st_mtime > UNUSED:
                _remove(path)
