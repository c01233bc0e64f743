"""Benchmarks whose judgments are texts: a query's positives are passages, word for word.

FlagEmbedding's rows {query, pos, neg} bring their passages along.  Its eval_msmarco's rows {query, positive}
and Intel's {query, pos} are looked up in a corpus, which is streamed: of 8.8 million passages nothing is kept
but the rows of the judged ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retune.config import BenchmarkConfig
from retune.data.collection import Files, expect, missing, watched
from retune.data.mistakes import BadRows
from retune.data.rows import Mistake, check, check_document, columns_of
from retune.data.sources import Raw
from retune.data.store import Pairs, Rows, Texts
from retune.data.text import digest
from retune.runtime import UserError, log
from retune.tables import Writer


class Columns(NamedTuple):
    """Names of the columns of a form; the first one that a row has counts."""

    passage: tuple[str, ...]
    positives: tuple[str, ...]


COLUMNS = {
    "msmarco": Columns(("content", "text"), ("positive", "pos")),
    "intel": Columns(("context",), ("pos",)),
}


def read_flag(settings: BenchmarkConfig, files: Files, name: str, table: Mapping[str, Writer]) -> None:
    """FlagEmbedding's rows {query, pos, neg}; the corpus is the given one and all pos and neg, each text once."""
    texts, queries, pairs = Texts(table["texts"], keyed=True), Rows(table["queries"]), Pairs(table["pairs"])
    bad = BadRows()
    for path, raw in watched(files["corpus"]) if "corpus" in files else ():
        text, mistakes = check_document(raw.value)
        if text is None:
            bad.add(name, path, raw, mistakes)
            continue
        texts.ids_of([text])
    for path, raw in watched(files["queries"]):
        row, mistakes = check(raw.value, relations=False)
        if row is None:
            bad.add(name, path, raw, mistakes)
            continue
        query = queries.count
        values = (query, name, row.query, str(query), None, row.type, True, None, settings.split, f"{path}:{raw.line}")
        queries.add(values, len(row.query))
        pairs.add(query, texts.ids_of(row.pos), texts.ids_of(row.neg))
    bad.raise_or_log()
    if not queries.count:
        raise UserError(f"{files['queries'][0]}: no rows")
    key = f"evaluate.benchmarks.{name}"
    expect(texts.count, settings.n_passages, f"{key}.n_passages", "distinct passages", files["queries"][0])
    expect(queries.count, settings.n_queries, f"{key}.n_queries", "queries", files["queries"][0])
    for rows in (texts, queries, pairs):
        rows.flush()


def read_by_text(settings: BenchmarkConfig, files: Files, name: str, table: Mapping[str, Writer]) -> None:
    """Rows {query, positive} and passages {content}, or what `COLUMNS` says of the format.

    A copy of a judged passage is left out, since both are the same answer; other passages stay as they are,
    so that a passage's `key` is its place in the corpus, from 0.
    """
    columns, bad = COLUMNS[settings.format], BadRows()
    asked = _questions(files["queries"], columns, name, bad)
    row_of = dict.fromkeys((key for one in asked for key in one.positives), -1)
    n_passages = _write_corpus(files["corpus"], columns, name, bad, row_of, Rows(table["texts"]))
    bad.raise_or_log()
    key = f"evaluate.benchmarks.{name}"
    expect(n_passages, settings.n_passages, f"{key}.n_passages", "passages", files["corpus"][0])
    _tell_missing(asked, row_of, files["corpus"][0])
    queries, pairs = Rows(table["queries"]), Pairs(table["pairs"])
    for one in asked:
        positives = [row_of[key] for key in one.positives if row_of[key] >= 0]
        if positives:
            query = queries.count
            values = (query, name, one.text, str(query), None, None, True, None, settings.split, one.source)
            queries.add(values, len(one.text))
            pairs.add(query, positives, [])
    expect(queries.count, settings.n_queries, f"{key}.n_queries", "queries with a positive", files["queries"][0])
    queries.flush()
    pairs.flush()


class Question(NamedTuple):
    """A query, the digests of its positives, each once, and where it stands."""

    text: str
    positives: list[bytes]
    source: str


def _questions(paths: Sequence[Path], columns: Columns, name: str, bad: BadRows) -> list[Question]:
    found = []
    for path, raw in watched(paths):
        query, mistakes = _strings(raw, ("query",), single=True)
        positives, more = _strings(raw, columns.positives)
        mistakes += more if isinstance(raw.value, dict) else []
        if not mistakes and not positives:
            mistakes = [Mistake(columns.positives[0], "expected at least one positive", "found an empty list")]
        if mistakes:
            bad.add(name, path, raw, mistakes)
            continue
        keys = list(dict.fromkeys(map(digest, positives)))
        found.append(Question(query[0], keys, f"{path}:{raw.line}"))
    if not found and not bad.count:
        raise UserError(f"{paths[0]}: no rows")
    return found


def _write_corpus(
    paths: Sequence[Path], columns: Columns, name: str, bad: BadRows, row_of: dict[bytes, int], texts: Rows
) -> int:
    """Write the passages and note the rows of the judged ones in `row_of`; returns how many there are, copies too."""
    place = copies = 0
    for path, raw in watched(paths):
        passages, mistakes = _strings(raw, columns.passage)
        if mistakes:
            bad.add(name, path, raw, mistakes)
        for text in passages:
            key = digest(text)
            if row_of.get(key, -1) >= 0:
                copies += 1
            else:
                row = texts.add((texts.count, text, str(place)), len(text))
                if key in row_of:
                    row_of[key] = row
            place += 1
    if not place and not bad.count:
        raise UserError(f"{paths[0]}: no passages")
    texts.flush()
    if copies:
        log.info("%s: %s copies of judged passages are left out", name, f"{copies:,}")
    return place


def _tell_missing(asked: Sequence[Question], row_of: Mapping[bytes, int], corpus: Path) -> None:
    """Warn of positives that the corpus does not hold, naming the rows that have them."""
    places = [one.source for one in asked for key in one.positives if row_of[key] < 0]
    missing(list(dict.fromkeys(places)), sum(len(one.positives) for one in asked), "positives", corpus, len(places))
    lost = sum(all(row_of[key] < 0 for key in one.positives) for one in asked)
    if lost:
        log.warning("%s of %s queries are left out: no positive of theirs is there", f"{lost:,}", f"{len(asked):,}")


def _strings(raw: Raw, names: tuple[str, ...], single: bool = False) -> tuple[list[str], list[Mistake]]:
    """The strings of the first of these columns that a row has; a string alone stands for a list of one."""
    if not isinstance(raw.value, dict):
        return [], check_document(raw.value)[1]
    column = next((name for name in names if name in raw.value), None)
    if column is None:
        return [], [Mistake(names[0], "the column is missing", f"found {columns_of(raw.value)}")]
    value: Any = raw.value[column]
    if isinstance(value, str):
        value = [value]
    elif single or not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return [], [Mistake(column, "expected a string" if single else "expected a list of strings")]
    if single and not value[0].strip():
        return [], [Mistake(column, "empty string")]
    return value, []
