"""Manuals of installed software, cut at their headings: prose that every Python machine has, and no docstrings.

What retune installs comes with long descriptions (the projects' READMEs), and Python with its language
reference (the texts behind `help("for")`).  A heading names what its section tells: a query and its relevant
passages, both written for people.  Knows nothing of training or of benchmarks' files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

from retune.data.docstrings import installed_packages, letters, normalised, plain

PASSAGE_WORDS = (8, 32)
PER_SECTION = 6  # passages at most, the first ones: else a few long sections would be the whole collection
REFERENCE = "Python"  # the name of the language reference


class Document(NamedTuple):
    """A text with headings, and what it is in one line, which stands for the heading that its beginning lacks."""

    name: str
    summary: str
    text: str


class Passages(NamedTuple):
    """What stands under a heading of a document, in passages of whole sentences."""

    document: str
    heading: str
    passages: list[str]


def manuals() -> list[Document]:
    """The long descriptions of the distributions that retune needs, and Python's language reference."""
    found = []
    for name in installed_packages():
        try:
            fields = metadata.distribution(name).metadata
        except metadata.PackageNotFoundError:
            continue
        found.append(Document(name, fields.get("Summary") or "", fields.get("Description") or ""))
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems leave it out
        return found
    return found + [Document(REFERENCE, "", topics[name]) for name in sorted(topics)]


PICTURE = re.compile(r"!\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])?")
REFERENCED = re.compile(r"\[([^\[\]]+)\]\[[^\]]*\]")  # [text][name of a link]


# ---- sections -----------------------------------------------------------------------------------

UNDERLINE = re.compile(r"([=\-~^*#\"+'.:_])\1{2,}[ \t]*")
HASHES = re.compile(r"(#{1,6})[ \t]+(.+?)[ \t]*#*")
FENCE = re.compile(r"[ \t]*```")
# Lists of changes tell what was different once, under headings that are dates and numbers.
CHANGES = re.compile(r"(?i)change ?log|change history|\bchanges\b|what'?s (?:new|changed)|release|\bv?\d+\.\d+")


def sections(document: Document) -> list[Passages]:
    """The document's sections that have a heading in words and prose below it; one of equal headings has all."""
    found: dict[str, list[str]] = {}
    summary = document.summary.strip().rstrip(".")
    skipped = 0  # level of the list of changes that we are in; 0 outside
    for level, heading, lines in _cut(document.text):
        if skipped and level > skipped:
            continue
        skipped = level if CHANGES.search(heading) else 0
        title = _titled(heading, document.name) or summary
        if not skipped and letters(title) >= 0.7:
            said = normalised(title) if title == summary else None  # word for word, nothing is left to find
            found.setdefault(title, []).extend(
                passage for passage in prose(lines) if said is None or said not in normalised(passage)
            )
    return [Passages(document.name, heading, kept[:PER_SECTION]) for heading, kept in found.items() if kept]


def _titled(heading: str, name: str) -> str:
    """A heading in words; none where it only repeats the document's name."""
    title = re.sub(r"^[^\w(\"]+|[^\w)?!\"]+$", "", plain(PICTURE.sub(" ", heading)))
    return "" if re.sub(r"\W|_", "", title.lower()) == re.sub(r"\W|_", "", name.lower()) else title


def _cut(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """(level, heading, lines below it) of a text in Markdown or reStructuredText, without its blocks of code."""
    level, heading, body, fenced = 1, "", [], False
    styles: dict[str, int] = {}  # level of each kind of underline, as they come up
    for line in text.splitlines():
        if FENCE.match(line):
            fenced = not fenced
        elif fenced:
            continue
        elif hashes := HASHES.fullmatch(line):
            yield level, heading, body
            level, heading, body = len(hashes[1]), hashes[2], []
        elif UNDERLINE.fullmatch(line) and body and body[-1].strip() and not body[-1].startswith((" ", "-", "|")):
            above = body.pop()
            yield level, heading, body
            level, heading, body = styles.setdefault(line[0], len(styles) + 1), above, []
        else:
            body.append(line)
    yield level, heading, body


# ---- prose --------------------------------------------------------------------------------------

SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(*]*[A-Z])")
LIST_ITEM = re.compile(r"(?m)^[ \t]*(?:[-*+•]|\d+[.)])[ \t]+")


def prose(lines: list[str]) -> list[str]:
    """Passages of one to a few whole sentences of a paragraph; tables, code and links are left out."""
    found = []
    for block in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        for item in LIST_ITEM.split(block):
            text = plain(REFERENCED.sub(r"\1", PICTURE.sub(" ", item)))
            if re.match(r"[A-Z\"'(]", text) and re.search(r"[.!?:][\"')]*$", text) and letters(text) >= 0.8:
                found += _grouped(SENTENCE_END.split(text))
    return found


def _grouped(sentences: list[str]) -> list[str]:
    """Sentences put together while they have at most as many words as a passage; longer ones are left out."""
    groups: list[list[str]] = [[]]
    for sentence in sentences:
        words = sentence.split()
        if len(groups[-1]) + len(words) > PASSAGE_WORDS[1]:
            groups.append([])
        groups[-1] += words
    return [" ".join(words) for words in groups if PASSAGE_WORDS[0] <= len(words) <= PASSAGE_WORDS[1]]
