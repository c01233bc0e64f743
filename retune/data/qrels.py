"""Judgments: which passages are relevant to a query, and how much.

Knows ids and grades; nothing of texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retune.data import sources
from retune.runtime import UserError

Judgments = dict[str, dict[str, int]]  # {query's id: {document's id: grade}}, in the file's order
GRADES = range(-128, 128)  # what int8 holds


def judgments(paths: Sequence[Path]) -> Judgments:
    """Judgments in a TSV (query, document, score; a header may be there) or TREC's form (query, 0, document, score).

    Raises:
        UserError: for a line of another form, or two grades for one pair.
    """
    found: Judgments = {}
    for path in paths:
        _read(path, found)
    if not found:
        raise UserError(f"{paths[0]}: no judgments")
    return found


def _read(path: Path, found: Judgments) -> None:
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


def _grade(field: str) -> int | None:
    try:
        value = float(field)
        return int(value) if value == int(value) else None
    except (ValueError, OverflowError):
        return None
