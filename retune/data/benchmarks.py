"""Readers of benchmarks: queries, documents and judgments → the tables texts, queries and pairs.

A reader streams the corpus: of 8.8 million documents it keeps 8 bytes each, and the ids of the
judged ones.  Documents are never dropped or put together, so that row numbers are the corpus's.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from retune.config import BenchmarkConfig
from retune.data import sources
from retune.data.bytext import read_by_text, read_flag
from retune.data.collection import SHOWN, Files, expect, identified, missing, same
from retune.data.qrels import Judgments, judgments
from retune.data.rows import body_start, check_document
from retune.data.store import Rows
from retune.runtime import UserError, log
from retune.tables import Writer


def _quoted(keys: Iterable[str]) -> list[str]:
    return [f'"{key}"' for key in keys]


def read_beir(settings: BenchmarkConfig, files: Files, name: str, table: Mapping[str, Writer]) -> None:
    """BEIR: queries.jsonl {_id, text}, corpus.jsonl {_id, title, text}, qrels/<split>.tsv; TREC's forms likewise."""
    first = {role: paths[0] for role, paths in files.items()}
    qrels = judgments(files["qrels"])
    judged = {document for grades in qrels.values() for document in grades}
    texts = Rows(table["texts"])
    row_of = _beir_corpus(files["corpus"], judged, texts)
    expect(texts.count, settings.n_passages, f"evaluate.benchmarks.{name}.n_passages", "passages", first["corpus"])
    missing(_quoted(sorted(judged - row_of.keys())), len(judged), "judged documents", first["corpus"])
    _tell_unmeetable(qrels, row_of, first["corpus"])
    # A judgment of a document that is not there cannot be met by any model.
    qrels = {query: {row_of[d]: g for d, g in grades.items() if d in row_of} for query, grades in qrels.items()}
    n_queries = _beir_queries(files["queries"], qrels, settings.split, name, table)
    if not n_queries:
        raise UserError(f"{first['qrels']}: no query of {first['queries']} has a positive judgment (a score above 0)")
    key = f"evaluate.benchmarks.{name}.n_queries"
    expect(n_queries, settings.n_queries, key, "queries with a positive judgment", first["queries"])


def _tell_unmeetable(qrels: Judgments, row_of: Mapping[str, int], corpus: Path) -> None:
    """Warn of queries none of whose positives the corpus holds: they are left out, which flatters every model.

    Raises:
        UserError: where that is so of all.
    """
    positives = {query: [d for d, grade in grades.items() if grade > 0] for query, grades in qrels.items()}
    asked = [query for query, documents in positives.items() if documents]
    lost = [query for query in asked if not any(document in row_of for document in positives[query])]
    if not lost:
        return
    if len(lost) == len(asked):
        total = sum(map(len, positives.values()))
        raise UserError(
            f"{corpus}: 0 of {total:,} positives are here, only documents judged 0: is it the qrels' corpus?"
        )
    named = ", ".join(_quoted(lost[:SHOWN])) + (", …" if len(lost) > SHOWN else "")
    log.warning("%s: %s of %s queries are left out, as no positive of theirs is here: %s", corpus, f"{len(lost):,}",
                f"{len(asked):,}", named)  # fmt: skip


def _beir_queries(
    paths: Sequence[Path], qrels: Mapping[str, Mapping[int, int]], split: str, name: str, table: Mapping[str, Writer]
) -> int:
    """Write the queries that have a positive judgment, and all their judgments; returns how many they are.

    Args:
        qrels: {query's id: {document's row: grade}}.
    """
    queries, pairs, seen = Rows(table["queries"]), Rows(table["pairs"]), dict[str, tuple[Path, int]]()
    for path, raw, key in identified(paths):
        text = raw.value.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}:{raw.line}: text: expected a string that is not empty")
        if key in seen:
            raise UserError(f'{path}:{raw.line}: _id: "{key}" is already {same(seen[key], path)}')
        seen[key] = path, raw.line
        grades = qrels.get(key, {})
        if any(grade > 0 for grade in grades.values()):
            row = queries.count
            queries.add((row, name, text, key, None, None, True, None, split, f"{path}:{raw.line}"), len(text))
            for document, grade in grades.items():
                pairs.add((row, document, grade, "given", None, None))
    missing(_quoted(sorted(qrels.keys() - seen.keys())), len(qrels), "judged queries", paths[0])
    if left_out := len(seen) - queries.count:
        log.info("%s: %s of %s queries are left out: no positive judgment", name, f"{left_out:,}", f"{len(seen):,}")
    queries.flush()
    pairs.flush()
    return queries.count


def training_rows(folder: Path, split: str) -> Iterator[sources.Raw]:
    """A BEIR folder as training rows {query, pos, neg}: judged above 0 is positive, judged 0 negative.

    Only the judged documents are kept in memory; those without text are left out.  A row's line is
    that of its query.
    """
    files = {role: Path(path) for role, path in BenchmarkConfig(path=str(folder), split=split).files().items()}
    qrels = judgments([files["qrels"]])
    judged = {document for grades in qrels.values() for document in grades}
    texts: dict[str, str] = {}
    for _, raw, key in identified([files["corpus"]]):
        if key in judged:
            text, mistakes = check_document(raw.value)
            if text is None:
                raise UserError(f"{files['corpus']}:{raw.line}: {mistakes[0]}")
            if text.strip():
                texts[key] = text
    missing(_quoted(sorted(judged - texts.keys())), len(judged), "judged documents with a text", files["corpus"])
    for _, raw, key in identified([files["queries"]]):
        grades = qrels.get(key, {})
        known = [(texts[document], grade) for document, grade in grades.items() if document in texts]
        positives = list(dict.fromkeys(text for text, grade in known if grade > 0))
        if positives:
            negatives = dict.fromkeys(text for text, grade in known if grade <= 0 and text not in positives)
            yield raw._replace(value={"query": raw.value.get("text"), "pos": positives, "neg": list(negatives)})


FORMATS: dict[str, Callable[[BenchmarkConfig, Files, str, Mapping[str, Writer]], None]] = {
    "beir": read_beir,
    "flag": read_flag,
    "msmarco": read_by_text,
    "intel": read_by_text,
}


def _beir_corpus(paths: Sequence[Path], judged: set[str], texts: Rows) -> dict[str, int]:
    """Write the documents; returns the rows of the judged ones."""
    row_of: dict[str, int] = {}
    hashes = array("Q")
    for path, raw, key in identified(paths):
        text, mistakes = check_document(raw.value)
        if text is None:
            raise UserError(f"{path}:{raw.line}: {mistakes[0]}")
        hashes.append(_hash(key))
        row = texts.add((texts.count, text, key, body_start(raw.value, text)), len(text))
        if key in judged:
            row_of[key] = row
    texts.flush()
    if not texts.count:
        raise UserError(f"{paths[0]}: no documents")
    _no_twins(paths, np.array(hashes, dtype=np.uint64))
    return row_of


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _no_twins(paths: Sequence[Path], hashes: np.ndarray) -> None:
    """Ids whose hashes meet are compared themselves, in a second reading that is hardly ever needed."""
    ordered = np.sort(hashes)
    met = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not met:
        return
    first: dict[str, tuple[Path, int]] = {}
    for path, raw, key in identified(paths):
        if _hash(key) in met and first.setdefault(key, (path, raw.line)) != (path, raw.line):
            raise UserError(f'{path}:{raw.line}: _id: "{key}" is already {same(first[key], path)}')
