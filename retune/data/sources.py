"""Readers of the raw forms: JSONL (plain, .gz, .zst) and Parquet, row by row with their line numbers.

Memory is bounded by a chunk of a file, never by the file.  What a row must hold is no matter of
this module: a line that cannot be read comes back as `Unreadable`, for the caller to judge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from retune.data.files import is_parquet
from retune.runtime import UserError

CODECS = {".gz": "gzip", ".zst": "zstd"}
CHUNK = 1 << 20  # bytes
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how a file begins that is in it
ARRAY = re.compile(rb"\s*\[\s*(\{|$)")  # how a file begins that is one list of objects

OnRead = Callable[[int], object]  # told how many bytes of the file were read since the last call


class Unreadable(NamedTuple):
    """In place of a row's value: why the line is no JSON."""

    reason: str


class Raw(NamedTuple):
    """A row as it stands in a file."""

    line: int  # from 1; the row number in a Parquet file
    value: Any  # whatever JSON holds, or `Unreadable`
    raw: bytes | None  # the line; None where the file has no lines

    def text(self) -> str:
        """The row as one line of text, as it was or as JSON."""
        if self.raw is not None:
            return self.raw.decode(errors="replace").strip()
        return json.dumps(self.value, ensure_ascii=False, default=str)


def rows(path: Path, on_read: OnRead | None = None) -> Iterator[Raw]:
    """The rows of a JSONL or Parquet file, blank lines left out.

    Raises:
        UserError: for a file that is missing, truncated or of another form.
    """
    return _parquet_rows(path, on_read) if is_parquet(path) else _json_rows(path, on_read)


def lines(path: Path, on_read: OnRead | None = None) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end) of a text file, decompressed by its suffix.

    Raises:
        UserError: for a file that is missing or cannot be decompressed.
    """
    number = 0
    kept: list[bytes] = []  # pieces of a line that has not ended
    for chunk in _chunks(path, on_read):
        first, *rest = chunk.split(b"\n")
        kept.append(first)
        if not rest:
            continue
        number += 1
        yield number, b"".join(kept)
        for line in rest[:-1]:
            number += 1
            yield number, line
        kept = [rest[-1]]
    if last := b"".join(kept):
        yield number + 1, last


def _chunks(path: Path, on_read: OnRead | None) -> Iterator[bytes]:
    codec = CODECS.get(path.suffix)
    try:
        with pa.OSFile(str(path), "rb") as file:
            stream = pa.CompressedInputStream(file, codec) if codec else file
            at = 0
            while chunk := stream.read(CHUNK):
                yield chunk
                if on_read:
                    on_read(file.tell() - at)
                    at = file.tell()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        if error.errno or not codec:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        raise UserError(f"{path}: not a whole {codec} file ({error})") from None


def _json_rows(path: Path, on_read: OnRead | None) -> Iterator[Raw]:
    loads, bad = orjson.loads, orjson.JSONDecodeError
    for number, line in lines(path, on_read):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
            if line.startswith(UTF16):
                raise UserError(f"{path}: UTF-16; expected UTF-8, as `iconv -f UTF-16 -t UTF-8` makes of it")
            if ARRAY.match(line):
                raise UserError(f"{path}: one JSON array; expected one object a line, as `jq -c '.[]'` makes of it")
        try:
            yield Raw(number, loads(line), line)
        except bad as error:
            if line.strip():
                yield Raw(number, _second_reading(line, error), line)


def _second_reading(line: bytes, error: orjson.JSONDecodeError) -> Any:
    """What Python's own parser makes of a line: it takes NaN, Infinity and huge numbers, which scores may hold."""
    try:
        text = line.decode()
    except UnicodeDecodeError as found:
        return Unreadable(f"not UTF-8 (byte {found.start + 1} of the line)")
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        return Unreadable("holds half a surrogate pair (\\ud800 to \\udfff), which is no character")
    except (ValueError, RecursionError):
        return Unreadable(f"{re.sub(r': line 1 column .*', '', str(error))} (character {error.colno})")


def _parquet_rows(path: Path, on_read: OnRead | None) -> Iterator[Raw]:
    try:
        with pq.ParquetFile(path) as file:
            size, total, number = path.stat().st_size, max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Raw(number, value, None)
                if on_read:
                    on_read(size * batch.num_rows // total)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file ({error})") from None
