"""Readers of benchmarks: queries, documents and judgments → the tables texts, queries and pairs.

A reader streams the corpus: of 8.8 million documents it keeps 8 bytes each, and the ids of the
judged ones.  Documents are never dropped or put together, so that row numbers are the corpus's.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retune.config import BenchmarkConfig
from retune.data import sources
from retune.data.mistakes import BadRows
from retune.data.rows import check, check_document
from retune.data.store import Pairs, Rows, Texts
from retune.runtime import UserError, log, progress
from retune.tables import Writer

Judgments = dict[str, dict[str, int]]  # {query's id: {document's id: grade}}, in the file's order
GRADES = range(-128, 128)  # what int8 holds


def read_beir(settings: BenchmarkConfig, name: str, table: Mapping[str, Writer]) -> None:
    """BEIR: queries.jsonl {_id, text}, corpus.jsonl {_id, title, text}, qrels/<split>.tsv."""
    files = {role: Path(path) for role, path in settings.files().items()}
    qrels = judgments(files["qrels"])
    judged = {document for grades in qrels.values() for document in grades}
    row_of = _beir_corpus(files["corpus"], judged, Rows(table["texts"]))
    _missing(sorted(judged - row_of.keys()), len(judged), "judged documents", files["corpus"])
    # A judgment of a document that is not there cannot be met by any model.
    qrels = {query: {d: g for d, g in grades.items() if d in row_of} for query, grades in qrels.items()}

    queries, pairs, seen = Rows(table["queries"]), Rows(table["pairs"]), dict[str, int]()
    for raw, key in _identified(files["queries"]):
        text = raw.value.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{files['queries']}:{raw.line}: text: expected a string that is not empty")
        if key in seen:
            raise UserError(f'{files["queries"]}:{raw.line}: _id: "{key}" is already on line {seen[key]}')
        seen[key] = raw.line
        grades = qrels.get(key, {})
        if any(grade > 0 for grade in grades.values()):
            row = queries.count
            source = f"{files['queries']}:{raw.line}"
            queries.add((row, name, text, key, None, None, True, None, settings.split, source), len(text))
            for document, grade in grades.items():
                pairs.add((row, row_of[document], grade, "given", None, None))
    _missing(sorted(qrels.keys() - seen.keys()), len(qrels), "judged queries", files["queries"])
    if not queries.count:
        raise UserError(f"{files['qrels']}: no query of {files['queries']} has a positive judgment (a score above 0)")
    if left_out := len(seen) - queries.count:
        log.info("%s: %s of %s queries are left out: no positive judgment", name, f"{left_out:,}", f"{len(seen):,}")
    queries.flush()
    pairs.flush()


def training_rows(folder: Path, split: str) -> Iterator[sources.Raw]:
    """A BEIR folder as training rows {query, pos, neg}: judged above 0 is positive, judged 0 negative.

    Only the judged documents are kept in memory; those without text are left out.  A row's line is
    that of its query.
    """
    files = {role: Path(path) for role, path in BenchmarkConfig(path=str(folder), split=split).files().items()}
    qrels = judgments(files["qrels"])
    judged = {document for grades in qrels.values() for document in grades}
    texts: dict[str, str] = {}
    for raw, key in _identified(files["corpus"]):
        if key in judged:
            text, mistakes = check_document(raw.value)
            if text is None:
                raise UserError(f"{files['corpus']}:{raw.line}: {mistakes[0]}")
            if text.strip():
                texts[key] = text
    _missing(sorted(judged - texts.keys()), len(judged), "judged documents with a text", files["corpus"])
    for raw, key in _identified(files["queries"]):
        grades = qrels.get(key, {})
        known = [(texts[document], grade) for document, grade in grades.items() if document in texts]
        positives = list(dict.fromkeys(text for text, grade in known if grade > 0))
        if positives:
            negatives = dict.fromkeys(text for text, grade in known if grade <= 0 and text not in positives)
            yield raw._replace(value={"query": raw.value.get("text"), "pos": positives, "neg": list(negatives)})


def read_flag(settings: BenchmarkConfig, name: str, table: Mapping[str, Writer]) -> None:
    """FlagEmbedding's rows {query, pos, neg}; the corpus is the given one and all pos and neg, each text once."""
    files = {role: Path(path) for role, path in settings.files().items()}
    texts, queries, pairs = Texts(table["texts"], keyed=True), Rows(table["queries"]), Pairs(table["pairs"])
    bad = BadRows()
    if "corpus" in files:
        for raw in _watched(files["corpus"]):
            text, mistakes = check_document(raw.value)
            if text is None:
                bad.add(name, files["corpus"], raw, mistakes)
                continue
            texts.ids_of([text])
    for raw in _watched(files["queries"]):
        row, mistakes = check(raw.value, relations=False)
        if row is None:
            bad.add(name, files["queries"], raw, mistakes)
            continue
        query, source = queries.count, f"{files['queries']}:{raw.line}"
        values = (query, name, row.query, str(query), None, row.type, True, None, settings.split, source)
        queries.add(values, len(row.query))
        pairs.add(query, texts.ids_of(row.pos), texts.ids_of(row.neg))
    bad.raise_or_log()
    if not queries.count:
        raise UserError(f"{files['queries']}: no rows")
    for rows in (texts, queries, pairs):
        rows.flush()


FORMATS: dict[str, Callable[[BenchmarkConfig, str, Mapping[str, Writer]], None]] = {
    "beir": read_beir,
    "flag": read_flag,
}


def judgments(path: Path) -> Judgments:
    """Judgments in a TSV (query, document, score; a header may be there) or TREC's form (query, 0, document, score).

    Raises:
        UserError: for a line of another form, or two grades for one pair.
    """
    found: Judgments = {}
    for number, line in sources.lines(path):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace").strip("\r\n")
        if not text.strip():
            continue
        fields = text.split("\t") if text.count("\t") in (2, 3) else text.split()
        grade = _grade(fields[-1])
        if number == 1 and grade is None:
            continue  # the header
        if len(fields) not in (3, 4):
            raise UserError(f"{path}:{number}: expected query, document and score, found {len(fields)} columns")
        if grade not in GRADES:
            raise UserError(f'{path}:{number}: score: expected a whole number up to 127, found "{fields[-1]}"')
        query, document = fields[0], fields[-2]
        if found.setdefault(query, {}).setdefault(document, grade) != grade:
            known = found[query][document]
            raise UserError(f'{path}:{number}: "{document}" for query "{query}" is graded {grade} here, {known} before')
    if not found:
        raise UserError(f"{path}: no judgments")
    return found


def _grade(field: str) -> int | None:
    try:
        value = float(field)
        return int(value) if value == int(value) else None
    except (ValueError, OverflowError):
        return None


def _watched(path: Path) -> Iterator[sources.Raw]:
    """The rows of a file, with a progress bar."""
    size = path.stat().st_size if path.exists() else None
    with progress(size, path.name, "B") as bar:
        yield from sources.rows(path, bar.update)


def _identified(path: Path) -> Iterator[tuple[sources.Raw, str]]:
    """The rows of a JSONL of objects with an `_id`; numbers are ids too, written as text."""
    for raw in _watched(path):
        key: Any = raw.value.get("_id") if isinstance(raw.value, dict) else None
        if isinstance(key, int) and not isinstance(key, bool):
            key = str(key)
        if not isinstance(key, str) or not key:
            mistakes = check_document(raw.value)[1] if not isinstance(raw.value, dict) else []
            raise UserError(f"{path}:{raw.line}: {mistakes[0] if mistakes else '_id: expected a string'}")
        yield raw, key


def _beir_corpus(path: Path, judged: set[str], texts: Rows) -> dict[str, int]:
    """Write the documents; returns the rows of the judged ones."""
    row_of: dict[str, int] = {}
    hashes = array("Q")
    for raw, key in _identified(path):
        text, mistakes = check_document(raw.value)
        if text is None:
            raise UserError(f"{path}:{raw.line}: {mistakes[0]}")
        hashes.append(_hash(key))
        row = texts.add((texts.count, text, key), len(text))
        if key in judged:
            row_of[key] = row
    texts.flush()
    if not texts.count:
        raise UserError(f"{path}: no documents")
    _no_twins(path, np.array(hashes, dtype=np.uint64))
    return row_of


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _no_twins(path: Path, hashes: np.ndarray) -> None:
    """Ids whose hashes meet are compared themselves, in a second reading that is hardly ever needed."""
    ordered = np.sort(hashes)
    met = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not met:
        return
    first: dict[str, int] = {}
    for raw, key in _identified(path):
        if _hash(key) in met and first.setdefault(key, raw.line) != raw.line:
            raise UserError(f'{path}:{raw.line}: _id: "{key}" is already on line {first[key]}')


def _missing(keys: Sequence[str], total: int, what: str, path: Path) -> None:
    if not keys:
        return
    named = ", ".join(f'"{key}"' for key in keys[:10]) + (", …" if len(keys) > 10 else "")
    message = f"{path}: {len(keys):,} of {total:,} {what} are not here: {named}"
    if len(keys) == total:
        raise UserError(message)
    log.warning(message)
