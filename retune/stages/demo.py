"""The demo's raw data: a summary sentence asks for the rest of its docstring; a guard set of other texts.

Whole top-level modules are kept out of training for the test, so that a gain there is one on
unseen code bases.  The guard set, headings of manuals that ask for what stands below them, shows what
becomes of texts that nobody trained for.  Writes what a user would bring (JSONL rows and BEIR folders);
knows nothing of the stages that read it.
"""

from __future__ import annotations

import gc
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

from retune.config import DemoConfig
from retune.data.docstrings import STDLIB, Docstring, docstrings, normalised, sources
from retune.data.manuals import Passages, manuals, sections
from retune.runtime import UserError, atomic, log, progress

FEWEST = 200  # rows below which neither training nor a test says anything
ONE_PACKAGE = 0.25  # of the training rows, at most: a few huge packages would be the whole corpus otherwise
SHINGLE = 6  # words
COPIED = 0.4  # share of known shingles from which a passage counts as a copy
STDLIB_SHARE = 0.25  # of the test passages


class Row(NamedTuple):
    """A query and its positive, with the top-level module that they come from."""

    module: str
    query: str
    positive: str


class Benchmark(NamedTuple):
    """Queries {id: text}, passages {id: (title, text)} and, for each query in turn, its relevant passages."""

    queries: dict[str, str]
    passages: dict[str, tuple[str, str]]
    judged: list[tuple[str, str]]


def demo(settings: DemoConfig, out: Path, seed: int) -> None:
    """Write `train.jsonl` ({"query", "pos"}), `test/` and `guard/` (BEIR) into the folder `out`.

    Args:
        settings: how many rows; fewer are written where the machine's packages give no more.
        out: folder, replaced as a whole.
        seed: chooses the files that are read, the test's modules and the rows that are kept.

    Raises:
        UserError: if fewer than 200 rows are found in all, or none is left for training, the test or the guard set.
    """
    most = max(FEWEST, math.ceil(ONE_PACKAGE * settings.train_rows))
    rows = distinct(_read(sources(settings.packages), most, seed))
    if len(rows) < FEWEST:
        raise UserError(
            f"demo: only {len(rows)} usable docstrings found, at least {FEWEST} are needed; "
            "install more packages, or name them in demo.packages"
        )
    by_module: dict[str, list[Row]] = {}
    for row in rows:
        by_module.setdefault(row.module, []).append(row)
    passages = max(settings.test_passages, settings.test_queries)
    unseen = test_modules({module: len(found) for module, found in by_module.items()}, passages, seed)
    train = _draw([row for row in rows if row.module not in unseen], settings.train_rows, [seed, 1])
    corpus = _draw([row for row in rows if row.module in unseen], passages, [seed, 2])
    if not train or not corpus:
        raise UserError("demo.packages: at least two packages with docstrings are needed, one of them for the test")
    test = _test(corpus, _draw(list(range(len(corpus))), settings.test_queries, [seed, 3]))
    unknown = unread((part for document in manuals() for part in sections(document)), rows)
    guard = _guard(unknown, settings.guard_queries, settings.guard_passages, seed)
    with atomic(out) as part:
        part.mkdir()
        _jsonl(part / "train.jsonl", [{"query": row.query, "pos": [row.positive]} for row in train])
        _beir(part / "test", test)
        _beir(part / "guard", guard)
    log.info("demo: %d usable docstrings in %d modules", len(rows), len(by_module))
    log.info("demo: %d training rows", len(train))
    for name, benchmark in (("test", test), ("guard set", guard)):
        log.info("demo: %s: %d queries, %d passages", name, len(benchmark.queries), len(benchmark.passages))
    log.info("demo: unseen in training: %s", ", ".join(sorted({row.module for row in corpus})))


def _read(files: Mapping[str, Sequence[Path]], most: int, seed: int) -> list[tuple[str, Docstring]]:
    """(module, docstring) of every module, from files in an order drawn with the seed, about `most` of one module."""
    found: list[tuple[str, Docstring]] = []
    gc.disable()  # syntax trees are many objects and no cycles: a third of the time otherwise
    try:
        with progress(sum(map(len, files.values())), "read docstrings", "files") as bar:
            for module, paths in files.items():
                taken = 0
                for index in np.random.default_rng([seed, zlib.crc32(module.encode())]).permutation(len(paths)):
                    if taken < most:
                        pairs = list(docstrings(paths[index]))
                        found += [(module, pair) for pair in pairs]
                        taken += len(pairs)
                    bar.update()
    finally:
        gc.enable()
    return found


def distinct(found: Sequence[tuple[str, Docstring]]) -> list[Row]:
    """Rows whose query and positive are new, and whose positive is no near copy of earlier ones; the first is kept.

    Near copies (classes documented from one template, a module and its backport) would be false
    negatives in training, and leaks between training and test.
    """
    texts: set[str] = set()
    known: set[int] = set()
    kept = []
    for module, pair in found:
        query, positive = normalised(pair.summary), normalised(pair.rest)
        shingles = _shingles(positive)
        if not _copied(shingles, known) and query not in texts and positive not in texts:
            kept.append(Row(module, pair.summary, pair.rest))
            texts |= {query, positive}
        known.update(shingles)
    return kept


def _shingles(text: str) -> list[int]:
    """Digests of all runs of six words of a normalised text."""
    words = text.split()
    return [zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in range(len(words) - SHINGLE + 1)]


def _copied(shingles: Sequence[int], known: set[int]) -> bool:
    return sum(shingle in known for shingle in shingles) > COPIED * len(shingles)


def unread(parts: Iterable[Passages], rows: Sequence[Row]) -> list[Passages]:
    """Sections of manuals without what any docstring says, nor any other section; those with nothing left go.

    So the guard set holds nothing that training could have seen, whichever rows are drawn for it.
    """
    texts = {normalised(text) for row in rows for text in (row.query, row.positive)}
    known = {shingle for row in rows for shingle in _shingles(normalised(f"{row.query} {row.positive}"))}
    kept = []
    for part in parts:
        fresh = []
        for passage in part.passages:
            text = normalised(passage)
            shingles = _shingles(text)
            if not _copied(shingles, known) and text not in texts:
                fresh.append(passage)
            texts.add(text)
            known.update(shingles)
        query = normalised(_asked(part))
        if fresh and query not in texts:
            kept.append(part._replace(passages=fresh))
            texts.add(query)
    return kept


def test_modules(counts: Mapping[str, int], passages: int, seed: int) -> frozenset[str]:
    """Modules kept for the test: drawn with the seed until they have `passages` rows, at most half of all.

    A quarter of the rows comes from the standard library where there are so many.  A module is passed over
    if it has more than a third of the passages, so that the test is no test of one package; such
    ones, the smallest first, are taken only if the others do not suffice.
    """
    passages = min(passages, sum(counts.values()) // 2)
    order = [sorted(counts)[i] for i in np.random.default_rng([seed, 0]).permutation(len(counts))]
    order.sort(key=lambda module: counts[module] if counts[module] > passages / 3 else 0)  # stable
    chosen: dict[str, int] = {}
    for of_library, wanted in ((True, STDLIB_SHARE * passages), (False, passages), (True, passages)):
        for module in order:
            taken = sum(chosen.values())
            last = len(chosen) + 1 == len(counts)  # one stays for training
            if module.startswith(f"{STDLIB}.") == of_library and module not in chosen and taken < wanted and not last:
                chosen[module] = counts[module]
    return frozenset(chosen)


test_modules.__test__ = False  # not a test for pytest, where a test imports it


def _draw(items: list, count: int, seed: Sequence[int]) -> list:
    """At most `count` of the items, in their order."""
    chosen = np.random.default_rng(list(seed)).permutation(len(items))[:count]
    return [items[i] for i in sorted(chosen)]


def _test(corpus: Sequence[Row], asked: Sequence[int]) -> Benchmark:
    """The rows' positives as passages, and the queries of those rows that are asked for."""
    return Benchmark(
        {f"q{i}": corpus[i].query for i in asked},
        {f"p{i}": ("", row.positive) for i, row in enumerate(corpus)},
        [(f"q{i}", f"p{i}") for i in asked],
    )


def _guard(parts: Sequence[Passages], queries: int, passages: int, seed: int) -> Benchmark:
    """A heading, with the name of its manual, asks for all that stands below it; whole sections are drawn.

    Raises:
        UserError: if there is no section.
    """
    if not parts:
        raise UserError("demo: no manuals found on this machine: neither descriptions of packages nor pydoc_data")
    sizes = np.array([len(part.passages) for part in parts])
    order = np.random.default_rng([seed, 4]).permutation(len(parts))
    drawn = order[: max(1, np.count_nonzero(np.cumsum(sizes[order]) <= passages))]
    kept = [parts[i] for i in sorted(drawn)]
    texts, judged = {}, []
    asked = _draw(list(range(len(kept))), queries, [seed, 5])
    for i, part in enumerate(kept):
        for passage in part.passages:
            if i in asked:
                judged.append((f"q{i}", f"p{len(texts)}"))
            texts[f"p{len(texts)}"] = part.document, passage
    return Benchmark({f"q{i}": _asked(kept[i]) for i in asked}, texts, judged)


def _asked(part: Passages) -> str:
    return f"{part.document}: {part.heading}"


def _beir(folder: Path, benchmark: Benchmark) -> None:
    (folder / "qrels").mkdir(parents=True)
    _jsonl(folder / "queries.jsonl", [{"_id": id, "text": text} for id, text in benchmark.queries.items()])
    passages = [{"_id": id, "title": title, "text": text} for id, (title, text) in benchmark.passages.items()]
    _jsonl(folder / "corpus.jsonl", passages)
    lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{passage}\t1" for query, passage in benchmark.judged)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
