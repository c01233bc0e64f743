"""A ready reranker that judges candidates while they are mined, each distinct (query text, passage) once.

Knows ids, texts and a reranker's scores; nothing of who asks, or what becomes of the scores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from retune import tables
from retune.config import RerankerConfig
from retune.data.text import shown
from retune.runtime import UserError, log, progress

BLOCK = 65536  # distinct pairs put together and sorted by length at a time


class Judge:
    """Scores of pairs by their ids; call `close` at the end."""

    def __init__(self, model, queries: Path, texts: Path) -> None:
        """`model` is a Reranker; `queries` and `texts` are the tables that ids refer to."""
        self._model, self._bar = model, progress(None, "teacher", "pairs")
        self._queries = tables.read(queries, "queries", ["text"])["text"]
        self._texts = tables.read(texts, "texts", ["text"])["text"]
        same = self._queries.combine_chunks().dictionary_encode().indices.to_numpy()
        _, first, counts = np.unique(same, return_index=True, return_counts=True)
        self._first = first[same]  # [Q]: the first query of the same text
        self._shared = counts[same] > 1  # [Q]
        # Pairs of a query whose text no other has never come twice, so only those of the others are remembered.
        self._known: dict[int, float] = {}
        self.count = 0
        """Pairs computed so far."""

    @classmethod
    def load(cls, reranker: RerankerConfig, queries: Path, texts: Path) -> Judge:
        from retune.model.reranker import Reranker

        model = Reranker.load(reranker)
        log.info("teacher: %s, %s on %s", reranker.model, model.dtype, model.device)
        return cls(model, queries, texts)

    def __call__(self, query_ids: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
        """Scores of the pairs (query_ids[i], text_ids[i]), float32 [n].

        Raises:
            UserError: for a score that is not finite, naming the pair.
        """
        codes, back = np.unique(self._first[query_ids] * len(self._texts) + text_ids, return_inverse=True)
        known = [self._known.get(code) for code in codes.tolist()] if self._known else [None] * len(codes)
        scores = np.array([np.nan if score is None else score for score in known], np.float32)
        new = np.flatnonzero(np.isnan(scores))
        for start in range(0, len(new), BLOCK):
            rows = new[start : start + BLOCK]
            scores[rows] = self._compute(*np.divmod(codes[rows], len(self._texts)))
        again = new[self._shared[codes[new] // len(self._texts)]]
        self._known.update(zip(codes[again].tolist(), scores[again].tolist(), strict=True))
        return scores[back]

    def _compute(self, query_ids: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
        queries, query_rows = np.unique(query_ids, return_inverse=True)
        texts, text_rows = np.unique(text_ids, return_inverse=True)
        asked, read = self._queries.take(queries).to_pylist(), self._texts.take(texts).to_pylist()
        model = self._model
        tokens = model.join(model.pieces(asked, "query"), model.pieces(read, "passage"), query_rows, text_rows)
        scores = model.scores(tokens, bar=self._bar)
        self.count += len(scores)
        if not np.isfinite(scores).all():
            bad = int(np.argmin(np.isfinite(scores)))
            raise UserError(
                f"the score of query {shown(asked[query_rows[bad]])} and text {shown(read[text_rows[bad]])} is not "
                "finite; set reranker.dtype: float32, or the teacher is broken"
            )
        return scores

    def close(self) -> None:
        self._bar.close()
