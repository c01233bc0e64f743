"""JSONL in, JSONL out: each row with hard negatives mined from the passages that its query finds.

Rows come out in their order, with all their columns as they were: `neg` alone is new (or longer, with
--keep_existing_neg).  Rows that are alike are mined for each on its own; the positives of all rows whose
queries read the same are no negatives of any of them.  Scores (pos_scores, neg_scores) belong to the
earlier negatives and are left out where those change.  Negatives come from --candidate_pool, or without
one from all the positives and negatives of the input.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from retune import tables
from retune.commands import lengths, models, rows, vectors
from retune.commands.flags import Flag, Given, from_section, whole
from retune.commands.work import WORK_DIR, Work, input_files, model_identity, output_file, output_rows, work_folder
from retune.config import Config, EmbedderConfig, MineConfig, RerankerConfig
from retune.data import jsonl
from retune.data.sources import Raw
from retune.runtime import atomic, log

SCORES = ("pos_scores", "neg_scores")
MINING = "mining"
BLOCK = 256  # queries whose negatives are Python strings at a time

FLAGS = [
    rows.input_flag(),
    Flag(("output_file",), "JSONL that is written; compressed where it ends in .gz or .zst.", required=True),
    Flag(
        ("candidate_pool",), "JSONL of rows {text} to take negatives from: files, folders or globs.", "ingest.corpus",
        "list", shown="all positives and negatives of the input",
    ),
    *rows.ON_BAD_ROW,
    Flag(("stats_file",), "Parquet table of what mining did, that is written as well."),
    WORK_DIR,
    *from_section(
        "mine", MineConfig, MINING,
        {
            "max_score_of_teacher": {
                "help": "Drop candidates that the reranker (--reranker_name_or_path) scores above the query's lowest "
                "scored positive by more than this."
            },
        },
        leave=("embedder", "shards"),
    ),
    Flag(("seed",), "Of every draw.", convert=whole(0), default=Config.model_fields["seed"].default, group=MINING),
    *lengths.FLAGS,
    *models.embedder_flags(),
    Flag(
        ("use_row_prompts",), "A row's `prompt` comes before its query, as it does in training; FlagEmbedding's "
        "hn_mine.py does without it.", kind="bool", default=True, group=models.MODEL,
    ),
    *vectors.embed_flags(),
    *models.hardware_flags(),
    *models.reranker_flags(bare=False),
]  # fmt: skip


def run(given: Given) -> None:
    """Mine as the flags say.

    Raises:
        UserError: for a mistake in flags or rows; an earlier output is left as it was.
    """
    output = output_rows(given)
    stats = output_file(given, "stats_file") if given["stats_file"] else None
    files = input_files(given, "input_file", output)
    pool = input_files(given, "candidate_pool") if given["candidate_pool"] else []
    settings = given.section("mine", MineConfig)
    reranker = models.reranker(given) if settings.max_score_of_teacher is not None else None
    if settings.max_score_of_teacher is not None and reranker is None:
        raise given.mistake("max_score_of_teacher", "needs a reranker: --reranker_name_or_path")
    if settings.pool == "bin" and given["embedder_name_or_path"] is None:
        raise given.mistake("pool", "`bin` needs a tokenizer: --embedder_name_or_path")
    bins = lengths.settings(given)
    devices = models.prepare(given)
    embedder = None if settings.retriever == "bm25" else models.embedder(given)
    for model in (embedder, reranker):
        if model:
            models.fetch(model.model, model.revision)
    with work_folder(given, output) as work:
        listed = output.with_name(f"{output.name}.rejected")
        found = rows.into_tables(given, work, files, pool, listed, given["use_row_prompts"])
        inputs, steps = _vectors(given, work, found, embedder, devices)
        if settings.pool == "bin":
            tokenizer = {name: given[f"embedder_{name}"] for name in ("revision", "trust_remote_code")}
            inputs |= lengths.measure(work, found, bins, tokenizer | {"model": given["embedder_name_or_path"]})
            steps.append("split")
        inputs |= {name: found[name] for name in ("texts", "queries", "pairs")}
        mined, counts = _mine(work, inputs, pool, settings, given["seed"], reranker, steps)
        write(files, found, mined, settings.keep_existing_neg, output)
        if stats:
            with atomic(stats) as part:
                shutil.copyfile(counts, part)


def _vectors(
    given: Given, work: Work, found: dict[str, Path], embedder: EmbedderConfig | None, devices: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Vectors of queries and of texts, None without an embedder; and the names of the steps so far."""
    if embedder is None:
        return {"query_vectors": None, "text_vectors": None}, ["ingest"]
    of_texts, one = vectors.embed_table(given, work, found["texts"], "passage", embedder, devices, ["ingest"])
    [of_queries], two = vectors.embed_table(given, work, found["queries"], "query", embedder, devices, ["ingest"])
    return {"query_vectors": of_queries, "text_vectors": of_texts}, ["ingest", *one, *two]


def _mine(
    work: Work, inputs: dict[str, Any], pool: list[Path], settings: MineConfig, seed: int,
    reranker: RerankerConfig | None, steps: list[str],
) -> tuple[Path, Path]:  # fmt: skip
    """The step itself; returns the table of mined pairs and that of what mining did."""
    from retune.stages.mine import mine

    out, counts = work.path("mine/pairs.parquet"), work.path("mine/stats.parquet")
    of: dict[str, Any] = {"settings": settings.model_dump(mode="json"), "seed": seed}
    if reranker:
        of["reranker"] = reranker.model_dump(mode="json")
        of["model"] = model_identity(of["reranker"]) if work.kept else None

    def do() -> None:
        candidates = rows.in_pool(inputs["texts"], pool) if pool else None
        mine(
            **inputs, settings=settings, seed=seed, out=out, reranker=reranker, stats=counts, candidates=candidates
        )  # fmt: skip

    work.step("mine", "mine", [out, counts], of, do, steps)
    return out, counts


# ---- tables → rows ------------------------------------------------------------------------------


class Negatives:
    """The negatives that were mined for each query; in memory are those texts alone which are some."""

    def __init__(self, texts: Path, pairs: Path, n_queries: int) -> None:
        columns = ["query_id", "text_id", "label", "origin"]
        table = pl.from_arrow(tables.read(pairs, "pairs", columns))
        self._kept = np.zeros(n_queries, bool)
        self._kept[table["query_id"].to_numpy()] = True
        mined = table.filter((pl.col("label") == 0) & (pl.col("origin") != "given"))  # sorted by query
        self._starts = np.searchsorted(mined["query_id"].to_numpy(), np.arange(n_queries + 1))
        used, self._places = np.unique(mined["text_id"].to_numpy(), return_inverse=True)
        parts = [pa.array([], pa.large_string())]
        for batch in tables.batches(texts, "texts", ["text_id", "text"]):
            wanted = np.isin(batch["text_id"].to_numpy(), used, assume_unique=True)
            parts.append(pc.filter(batch["text"], pa.array(wanted)).cast(pa.large_string()))
        self._texts = pa.concat_arrays(parts)
        self.count = len(mined)
        self._first, self._block = -BLOCK, list[str]()

    def of(self, query: int) -> list[str] | None:
        """The query's negatives; None where the query was dropped.  Queries are best asked for in order."""
        if not self._kept[query]:
            return None
        if not self._first <= query < self._first + BLOCK:
            self._first = query
            places = self._places[self._starts[query] : self._starts[min(query + BLOCK, len(self._kept))]]
            self._block = self._texts.take(pa.array(places)).to_pylist()
        start, stop = self._starts[query : query + 2] - self._starts[self._first]
        return self._block[start:stop]


def write(files: list[Path], found: dict[str, Path], mined: Path, keep_existing: bool, output: Path) -> None:
    """Write each row of `files` with its negatives; a query that was dropped has no row."""
    negatives = Negatives(found["texts"], mined, tables.n_rows(found["queries"]))
    n_rows = dropped = rescored = 0
    with jsonl.writer(output) as line:
        for query, _, raw in rows.numbered(files, found["queries"]):
            new = negatives.of(query)
            if new is None:
                dropped += 1
                continue
            text, without_scores = _row(raw, new, keep_existing)
            line(text.encode())
            n_rows, rescored = n_rows + 1, rescored + without_scores
    if rescored:
        log.info("%s rows go without pos_scores and neg_scores: those were of other negatives", f"{rescored:,}")
    if dropped:
        log.info("%s rows are left out: too few candidates (--on_shortage drop)", f"{dropped:,}")
    log.info("%s: %s rows, %s mined negatives", output, f"{n_rows:,}", f"{negatives.count:,}")


def _row(raw: Raw, new: list[str], keep_existing: bool) -> tuple[str, bool]:
    """The row with its negatives, and whether scores of the earlier ones are left out."""
    before = raw.value.get("neg") or []
    after = [*before, *new] if keep_existing else new
    columns: dict[str, str | None] = {"neg": jsonl.texts(after)}
    stale = after != before and any(raw.value.get(name) is not None for name in SCORES)
    if stale:
        columns |= dict.fromkeys(SCORES)
    return jsonl.with_columns(jsonl.line(raw).decode().strip(), columns), stale
