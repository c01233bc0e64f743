"""A few examples that tell how well a model does: rows {query, pos, neg}, or {input, output} for a language model.

Knows what a row must hold; nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retune.data import sources
from retune.data.rows import check
from retune.runtime import UserError

SHOWN = 10


@dataclass(frozen=True)
class Group:
    """A query with one positive and its negatives."""

    query: str
    prompt: str | None
    """The query's own instruction."""
    passages: list[str]
    """The positive, then the negatives."""
    positives: frozenset[str]
    """All positives of the query."""


@dataclass(frozen=True)
class Completion:
    """A text and what a language model should say to it."""

    input: str
    output: str


def read(path: Path) -> list[tuple[str, Any]]:
    """(`file:line`, value) of every row of a JSONL or Parquet file."""
    return [(f"{path}:{raw.line}", raw.value) for raw in sources.rows(path)]


def groups(rows: Iterable[tuple[str, Any]], negatives: int) -> list[Group]:
    """Rows {query, pos, neg} as groups: a query's first positive with its first `negatives` negatives.

    Args:
        rows: (where it stands, value).

    Raises:
        UserError: for rows that are not like this, all at once, or where there is none.
    """
    found, problems = [], []
    for source, value in rows:
        row, mistakes = check(value, scores=False)
        problems += [f"{source}: {mistake}" for mistake in mistakes]
        if row:
            passages = [row.pos[0], *row.neg[:negatives]]
            found.append(Group(row.query, row.prompt, passages, frozenset(row.pos)))
    _raise(problems, found, "{query, pos, neg}")
    return found


def completions(rows: Iterable[tuple[str, Any]]) -> list[Completion]:
    """Rows {input, output}.

    Raises:
        UserError: for rows that are not like this, all at once, or where there is none.
    """
    found, problems = [], []
    for source, value in rows:
        texts = value if isinstance(value, dict) else {}
        wrong = [name for name in ("input", "output") if not isinstance(texts.get(name), str) or not texts[name]]
        problems += [f"{source}: {name}: expected a string that is not empty" for name in wrong]
        if not wrong:
            found.append(Completion(texts["input"], texts["output"]))
    _raise(problems, found, "{input, output}")
    return found


def _raise(problems: Sequence[str], found: Sequence[object], form: str) -> None:
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError("\n".join([*problems[:SHOWN], *more]))
    if not found:
        raise UserError(f"examples: expected at least one row {form}, found none")
