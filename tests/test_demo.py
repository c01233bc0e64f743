"""The demo's corpus: what becomes of a docstring, what is kept, and that training never sees the test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retune.config import DemoConfig
from retune.data import docstrings as source
from retune.data.docstrings import PASSAGE_WORDS, QUERY_WORDS, Docstring, normalised, parse, plain
from retune.data.manuals import Document, Passages, sections
from retune.runtime import UserError
from retune.stages import demo as stage
from retune.stages.demo import demo, distinct, test_modules, unread

TOPICS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")


def docstring(package: int, number: int) -> str:
    """A docstring like no other."""
    words = [f"{TOPICS[(number + i * i) % 10]}{chr(97 + i)}n{number}x{package}" for i in range(24)]
    return f"Compute the {words[0]} of the {words[1]} table.\n\n    {' '.join(words)}."


def manual(name: str) -> Document:
    """Three sections of two passages each."""
    said = [[f"The {name} {head} needs {word} and {name}{word} before {word}{head} can work." for word in TOPICS[:2]]
            for head in TOPICS[2:5]]  # fmt: skip
    text = "\n\n".join(f"## On {head}\n\n{one}\n\n{two}" for head, (one, two) in zip(TOPICS[2:5], said, strict=True))
    return Document(name, "", text)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch) -> list[str]:
    """Six packages of 60 functions each; the last has a test suite and a vendored copy too."""
    names = [f"demo_package_{i}" for i in range(6)]
    for place, name in enumerate(names):
        folder = tmp_path / "site" / name
        for part in ("", "tests", "_vendor"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            functions = [f'def f{i}():\n    """{docstring(place, i)}\n    {part}"""\n' for i in range(60)]
            (folder / part / "code.py").write_text("raise RuntimeError('imported')\n" + "\n".join(functions))
        (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setattr(stage, "manuals", lambda: [manual(f"tool{i}") for i in range(20)])
    return names


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_docstring_becomes_query_and_passage() -> None:
    found = parse(
        """Split `text` into :class:`~package.Token` objects.  Keeps order.

        Parameters
        ----------
        text : str
            What is **split**, see `the guide <https://example.org>`_ for more on it [1]_.

        .. versionadded:: 1.2

        :param int limit: how many tokens are returned at most

        >>> split("a b")
        ['a', 'b']

        .. note:: Empty texts give no tokens.
        """
    )
    assert found == Docstring(
        "Split text into Token objects.",
        "Keeps order. Parameters text : str What is split, see the guide for more on it. limit: how many tokens are "
        "returned at most note: Empty texts give no tokens.",
    )


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("see [`Trainer`] and [the docs](https://x.y/z)", "see Trainer and the docs"),
        ("dict[str, int] stays, ``None`` too", "dict[str, int] stays, None too"),
        ("a * b * c", "a * b * c"),
        ("before\n```python\ncode()\n```\nafter", "before after"),
        ("like this::", "like this:"),
        ("<Tip warning={true}>\nCareful\n</Tip>", "Careful"),
        (":returns: the sum", "returns: the sum"),
        ("*emphasis* and **more**, *args", "emphasis and more, *args"),
    ],
)
def test_markup_is_tamed(markup: str, text: str) -> None:
    assert plain(markup) == text


LONG = " ".join(f"word{chr(97 + i % 26)}" for i in range(30))


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"Too short.\n\n{LONG}",
        "A summary of five words.\n\nBut nearly nothing else.",
        f"The summary stands in the rest.\n\n{LONG} the summary, stands in the rest",
        f"{'word ' * 31}.\n\n{LONG}",
        "A summary of five words.\n\n" + "1.0 2.0 3.0 " * 20,
    ],
)
def test_unfit_docstrings_are_left_out(text: str) -> None:
    assert parse(text) is None


@given(st.text(st.characters(codec="utf-8"), max_size=400))
def test_any_docstring_parses(text: str) -> None:
    found = parse(f"{text}\n\n{LONG}")
    if found:
        assert QUERY_WORDS[0] <= len(found.summary.split()) <= QUERY_WORDS[1]
        assert PASSAGE_WORDS[0] <= len(found.rest.split()) <= PASSAGE_WORDS[1]
        assert normalised(found.summary) not in normalised(found.rest)


def test_lone_surrogates_go() -> None:
    assert parse(f"A summary\ud800 of five words.\n\n{LONG}").summary == "A summary of five words."


def test_copies_are_left_out() -> None:
    first = Docstring("Query of the first one", LONG)
    near = Docstring("Another query for a copy", LONG.replace("wordd", "other", 1))
    asked = Docstring("query of the FIRST one!", " ".join(f"fresh{chr(97 + i)}" for i in range(20)))
    fresh = Docstring("A query of its own", " ".join(f"new{chr(97 + i)}" for i in range(20)))
    kept = distinct([("a", first), ("b", near), ("b", asked), ("b", fresh)])
    assert [(row.module, row.query) for row in kept] == [("a", first.summary), ("b", fresh.summary)]


@given(
    st.dictionaries(st.sampled_from([f"{p}m{i}" for i in range(20) for p in ("", "stdlib.")]), st.integers(1, 500),
                    min_size=2),
    st.integers(10, 3000), st.integers(0, 5),
)  # fmt: skip
def test_modules_of_the_test_suffice_and_leave_some(counts: dict[str, int], passages: int, seed: int) -> None:
    chosen = test_modules(counts, passages, seed)
    assert chosen < set(counts)
    assert chosen == test_modules(dict(reversed(counts.items())), passages, seed)
    enough = sum(counts[module] for module in chosen) >= min(passages, sum(counts.values()) // 2)
    assert enough or len(chosen) == len(counts) - 1


def test_files_and_separation(packages: list[str], tmp_path: Path) -> None:
    settings = DemoConfig(train_rows=150, test_queries=20, test_passages=100, packages=packages)
    demo(settings, tmp_path / "out", seed=3)
    train = rows(tmp_path / "out/train.jsonl")
    queries, corpus = (rows(tmp_path / f"out/test/{name}.jsonl") for name in ("queries", "corpus"))
    assert (len(train), len(queries), len(corpus)) == (150, 20, 100)
    assert all(list(row) == ["query", "pos"] and len(row["pos"]) == 1 for row in train)
    assert all(list(row) == ["_id", "title", "text"] for row in corpus)

    judged = [line.split("\t") for line in (tmp_path / "out/test/qrels/test.tsv").read_text().splitlines()]
    assert judged[0] == ["query-id", "corpus-id", "score"]
    assert [line[0] for line in judged[1:]] == [row["_id"] for row in queries]
    assert {line[1] for line in judged[1:]} <= {row["_id"] for row in corpus}

    texts = {row["_id"]: row["text"] for row in [*queries, *corpus]}
    for query, passage, _ in judged[1:]:  # the words of a summary are the first of its rest
        assert texts[query].split()[2] == texts[passage].split()[0]
    seen = {normalised(text) for row in train for text in (row["query"], *row["pos"])}
    assert seen.isdisjoint({normalised(row["text"]) for row in [*queries, *corpus]})
    packages_of = [{text.split()[2][-1] for text in texts} for texts in (
        [row["query"] for row in train], [row["text"] for row in queries])]  # fmt: skip
    assert packages_of[0].isdisjoint(packages_of[1])


def test_the_guard_set(packages: list[str], tmp_path: Path) -> None:
    settings = DemoConfig(train_rows=100, packages=packages, guard_queries=10, guard_passages=31)
    demo(settings, tmp_path / "out", seed=3)
    queries, corpus = (rows(tmp_path / f"out/guard/{name}.jsonl") for name in ("queries", "corpus"))
    assert (len(queries), len(corpus)) == (10, 30)  # whole sections only
    texts = {row["_id"]: row for row in [*queries, *corpus]}
    judged = [line.split("\t") for line in (tmp_path / "out/guard/qrels/test.tsv").read_text().splitlines()[1:]]
    assert list(dict.fromkeys(query for query, *_ in judged)) == [row["_id"] for row in queries]
    assert len(judged) == 20  # each heading has two passages below it, and both are here
    for query, passage, grade in judged:
        name, head = texts[query]["text"].split(": On ")
        assert texts[passage]["title"] == name and grade == "1"
        assert texts[passage]["text"].startswith(f"The {name} {head} needs ")


def test_the_guard_set_holds_nothing_that_training_could_see(packages: list[str], tmp_path: Path, monkeypatch) -> None:
    """A passage that a docstring holds, and a heading that one asks by, are left out, whichever rows are drawn."""
    found = [Docstring(f"Query number {word} of all", f"{LONG} {word}") for word in TOPICS]
    known = [stage.Row("m", pair.summary, pair.rest) for pair in found]
    copied = Passages("one", "Copied", ["Fresh words that nobody has written in a docstring.", f"Of {LONG}."])
    asked = Passages("Query", "number alpha of all", ["Nothing like it was ever said by anyone before today."])
    twice = Passages("two", "Again", [copied.passages[0].upper(), "Third words which stand here and nowhere else."])
    gone = Passages("two", "Nothing left", [copied.passages[0]])
    assert unread([copied, asked, twice, gone], known) == [
        copied._replace(passages=copied.passages[:1]), twice._replace(passages=twice.passages[1:]),
    ]  # fmt: skip
    train = rows_of_training(packages, tmp_path)
    copy = train[0]["query"].replace(" table.", " table again.")
    leaking = Document("leaking", "", f"## On leaks\n\n{copy}\n\n{manual('tool').text}")
    assert [copy] in [part.passages for part in sections(leaking)]
    monkeypatch.setattr(stage, "manuals", lambda: [leaking])
    demo(DemoConfig(train_rows=100, packages=packages), tmp_path / "guarded", seed=3)
    corpus = rows(tmp_path / "guarded/guard/corpus.jsonl")
    assert len(corpus) == 6 and {row["title"] for row in corpus} == {"leaking"}
    assert (tmp_path / "guarded/train.jsonl").read_bytes() == (tmp_path / "plain/train.jsonl").read_bytes()


def rows_of_training(packages: list[str], tmp_path: Path) -> list[dict]:
    demo(DemoConfig(train_rows=100, packages=packages), tmp_path / "plain", seed=3)
    return rows(tmp_path / "plain/train.jsonl")


def test_no_manuals_is_an_error(packages: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stage, "manuals", lambda: [Document("tool", "A tool", "No heading, and nothing to tell.")])
    with pytest.raises(UserError, match="no manuals found on this machine"):
        demo(DemoConfig(train_rows=100, packages=packages), tmp_path / "out", seed=1)
    assert not (tmp_path / "out").exists()


def test_same_seed_same_bytes(packages: list[str], tmp_path: Path) -> None:
    few = {"guard_queries": 15, "guard_passages": 50}
    settings = DemoConfig(train_rows=100, test_queries=20, test_passages=60, packages=packages, **few)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        demo(settings, tmp_path / name, seed)
    files = [f"{folder}/{name}" for folder in ("guard", "test") for name in ("queries.jsonl", "corpus.jsonl")]
    files = ["train.jsonl", *files, "guard/qrels/test.tsv", "test/qrels/test.tsv"]
    a, b, c = ([(tmp_path / name / file).read_bytes() for file in files] for name in "abc")
    assert a == b
    assert a[0] != c[0] and a[1] != c[1]


def test_tests_and_vendored_copies_are_not_read(packages: list[str]) -> None:
    found = source.sources(packages[:1])
    assert [path.name for path in found[packages[0]]] == ["__init__.py", "code.py"]


def test_too_little_is_an_error(packages: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only 120 usable docstrings found, at least 200"):
        demo(DemoConfig(packages=packages[:2]), tmp_path / "out", seed=1)
    assert not (tmp_path / "out").exists()


def test_one_package_is_an_error(packages: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stage, "FEWEST", 10)
    with pytest.raises(UserError, match="at least two packages"):
        demo(DemoConfig(packages=packages[:1]), tmp_path / "out", seed=1)


@pytest.mark.parametrize("name", ["no_such_package_here", "not a name", "_struct"])
def test_unknown_package_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match=f"demo.packages: {name}"):
        source.sources([name])


def test_this_machine_has_its_library_and_what_retune_needs() -> None:
    found = source.sources()
    assert {"stdlib.json", "stdlib.email", "networkx", "pydantic", "torch"} <= set(found)
    assert "retune" not in found
    assert "pytest" not in found  # an extra, not a requirement
    assert not [path for paths in found.values() for path in paths if {"tests", "_vendor"} & set(path.parts)]
