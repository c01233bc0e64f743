"""From plain rows to tables and back: which row is which query.

Rows are read twice, once into the tables and once on the way out, so that what is kept of them in
between is a table on disk and not the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl

from retune import tables
from retune.commands.flags import Flag, Given, from_section
from retune.commands.work import Work, identity
from retune.config import IngestConfig
from retune.data import jsonl, sources
from retune.data.rows import check_document
from retune.data.sources import Raw
from retune.data.text import digests
from retune.runtime import UserError, log
from retune.stages.ingest import HINT, ingest

TABLES = ("texts", "queries", "pairs", "rejected")
ON_BAD_ROW = from_section(
    "ingest", IngestConfig, "files",
    {"on_bad_row": {"help": "`skip`: leave bad rows out, and list them with the reason in a file beside the output."}},
    leave=set(IngestConfig.model_fields) - {"on_bad_row"},
)  # fmt: skip


def input_flag(names: tuple[str, ...] = ("input_file",), **more: Any) -> Flag:
    """The flag of the rows {query, pos, neg, …}."""
    about = "JSONL of rows {query, pos, neg, …} (plain, .gz, .zst) or Parquet: files, folders or globs."
    return Flag(names, about, "ingest.train", **({"kind": "list", "required": True} | more))


def into_tables(
    given: Given, work: Work, files: Sequence[Path], pool: Sequence[Path], rejected: Path, prompts: bool = True,
    scores: bool = True, datasets: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> dict[str, Path]:  # fmt: skip
    """The tables of rows and of more passages: query i is the i-th good row, also where it is like another.

    Args:
        pool: files of rows {"text"}.
        rejected: where bad rows are listed, with `--on_bad_row skip`.
        prompts: whether a row's `prompt` is its query's instruction.
        scores: whether teacher scores are read; else a row may hold any.
        datasets: what the section `ingest` says of `files`, as its key `train`; one dataset where not given.
        seed: of the choice of queries that are set aside.
    """
    found = {name: work.path(f"ingest/{name}.parquet") for name in TABLES}
    settings = given.section(
        "ingest", IngestConfig, train=datasets or {"input": {"path": [str(path) for path in files]}},
        corpus=[str(path) for path in pool],
    )  # fmt: skip
    of = {"settings": settings.model_dump(mode="json"), "files": identity([*files, *pool]), "prompts": prompts}
    of |= {"scores": scores, "seed": seed if settings.dev_fraction else 0}

    def read() -> None:
        try:
            ingest(settings, found, seed=seed, keep_duplicates=True, scores=scores)
        except UserError as error:
            hint = f"`--on_bad_row skip` goes on without such rows and lists them in {rejected}"
            raise UserError(str(error).replace(HINT, hint)) from None
        if not prompts:
            table = tables.read(found["queries"], "queries")
            without = pl.from_arrow(table).with_columns(prompt=pl.lit(None, pl.String))
            tables.write(found["queries"], "queries", without.to_arrow())

    work.step("ingest", "ingest", list(found.values()), of, read)
    if work.leads:
        _list_rejected(found["rejected"], rejected)
    return found


def _list_rejected(table: Path, out: Path) -> None:
    """Write rejected rows as JSON lines {source, reason, row}; no file where there are none."""
    found = tables.read(table, "rejected", ["source", "reason", "row"]).to_pylist()
    if found:
        with jsonl.writer(out) as write:
            for row in found:
                write(orjson.dumps(row))
        log.info("%s rows are left out, see %s", f"{len(found):,}", out)


def numbered(files: Sequence[Path], queries: Path) -> Iterator[tuple[int, Path, Raw]]:
    """(query id, file, row) of the good rows of `files`, in their order.

    Raises:
        UserError: where the files are no longer those which the table `queries` was made from.
    """
    names = (name for batch in tables.batches(queries, "queries", ["source"]) for name in batch["source"].to_pylist())
    wanted, query = next(names, None), 0
    for path in files:
        for raw in sources.rows(path):
            if f"{path}:{raw.line}" == wanted:
                yield query, path, raw
                wanted, query = next(names, None), query + 1
    if wanted is not None:
        raise UserError(f"{wanted}: the row is not there any more: the input changed during the run; run again")


def in_pool(texts: Path, pool: Sequence[Path]) -> np.ndarray:
    """Which texts of the table stand in the files of the pool: bool [T]."""
    parts = []
    for path in pool:
        found = (check_document(raw.value)[0] for raw in sources.rows(path))
        parts += [_codes([text for text in block if text is not None]) for block in _blocks(found)]
    known = np.unique(np.concatenate(parts))
    batches = tables.batches(texts, "texts", ["text"])
    return np.concatenate([np.isin(_codes(batch["text"].to_pylist()), known) for batch in batches])


def _blocks(values: Iterator[str | None], size: int = 65536) -> Iterator[list[str | None]]:
    while block := [value for _, value in zip(range(size), values, strict=False)]:
        yield block


def _codes(texts: list[str]) -> np.ndarray:
    """8 bytes of each text's digest: int64 [n]."""
    return np.frombuffer(b"".join(digest[:8] for digest in digests(texts)), np.int64)
