"""Manuals cut at their headings: what is a heading, what is prose, what is left out."""

from __future__ import annotations

import sys
from importlib import metadata

from hypothesis import given
from hypothesis import strategies as st

from retune.data.manuals import PASSAGE_WORDS, PER_SECTION, REFERENCE, Document, Passages, manuals, prose, sections

MARKDOWN = """\
# Tool

[![Build](https://ci.example/badge.svg)](https://ci.example)

The fastest way to turn one thing into another. It reads files of every kind that people use today.
A tool that turns one thing into another one, as its summary has it.

## 🚀 Getting [started](https://start.example)

First install the **program** with the installer, then restart the machine.

```python
# Not a heading. It only looks like one to those who read no fences here.
```

| a table | of two columns | which nobody wants to read as it stands here. |

- Items of lists are passages too, if they say enough in whole words.
- short one

## Changelog

### 2.1

We changed a great many things which nobody will ask for any more today.

## Installation

See [the guide][1] for all systems on which this program can be installed.
"""

STRUCTURED = """\
====
Tool
====

Known problems
--------------

Some systems have no clock, and on those ``sleep`` returns at once::

    this = is(code, and, has, letters, enough, to, be, prose)

More problems
~~~~~~~~~~~~~

Every other problem is told in the `tracker <https://bugs.example>`_ of the project.

Changes in 1.2
--------------

This was different once upon a time, and nobody will ask for it now.

Thanks
------

Many people gave their time and their words, so that this could be written.
"""


def headings(text: str) -> dict[str, list[str]]:
    return {part.heading: part.passages for part in sections(Document("tool", "A tool that turns one thing", text))}


def test_markdown() -> None:
    assert headings(MARKDOWN) == {
        "A tool that turns one thing": [  # the heading that only says the name; and not what repeats the summary
            "The fastest way to turn one thing into another. It reads files of every kind that people use today.",
        ],
        "Getting started": [
            "First install the program with the installer, then restart the machine.",
            "Items of lists are passages too, if they say enough in whole words.",
        ],
        "Installation": ["See the guide for all systems on which this program can be installed."],
    }  # fmt: skip


def test_structured_text() -> None:
    assert headings(STRUCTURED) == {
        "Known problems": ["Some systems have no clock, and on those sleep returns at once:"],
        "More problems": ["Every other problem is told in the tracker of the project."],
        "Thanks": ["Many people gave their time and their words, so that this could be written."],
    }


def test_equal_headings_are_one_section_of_at_most_six_passages() -> None:
    line = "This sentence number {} has more words than a passage needs at the very least."
    text = "\n\n".join(f"## Usage\n\n{line.format(i)}" for i in range(9))
    assert headings(text) == {"Usage": [line.format(i) for i in range(PER_SECTION)]}


def test_passages_are_whole_sentences() -> None:
    words = [f"Sentence {i} " + "has words and " * 4 + "an end." for i in range(3)]  # 16 words each
    assert prose([" ".join(words)]) == [" ".join(words[:2]), words[2]]
    assert prose(["Word " * 40 + "end."]) == [] == prose(["Too short."])


@given(st.text(st.sampled_from('# \n=-~`A.b1[]()!:*>"'), max_size=300), st.text(max_size=200))
def test_any_text_is_cut(marks: str, text: str) -> None:
    for part in sections(Document("tool", "", f"# Heading\n\n{marks}\n{text}\n# Heading\n\n{marks}")):
        assert part.heading and 0 < len(part.passages) <= PER_SECTION
        assert all(PASSAGE_WORDS[0] <= len(passage.split()) <= PASSAGE_WORDS[1] for passage in part.passages)


def test_this_machine_has_enough_of_them() -> None:
    documents = manuals()
    names = [document.name for document in documents]
    assert {"numpy", "torch", "snakemake", REFERENCE} <= set(names) and "retune" not in names
    assert documents[names.index("numpy")].summary == metadata.metadata("numpy")["Summary"]
    parts = [part for document in documents for part in sections(document)]
    assert len(parts) > 300 and sum(len(part.passages) for part in parts) > 1200
    assert all(isinstance(part, Passages) and part.passages for part in parts)
    told = next(part for part in parts if part.heading == "Boolean operations")
    assert told.document == REFERENCE and any("if" in passage and "false" in passage for passage in told.passages)


def test_without_the_language_reference_the_descriptions_are_left(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert {document.name for document in manuals()} >= {"numpy", "torch"}
    assert REFERENCE not in {document.name for document in manuals()}
