"""The queries that were set aside, with what they are searched in: their positives and a draw of other passages.

Small enough to be embedded again and again while training goes on.  Knows tables; nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retune import tables
from retune.data.candidates import read_texts
from retune.data.metrics import align, judge, values
from retune.runtime import log


@dataclass(frozen=True)
class DevSet:
    """Q queries and P passages, with the judgments that go with them."""

    queries: list[str]
    prompts: list[str | None]
    """A query's own instruction."""
    passages: list[str]
    rows: np.ndarray
    """Query of each judgment, int64 [J]."""
    columns: np.ndarray
    """Passage of each judgment, int64 [J]."""
    grades: np.ndarray
    """int8 [J]"""

    def ndcg(self, scores: np.ndarray, k: int = 10) -> float:
        """Mean nDCG@k of scores float [Q, P]; ties go to the earlier passage."""
        k = min(k, scores.shape[1])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # [Q, k]
        n = len(scores)
        ranks = np.tile(np.arange(1, k + 1), n)
        ranking = align(np.repeat(np.arange(n), k), best.ravel(), ranks, judge(self.rows, self.columns, self.grades))
        return float(values(ranking, [k])["nDCG", k].mean())


def load(texts: Path, queries: Path, judgments: Path, *, seed: int, most_queries: int, passages: int) -> DevSet | None:
    """The dev set of the tables; None where no query with a positive was set aside.

    Args:
        judgments: pairs with the positives of the queries that were set aside.
        most_queries: take at most so many, drawn with the seed.
        passages: as many others, drawn with the seed, are searched besides the positives.
    """
    table = tables.read(queries, "queries", ["query_id", "text", "prompt", "split"])
    aside = table["split"].to_numpy() == "dev"
    pairs = tables.read(judgments, "pairs", ["query_id", "text_id", "label"])
    query_id, text_id, label = (pairs[name].to_numpy() for name in ("query_id", "text_id", "label"))
    used = aside[query_id] & (label > 0)
    chosen = np.unique(query_id[used])
    if not len(chosen):
        return None
    rng = np.random.default_rng([seed, len(chosen)])
    if len(chosen) > most_queries:
        chosen = np.sort(rng.choice(chosen, most_queries, replace=False))
    used &= np.isin(query_id, chosen)
    query_id, text_id, label = query_id[used], text_id[used], label[used]
    n_texts = tables.n_rows(texts)
    others = rng.choice(n_texts, min(passages, n_texts), replace=False)
    searched = np.union1d(text_id, others)
    log.info("dev set: %d queries, %d passages", len(chosen), len(searched))
    asked = table.take(chosen)
    return DevSet(
        asked["text"].to_pylist(), asked["prompt"].to_pylist(), read_texts(texts, searched),
        np.searchsorted(chosen, query_id), np.searchsorted(searched, text_id), label,
    )  # fmt: skip
