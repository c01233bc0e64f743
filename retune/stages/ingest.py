"""ingest: raw files → checked tables of texts, queries, pairs and rejected rows; benchmarks by the same door.

Rows stream through: what is kept is a digest of each distinct text and row.  Nothing is written
where anything is wrong, unless `on_bad_row` is `skip`.  Knows nothing of models and tokens.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from retune import tables
from retune.config import BenchmarkConfig, DatasetConfig, IngestConfig
from retune.data import benchmarks, hub, sources
from retune.data.files import expand
from retune.data.groups import Groups, choose_dev
from retune.data.leakage import Excluded
from retune.data.mistakes import BadRows
from retune.data.rows import Mistake, Row, check, check_document
from retune.data.store import Pairs, Rows, Texts
from retune.data.text import digests
from retune.runtime import UserError, log, progress

CORPUS = "corpus"  # stands for the dataset's name where a row of `ingest.corpus` is rejected
OPT_OUT = "no_in_batch_neg"
HINT = "`ingest.on_bad_row: skip` goes on without such rows and lists them in rejected.parquet"


class File(NamedTuple):
    """A raw file and the dataset that it belongs to; the corpus has no options."""

    number: int
    path: Path
    shown: str
    dataset: str
    options: DatasetConfig | None
    in_batch_negatives: bool


def ingest(
    settings: IngestConfig, out: Mapping[str, Path | str], seed: int, keep_duplicates: bool = False,
    scores: bool = True, benchmarks: Mapping[str, Mapping[str, Path | str]] | None = None,
    levels: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """Read all of `settings.train` and `settings.corpus` into the tables `out`.

    Args:
        out: paths of the tables `texts`, `queries`, `pairs` and `rejected`.
        seed: of the choice of the dev split.
        keep_duplicates: a row that is the same as an earlier one is a query of its own, and no mistake.
        scores: whether teacher scores are read; else a row may hold any.
        benchmarks: {name: its tables}, for `exclude_benchmarks`.
        levels: lowest grade of their relevant passages, by name; 1 where not given.

    Raises:
        UserError: for a pattern without a file, an unreadable file, no good row, or, with
            `on_bad_row: error`, any bad row.  No table is written then.
    """
    files = _files(settings)
    with ExitStack() as stack:
        table = {name: stack.enter_context(tables.writer(out[name], name)) for name in ("texts", "pairs", "rejected")}
        folder = Path(out["queries"]).parent
        folder.mkdir(parents=True, exist_ok=True)
        # Which queries are set aside is known at the end only, so they are written twice.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".ingest-", dir=folder)), "queries")
        rejected = Rows(table["rejected"])
        bad = BadRows(settings.on_bad_row, rejected)
        excluded = Excluded(settings.exclude_benchmarks, benchmarks or {}, rejected, levels)
        with tables.writer(scratch, "queries") as queries:
            texts, pairs = Texts(table["texts"]), Pairs(table["pairs"])
            intake = Intake(files, texts, Rows(queries), pairs, excluded, settings.dev_fraction > 0, keep_duplicates)
            with progress(sum(file.path.stat().st_size for file in files), "ingest", "B") as bar:
                for file in files:
                    _read(file, intake, bad, excluded, bar.update, scores)
            intake.flush()
            rejected.flush()
        bad.raise_or_log(HINT)
        excluded.tell()
        if not intake.queries.count:
            raise UserError(f"ingest.train: no good row in {', '.join(str(f.path) for f in files if f.options)}")
        dev = intake.dev(settings.dev_fraction, seed)
        _write_queries(out["queries"], scratch, dev)
    counts = (intake.queries.count, int(dev.sum()), intake.pairs.count, intake.texts.count, bad.count)
    log.info("%s queries (%s of them dev), %s pairs, %s distinct texts, %s rows rejected", *map("{:,}".format, counts))


class Intake:
    """Good rows on their way to the tables."""

    def __init__(
        self, files: list[File], texts: Texts, queries: Rows, pairs: Pairs, excluded: Excluded, grouped: bool,
        keep_duplicates: bool,
    ) -> None:  # fmt: skip
        self.texts, self.queries, self.pairs, self._keep_duplicates = texts, queries, pairs, keep_duplicates
        self._excluded = excluded
        self._groups = Groups() if grouped else None
        self._seen: dict[bytes, int] = {}  # digest of a row → its place: the file's number and the line, in one int
        self._files = files
        self.taken: dict[str, int] = {}

    def add(self, row: Row, file: File, line: int) -> Mistake | None:
        """Store a row; where an earlier one has the same prompt, query, positives and negatives, say so instead.

        The order of positives and of negatives does not count, nor do scores.  With `keep_duplicates` it is stored.
        """
        prompt = row.prompt if row.prompt is not None else file.options.prompt
        kind = row.type if row.type is not None else file.options.type
        pos, neg = digests(row.pos), digests(row.neg)
        if not self._keep_duplicates and (earlier := self._earlier([row.query, prompt or ""], pos, neg, file, line)):
            return Mistake("row", "duplicate row", f"the same as {earlier}")
        if self._excluded.drop_negatives(row):
            neg = digests(row.neg)
        source, batch = f"{file.shown}:{line}", file.options.batch_size
        values = (file.dataset, row.query, None, prompt, kind, file.in_batch_negatives, batch, "train", source)
        values += (row.category,)
        query = self.queries.add((self.queries.count, *values), len(row.query))
        scores = row.pos_scores + row.neg_scores if row.pos_scores is not None else None
        self.pairs.add(query, self.texts.ids_of(row.pos, pos), self.texts.ids_of(row.neg, neg), scores)
        if self._groups:
            self._groups.add(row.query, row.pos)
        self.taken[file.dataset] = self.taken.get(file.dataset, 0) + 1
        return None

    def _earlier(self, head: list[str], pos: list[bytes], neg: list[bytes], file: File, line: int) -> str | None:
        """`file:line` of the first row that is the same as this one; None where it is this one."""
        parts = [*digests(head), *sorted(pos), bytes(16), *sorted(neg)]
        whole = hashlib.blake2b(b"".join(parts), digest_size=16).digest()
        place = file.number << 40 | line
        found = self._seen.setdefault(whole, place)
        return None if found == place else f"{self._files[found >> 40].shown}:{found & (1 << 40) - 1}"

    def flush(self) -> None:
        for rows in (self.texts, self.queries, self.pairs):
            rows.flush()

    def dev(self, fraction: float, seed: int) -> np.ndarray:
        """Which queries are set aside, bool [queries]."""
        if not self._groups:
            return np.zeros(self.queries.count, dtype=bool)
        groups = self._groups.of_queries()
        dev = choose_dev(groups, fraction, seed)
        largest = np.bincount(groups).max()
        if abs(dev.sum() - fraction * len(dev)) > max(1, 0.2 * fraction * len(dev)):
            log.warning(
                "ingest.dev_fraction: %s of %s queries are set aside: the largest of %s groups that share a query or "
                "positive has %s", dev.sum(), len(dev), groups.max() + 1, largest,
            )  # fmt: skip
        return dev


def _files(settings: IngestConfig) -> list[File]:
    found: list[File] = []
    for name, options in settings.train.items():
        takes = options.in_batch_negatives
        if options.format == "beir":
            expand(options.files(), f"ingest.train.{name}.path")  # all of them must be there
            for folder in options.path:
                queries = Path(folder) / "queries.jsonl"
                found.append(File(len(found), queries, str(queries), name, options, takes and not _opts_out(queries)))
            continue
        for path in expand(options.path, f"ingest.train.{name}.path"):
            found.append(File(len(found), path, str(path), name, options, takes and not _opts_out(path)))
    if settings.corpus:
        for path in expand(settings.corpus, "ingest.corpus"):
            found.append(File(len(found), path, str(path), CORPUS, None, True))
    return found


def _opts_out(path: Path) -> bool:
    """Whether the name of a file, or of a folder above it, says so: FlagEmbedding's way to opt out.

    It holds where the option is at its default; as the option's only other value says the same, it always holds.
    """
    stem = Path(path.name.removesuffix(".gz").removesuffix(".zst")).stem
    return any(name.endswith(OPT_OUT) for name in (*path.parent.parts, stem))


def _read(file: File, intake: Intake, bad: BadRows, excluded: Excluded, on_read: sources.OnRead, scores: bool) -> None:
    if file.options is None:
        _read_corpus(file, intake, bad, excluded, on_read)
        return
    beir = file.options.format == "beir"
    rows = benchmarks.training_rows(file.path.parent, file.options.split) if beir else sources.rows(file.path, on_read)
    for raw in rows:
        if intake.taken.get(file.dataset, 0) == file.options.max_examples:
            break
        row, mistakes = check(raw.value, scores=scores)
        if row and excluded.takes(row, file.dataset, file.path, raw):
            continue
        if row and (duplicate := intake.add(row, file, raw.line)):
            mistakes = [duplicate]
        if mistakes:
            bad.add(file.dataset, file.path, raw, mistakes)


def _read_corpus(file: File, intake: Intake, bad: BadRows, excluded: Excluded, on_read: sources.OnRead) -> None:
    empty = 0
    for raw in sources.rows(file.path, on_read):
        text, mistakes = check_document(raw.value)
        if text is None:
            bad.add(file.dataset, file.path, raw, mistakes)
        elif not text.strip():
            empty += 1
        elif not excluded.holds(text):
            intake.texts.ids_of([text])
    if empty:
        log.warning("%s: %s documents without text are left out of the pool", file.path, f"{empty:,}")


def _write_queries(path: Path | str, scratch: Path, dev: np.ndarray) -> None:
    split = pa.array(np.where(dev, "dev", "train").astype(object), pa.large_string())
    at = 0
    with tables.writer(path, "queries") as out:
        for batch in tables.batches(scratch, "queries"):
            out.write({name: batch[name] for name in batch.schema.names} | {"split": split.slice(at, batch.num_rows)})
            at += batch.num_rows


def benchmark(settings: BenchmarkConfig, out: Mapping[str, Path | str], name: str = "benchmark") -> None:
    """Read a benchmark into the tables `out`: texts, queries, pairs (judgments).

    Args:
        name: what the column `dataset` says.

    What came from the hub is in the tables' metadata, with its commit.

    Raises:
        UserError: for unreadable files, wrong rows, ids given twice, or judgments that match no
            document or query.  No table is written then.
    """
    found = {role: hub.local(reference) for role, reference in settings.files().items()}
    pinned = {role: one.pinned for role, one in found.items() if one.pinned}
    meta = {hub.PINNED: json.dumps(pinned)} if pinned else None
    with ExitStack() as stack:
        table = {key: stack.enter_context(tables.writer(out[key], key, meta)) for key in ("texts", "queries", "pairs")}
        files = {role: one.files for role, one in found.items()}
        benchmarks.FORMATS[settings.format](settings, files, name, table)
