"""Pairs and their teacher scores: which are distinct, and which negatives the teacher takes for positives.

Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from retune import tables


@dataclass(frozen=True)
class Distinct:
    """The D distinct (query text, passage) among M pairs, in the order of the queries.

    query_ids int64 [D]: the first query of each text. text_ids int64 [D]. back int64 [M]: the distinct pair of each
    pair; -1 for one that is not to be scored.
    """

    query_ids: np.ndarray
    text_ids: np.ndarray
    back: np.ndarray

    def __len__(self) -> int:
        return len(self.query_ids)


def distinct_pairs(pairs: pa.Table, query_texts: pa.ChunkedArray, n_texts: int, only_missing: bool = False) -> Distinct:
    """The distinct pairs of a table of pairs; queries with the same text are one query to the teacher.

    Args:
        only_missing: leave out pairs that have a score.
    """
    same = query_texts.combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.unique(same, return_index=True)[1]  # the first query of each text
    query_ids, text_ids = pairs["query_id"].to_numpy(), pairs["text_id"].to_numpy()
    wanted = pairs["score"].is_null().to_numpy() if only_missing else np.ones(len(pairs), bool)
    codes = first[same[query_ids[wanted]]] * max(n_texts, 1) + text_ids[wanted]
    distinct, which = np.unique(codes, return_inverse=True)
    back = np.full(len(pairs), -1)
    back[wanted] = which
    return Distinct(*np.divmod(distinct, max(n_texts, 1)), back)


def read_distinct(
    texts: Path, queries: Path, pairs: Path, only_missing: bool = False
) -> tuple[Distinct, pa.ChunkedArray]:
    """The distinct pairs of the tables, and the texts of all queries."""
    query_texts = tables.read(queries, "queries", ["text"])["text"]
    table = tables.read(pairs, "pairs", ["query_id", "text_id", "score"])
    return distinct_pairs(table, query_texts, tables.n_rows(texts), only_missing), query_texts


def false_negatives(query_ids: np.ndarray, positive: np.ndarray, scores: np.ndarray, margin: float) -> np.ndarray:
    """Negatives that score above the lowest of their query's positives by more than `margin`: bool [M].

    Args:
        query_ids: int64 [M]. positive: bool [M]. scores: float [M].
    """
    lowest = np.full(int(query_ids.max(initial=-1)) + 1, np.inf)
    np.minimum.at(lowest, query_ids[positive], scores[positive])
    return ~positive & (scores > lowest[query_ids] + margin)
