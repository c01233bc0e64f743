"""JSONL in, JSONL out: each row with a reranker's scores of its positives and negatives, pos_scores and neg_scores.

Rows come out in their order, with all their columns as they were; scores that they had are replaced,
and a row without negatives gets `neg_scores: []`.  Each distinct query and passage is scored once.  A
score is written with all its digits, so that it reads back as the very number that was computed.
With --work_dir, a run that was interrupted repeats no more than the few thousand pairs it was at.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retune import tables
from retune.commands import models, rows
from retune.commands.flags import Flag, Given, from_section, whole
from retune.commands.work import WORK_DIR, Work, input_files, model_identity, output_rows, work_folder
from retune.config import RerankerConfig, ScoreConfig
from retune.data import jsonl
from retune.runtime import log

FLAGS = [
    rows.input_flag(),
    Flag(("output_file",), "JSONL that is written; compressed where it ends in .gz or .zst.", required=True),
    *rows.ON_BAD_ROW,
    WORK_DIR,
    *models.reranker_flags(bare=True),
    Flag(
        ("reranker_batch_size", "batch_size"),
        "Pairs of a batch at most, counted in tokens: so many pairs of the greatest length. More than pays on the "
        "hardware is never taken.",
        shown="as many as pay", convert=whole(1), group=models.RERANKER,
    ),
    *from_section(
        "score", ScoreConfig, models.RERANKER,
        {"batch_tokens": {"names": ("batch_tokens", "max_tokens_per_batch")}}, leave=("shards", "false_negatives"),
    ),
    *models.hardware_flags(),
]  # fmt: skip


def run(given: Given) -> None:
    """Score as the flags say.

    Raises:
        UserError: for a mistake in flags or rows; an earlier output is left as it was.
    """
    output = output_rows(given)
    files = input_files(given, "input_file", output)
    devices = models.prepare(given)
    reranker = models.reranker(given)
    if reranker is None:
        raise given.mistake("reranker_name_or_path", "required, but not given: a folder or a hub id")
    settings = _settings(given, reranker)
    models.fetch(reranker.model, reranker.revision)
    with work_folder(given, output) as work:
        listed = output.with_name(f"{output.name}.rejected")
        found = rows.into_tables(given, work, files, [], listed, scores=False)
        write(files, found["queries"], _score(work, found, settings, reranker, devices), output)


def _settings(given: Given, reranker: RerankerConfig) -> ScoreConfig:
    budget = models.token_budget(given, "reranker_batch_size", reranker.max_length, reranker.dtype)
    bound = {"batch_tokens": budget["max_tokens_per_batch"]} if budget else {}
    return given.section("score", ScoreConfig, **bound)


def _score(
    work: Work, found: dict[str, Path], settings: ScoreConfig, reranker: RerankerConfig, devices: Sequence[str]
) -> Path:
    """The table of pairs with their scores."""
    from retune.stages.score import score
    from retune.stages.scores import scores

    part, out = work.path("score/scores.parquet"), work.path("score/pairs.parquet")
    inputs = {name: found[name] for name in ("texts", "queries", "pairs")}
    of = {"settings": settings.model_dump(mode="json"), "reranker": reranker.model_dump(mode="json")}
    of["model"] = model_identity(of["reranker"]) if work.kept else None

    def do() -> None:
        scores(
            **inputs, settings=settings, reranker=reranker, out=part, state=work.path("score/state"), devices=devices
        )

    work.step("scores", "scores", [part], of, do, ["ingest"])
    work.step("score", "score", [out], {}, lambda: score(**inputs, parts=[part], out=out), ["scores"])
    return out


def write(files: Sequence[Path], queries: Path, scored: Path, output: Path) -> None:
    """Write each row of `files` with its scores.

    Args:
        scored: the table of pairs, each query's distinct positives first, then its distinct negatives.
    """
    table = tables.read(scored, "pairs", ["query_id", "score"])
    scores = table["score"].to_numpy()  # [M]
    starts = np.searchsorted(table["query_id"].to_numpy(), np.arange(tables.n_rows(queries) + 1))
    with jsonl.writer(output) as line:
        for query, _, raw in rows.numbered(files, queries):
            own = scores[starts[query] : starts[query + 1]].tolist()
            pos, neg = raw.value["pos"], raw.value.get("neg") or []
            score_of = dict(zip(dict.fromkeys([*pos, *neg]), own, strict=True))  # no text is in both
            new = {"pos_scores": [score_of[text] for text in pos], "neg_scores": [score_of[text] for text in neg]}
            spelled = {name: json.dumps(values) for name, values in new.items()}
            line(jsonl.with_columns(jsonl.line(raw).decode().strip(), spelled).encode())
    log.info("%s: %s rows, %s scores", output, f"{len(starts) - 1:,}", f"{len(scores):,}")
