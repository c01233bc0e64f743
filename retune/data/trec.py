"""Runs in TREC's form, `query Q0 passage rank score tag`, for trec_eval and its kin.

trec_eval sorts by score and breaks ties by id; so that it sees our order, a score that is not below the one
before is written as the next smaller float32.  Knows tables of runs, queries and texts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retune import tables
from retune.runtime import atomic


def write(run: Path, queries: Path, texts: Path, out: Path, tag: str) -> None:
    """Write the table `run` with the ids that queries and passages have in their sources.

    Args:
        queries, texts: tables of the benchmark; a row without a `key` is named by its number.
        tag: the last column; white space in it becomes `_`.
    """
    found = tables.read(run, "run")
    query_of = _keys(queries, "queries", "query_id", found["query_id"].to_numpy())
    text_of = _keys(texts, "texts", "text_id", found["text_id"].to_numpy())
    tag = "_".join(tag.split()) or "retune"
    columns = (found[name].to_pylist() for name in ("query_id", "text_id", "rank"))
    scores = _falling(found["query_id"].to_numpy(), found["score"].to_numpy())
    with atomic(out) as part, part.open("w", encoding="utf-8") as file:
        for query, text, rank, score in zip(*columns, scores, strict=True):
            file.write(f"{query_of[query]} Q0 {text_of[text]} {rank} {score} {tag}\n")


def _falling(query_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Scores, best first within each query, made to fall strictly: float32 [n]."""
    scores = scores.astype(np.float32)  # a copy
    inside = query_ids[1:] == query_ids[:-1]
    while (rising := np.flatnonzero(inside & (scores[1:] >= scores[:-1]))).size:
        scores[rising + 1] = np.nextafter(scores[rising], np.float32(-np.inf))
    return scores


def _keys(table: Path, name: str, column: str, wanted: np.ndarray) -> dict[int, str]:
    """{id: key} of the wanted rows."""
    found: dict[int, str] = {}
    wanted = np.unique(wanted)
    for batch in tables.batches(table, name, [column, "key"]):
        mask = np.isin(batch[column].to_numpy(), wanted)
        part = pc.filter(pa.Table.from_batches([batch]), pa.array(mask))
        found |= zip(part[column].to_pylist(), part["key"].to_pylist(), strict=True)
    return {row: str(row) if key is None else key for row, key in found.items()}
