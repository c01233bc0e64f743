"""JSONL in, vectors out: one for each row, in the rows' order.

A row is a passage, {text} or BEIR's {_id, title, text}, or a query, {query} (or {text}, with --kind
query).  Vectors are those that the workflow makes, prompts included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from retune import tables
from retune.commands import arrays, models, vectors
from retune.commands.flags import Flag, Given
from retune.commands.work import WORK_DIR, Work, identity, input_files, output_file, work_folder
from retune.data import sources
from retune.data.mistakes import BadRows
from retune.data.rows import Mistake, check_document
from retune.data.sources import Raw
from retune.data.store import Rows
from retune.runtime import UserError, log

FORMS = (".parquet", ".npy")
KINDS = ("query", "passage")

FLAGS = [
    Flag(
        ("input_file",), "JSONL of rows {text}, {query} or {_id, title, text} (plain, .gz, .zst) or Parquet: files, "
        "folders or globs.", kind="list", required=True,
    ),
    Flag(
        ("output_file",), "Vectors: .parquet (columns id, the row's number from 0, and vector) or .npy (an array "
        "[rows, dimensions]).", required=True,
    ),
    Flag(("kind",), "Which of the model's prompts and lengths holds.", choices=KINDS,
         shown="query where the first row has `query` and no `text`, else passage"),
    WORK_DIR,
    *models.embedder_flags(),
    *vectors.embed_flags(heads=True),
    *models.hardware_flags(),
]  # fmt: skip


def run(given: Given) -> None:
    """Embed as the flags say.

    Raises:
        UserError: for a mistake in flags or rows; an earlier output is left as it was.
    """
    output = output_file(given, "output_file", FORMS)
    if output.suffix == ".npy" and set(given["heads"] or []) - {"dense"}:
        raise given.mistake("heads", "an array holds vectors alone; expected an --output_file that ends in .parquet")
    files = input_files(given, "input_file", output)
    devices = models.prepare(given)
    embedder = models.embedder(given)
    models.fetch(embedder.model, embedder.revision)
    kind = given["kind"] or _kind(files)
    with work_folder(given, output) as work:
        table = _into_table(work, files, kind)
        found, _ = vectors.embed_table(given, work, table, kind, embedder, devices, ["rows"])
        shape, dtype = arrays.write(found, output)
    log.info("%s: %s vectors of %d dimensions, %s, kind %s", output, f"{shape[0]:,}", shape[1], dtype, kind)


def _kind(files: Sequence[Path]) -> str:
    first = next((raw.value for path in files for raw in sources.rows(path)), None)
    return "query" if isinstance(first, dict) and "query" in first and "text" not in first else "passage"


# ---- rows → a table -----------------------------------------------------------------------------


def _passage(value: Any) -> tuple[tuple | None, list[Mistake]]:
    """(text, key) of a row, or its mistakes."""
    text, mistakes = check_document(value)
    return (None, mistakes) if text is None else ((text, None), [])


def _query(value: Any) -> tuple[tuple | None, list[Mistake]]:
    """A row of the table `queries` but for its number and source, or the mistakes."""
    column = "text" if isinstance(value, dict) and "query" not in value and "text" in value else "query"
    text, mistakes = check_document({"text": value[column]} if isinstance(value, dict) and column in value else value)
    mistakes = [one._replace(column=column) if one.column == "text" else one for one in mistakes]
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if prompt is not None and not isinstance(prompt, str):
        mistakes.append(Mistake("prompt", "expected a string", f"found {prompt!r}"))
    return (None, mistakes) if mistakes else (("input", text, None, prompt, None, True, None, "test"), [])


READERS: dict[str, tuple[str, Callable[[Any], tuple[tuple | None, list[Mistake]]]]] = {
    "passage": ("texts", _passage),
    "query": ("queries", _query),
}


def _into_table(work: Work, files: Sequence[Path], kind: str) -> Path:
    """The table of texts or queries that holds the rows, one for each.

    Raises:
        UserError: for bad rows, all of them, or where there are none at all.
    """
    name, check = READERS[kind]
    out = work.path(f"rows/{name}.parquet")

    def read() -> None:
        bad = BadRows()
        with tables.writer(out, name) as writer:
            rows = Rows(writer)
            for path, raw in _rows(files):
                values, mistakes = check(raw.value)
                if values is None:
                    bad.add("input", path, raw, mistakes)
                else:
                    source = (f"{path}:{raw.line}",) if kind == "query" else ()
                    rows.add((rows.count, *values, *source), len(values[0]))
            rows.flush()
            bad.raise_or_log()
            if not rows.count:
                raise UserError(f"{files[0]}: no rows")

    work.step("rows", "ingest", [out], {"files": identity(files), "kind": kind}, read)
    return out


def _rows(files: Sequence[Path]) -> Iterator[tuple[Path, Raw]]:
    for path in files:
        for raw in sources.rows(path):
            yield path, raw
