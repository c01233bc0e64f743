"""What a training row {query, pos, neg, …} must hold, and what is said of one that does not.

Knows nothing of files and tables: a parsed JSON value goes in, a `Row` or its mistakes come out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from retune.data.sources import Unreadable
from retune.data.text import shown

SHOWN = 8  # names of columns in a message
FLOAT32_MAX = 3.4028234663852886e38
KINDS = {str: "a string", list: "a list", dict: "an object", bool: "a truth value", int: "a number", float: "a number"}


class Mistake(NamedTuple):
    """`column: rule, detail`; rows with the same column and rule have the same kind of mistake."""

    column: str
    rule: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.column}: {self.rule}{self.detail and ', ' + self.detail}"

    @property
    def kind(self) -> str:
        return f"{self.column}: {self.rule}"


@dataclass(slots=True)
class Row:
    """A checked row: texts untouched, each at most once in `pos` and once in `neg`, scores finite."""

    query: str
    pos: list[str]
    neg: list[str]
    pos_scores: list[float] | None
    neg_scores: list[float] | None
    prompt: str | None
    type: str | None
    category: str | None = None


def check(value: Any, relations: bool = True, scores: bool = True) -> tuple[Row | None, list[Mistake]]:
    """The row in a JSON value, or all its mistakes.

    Args:
        relations: whether a positive that equals the query is a mistake, as it is in training data.
        scores: whether its scores count; else they may be anything.
    """
    if not isinstance(value, dict):
        return None, [_no_object(value)]
    mistakes: list[Mistake] = []
    query = _text(value, "query", mistakes)
    pos = _texts(value, "pos", mistakes)
    neg = _texts(value, "neg", mistakes) if value.get("neg") is not None else []
    pos_scores, neg_scores = _both_scores(value, pos, neg, mistakes) if scores else (None, None)
    prompt, kind = _optional(value, "prompt", mistakes), _optional(value, "type", mistakes)
    if not mistakes:
        if not pos:
            mistakes.append(Mistake("pos", "expected at least one positive", "found an empty list"))
        if both := set(pos).intersection(neg):
            first = next(text for text in neg if text in both)
            mistakes.append(Mistake("neg", "a positive of the row is also given as negative", shown(first)))
        if relations and query in pos:
            mistakes.append(Mistake("pos", "a positive equals the query", shown(query)))
    if mistakes:
        return None, mistakes
    pos, pos_scores = _distinct(pos, pos_scores)
    neg, neg_scores = _distinct(neg, neg_scores)
    category = value.get("category")
    named = category if isinstance(category, str) else None  # others' columns may be called so
    return Row(query, pos, neg, pos_scores, neg_scores, prompt, kind, named), []


def check_document(value: Any) -> tuple[str | None, list[Mistake]]:
    """The passage in a corpus row {"text"[, "title"]}, the title in front (BEIR's form), or the row's mistakes.

    A passage may be empty: whether that is a mistake depends on what it is for.
    """
    if not isinstance(value, dict):
        return None, [_no_object(value)]
    text, title = value.get("text"), value.get("title")
    mistakes: list[Mistake] = []
    if not isinstance(text, str):
        found = f"found {_kind(text)}" if "text" in value else _missing(value)
        mistakes.append(Mistake("text", "expected a string", found))
    if title is not None and not isinstance(title, str):
        mistakes.append(Mistake("title", "expected a string", f"found {_kind(title)}"))
    if mistakes:
        return None, mistakes
    return (f"{title} {text}".strip() if title else text), []


def body_start(value: dict, passage: str) -> int | None:
    """Where the text begins in the passage that `check_document` makes of a row; None without a title or a text."""
    text = value["text"].rstrip()
    return len(passage) - len(text) if value.get("title") and text else None


def _no_object(value: Any) -> Mistake:
    if isinstance(value, Unreadable):
        return Mistake("row", "invalid JSON", value.reason)
    return Mistake("row", "expected one JSON object a line", f"found {_kind(value)}")


def _kind(value: Any) -> str:
    return "null" if value is None else KINDS.get(type(value), f"a {type(value).__name__}")


def columns_of(value: dict) -> str:
    """The names of a row's columns, for the message that one is missing: it may only have another name."""
    names = [f"`{name}`" for name in list(value)[:SHOWN]] + (["…"] if len(value) > SHOWN else [])
    return ", ".join(names) or "none"


def _missing(value: dict) -> str:
    return f"the column is missing, found {columns_of(value)}"


def _text(value: dict, column: str, mistakes: list[Mistake]) -> str:
    text = value.get(column)
    if type(text) is str:
        if not text or text.isspace():
            mistakes.append(Mistake(column, "empty string"))
        return text
    found = f"found {_kind(text)}" if column in value else _missing(value)
    mistakes.append(Mistake(column, "expected a string", found))
    return ""


def _texts(value: dict, column: str, mistakes: list[Mistake]) -> list[str]:
    texts = value.get(column)
    if type(texts) is not list:
        found = f"found {_kind(texts)}" if column in value else _missing(value)
        mistakes.append(Mistake(column, "expected a list of strings", found))
        return []
    for place, text in enumerate(texts, 1):
        if type(text) is not str:
            mistakes.append(Mistake(column, "expected a list of strings", f"found {_kind(text)} at place {place}"))
            return []
        if not text or text.isspace():
            mistakes.append(Mistake(column, "empty string", f"at place {place} of {len(texts)}"))
            return []
    return texts


def _optional(value: dict, column: str, mistakes: list[Mistake]) -> str | None:
    text = value.get(column)
    if text is not None and type(text) is not str:
        mistakes.append(Mistake(column, "expected a string", f"found {_kind(text)}"))
    return text


def _both_scores(value: dict, pos: list[str], neg: list[str], mistakes: list[Mistake]) -> tuple:
    """Scores of positives and negatives: both lists or neither; no negatives need no list of theirs."""
    if value.get("pos_scores") is None and value.get("neg_scores") is None:
        return None, None
    known_lengths = not mistakes
    scores = []
    for column, other, texts in (("pos_scores", "neg_scores", pos), ("neg_scores", "pos_scores", neg)):
        found = value.get(column)
        if found is None and not texts:
            found = []
        if found is None:
            mistakes.append(Mistake(column, f"expected scores, as the row has {other}"))
        elif wrong := _no_numbers(found):
            mistakes.append(Mistake(column, "expected a list of numbers", f"found {wrong}"))
        elif known_lengths and len(found) != len(texts):
            mistakes.append(Mistake(column, "expected one score a text", f"found {len(found)} for {len(texts)}"))
        elif bad := [score for score in found if not -FLOAT32_MAX <= score <= FLOAT32_MAX]:
            mistakes.append(Mistake(column, "expected finite numbers", f"found {bad[0]}"))
        else:
            scores.append([float(score) for score in found])  # Arrow takes no large whole number as a float32
    return tuple(scores) if len(scores) == 2 else (None, None)


def _no_numbers(value: Any) -> str | None:
    if type(value) is not list:
        return _kind(value)
    return next((_kind(score) for score in value if type(score) not in (int, float)), None)


def _distinct(texts: list[str], scores: list[float] | None) -> tuple[list[str], list[float] | None]:
    """The first of each text, with its score."""
    if len(texts) < 2 or len(set(texts)) == len(texts):
        return texts, scores
    if scores is None:
        return list(dict.fromkeys(texts)), None
    first: dict[str, float] = {}
    for text, score in zip(texts, scores, strict=True):
        first.setdefault(text, score)
    return list(first), list(first.values())
