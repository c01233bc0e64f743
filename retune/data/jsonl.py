"""JSONL out: whole files or nothing, and rows that stay as they came but for the columns that change.

A row's other columns are copied as they are spelled, so that no number is rounded and no character
is written in another way.  Knows nothing of what columns mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import orjson
import pyarrow as pa

from retune.data.sources import CODECS, Raw
from retune.runtime import atomic

BUFFER = 1 << 20  # bytes
# Only where a value ends is wanted; numbers are not made, so that none is too long.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
_OPEN, _COLON, _COMMA = (re.compile(rf"[ \t\n\r]*{mark}[ \t\n\r]*") for mark in (r"\{", ":", ",?"))


@contextmanager
def writer(path: Path) -> Iterator[Callable[[bytes], object]]:
    """A function that appends a line (without its end) to a file, compressed by its suffix (.gz, .zst).

    The file appears at `path`, whole, when the block ends well.
    """
    codec = CODECS.get(path.suffix)
    with atomic(path) as part, pa.OSFile(str(part), "wb") as file, ExitStack() as stack:
        packed = stack.enter_context(pa.CompressedOutputStream(file, codec)) if codec else file
        stream = stack.enter_context(pa.BufferedOutputStream(packed, BUFFER))
        yield lambda line: stream.write(line + b"\n")


def line(raw: Raw) -> bytes:
    """A row as one line of JSON: as it stands in its file, where it is a file of lines."""
    return raw.raw if raw.raw is not None else raw.text().encode()


def texts(values: Iterable[str]) -> str:
    """A list of strings as JSON."""
    return "[" + ", ".join(orjson.dumps(value).decode() for value in values) + "]"


def columns(row: str) -> list[tuple[str, str, str]]:
    """(name, name as it is spelled, value as it is spelled) of each column of a row, in order.

    Args:
        row: a valid JSON object.
    """
    found, read, at = [], _DECODER.raw_decode, _OPEN.match(row).end()
    while row[at] != "}":
        name, end = read(row, at)
        start = _COLON.match(row, end).end()
        _, stop = read(row, start)
        found.append((name, row[at:end], row[start:stop]))
        at = _COMMA.match(row, stop).end()
    return found


def with_columns(row: str, new: Mapping[str, str | None]) -> str:
    """A row with the values of `new` (JSON) in place of its own, or at the end; None leaves a column out."""
    left, parts = dict(new), []
    for name, spelled, value in columns(row):
        if name in new:
            value = left.pop(name, None)  # a column that is there twice is written once
        if value is not None:
            parts.append(f"{spelled}: {value}")
    parts += [f"{json.dumps(name)}: {value}" for name, value in left.items() if value is not None]
    return "{" + ", ".join(parts) + "}"
