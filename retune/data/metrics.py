"""Values of retrieval measures, one for every query.

Rankings and judgments become one matrix of grades; what the fine-tuning scripts that users come
from define in their own way (MRR, Recall, Hit) is computed on it, the rest by `ir_measures`, the
field's reference.  Knows nothing of models, files or means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ir_measures
import numpy as np

CHUNK = 2048  # queries handed to ir_measures at once


@dataclass(frozen=True)
class Judgments:
    """What a benchmark's judges said, sorted by query and passage; a passage is relevant from grade `level` on."""

    query_ids: np.ndarray
    """int64 [q], rising: every query with at least one judgment."""
    rows: np.ndarray
    """int64 [j]: index into `query_ids` of each judgment."""
    text_ids: np.ndarray
    """int64 [j]."""
    grades: np.ndarray
    """int64 [j]."""
    n_relevant: np.ndarray
    """int64 [q]: relevant passages of each query."""
    level: int = 1
    """nDCG alone knows grades; to all other measures a passage is relevant or not."""


@dataclass(frozen=True)
class Ranking:
    """A run beside its judgments: passages in the order in which they were retrieved."""

    text_ids: np.ndarray
    """int64 [q, depth], -1 behind the last passage of a query."""
    grades: np.ndarray
    """int64 [q, depth], 0 where unjudged."""
    judgments: Judgments

    @property
    def relevant(self) -> np.ndarray:
        """bool [q, depth]."""
        return self.grades >= self.judgments.level


def judge(query_ids: np.ndarray, text_ids: np.ndarray, labels: np.ndarray, level: int = 1) -> Judgments:
    """Judgments from the columns of a table of pairs; of a pair judged twice the higher grade counts.

    Args:
        level: lowest grade of a relevant passage.
    """
    order = np.lexsort((-labels.astype(np.int64), text_ids, query_ids))
    query_ids, text_ids, labels = query_ids[order], text_ids[order], labels[order]
    first = np.ones(len(order), bool)
    first[1:] = (query_ids[1:] != query_ids[:-1]) | (text_ids[1:] != text_ids[:-1])
    unique, rows = np.unique(query_ids[first], return_inverse=True)
    grades = labels[first].astype(np.int64)
    n_relevant = np.bincount(rows, weights=grades >= level, minlength=len(unique)).astype(np.int64)
    return Judgments(unique, rows, text_ids[first], grades, n_relevant, level)


def align(query_ids: np.ndarray, text_ids: np.ndarray, ranks: np.ndarray, judgments: Judgments) -> Ranking:
    """Lay the columns of a run (ranks from 1) beside the judgments; queries without judgments are left out."""
    depth = int(ranks.max(initial=1))
    rows, judged = _positions(judgments.query_ids, query_ids)
    rows, columns, found = rows[judged], ranks[judged].astype(np.int64) - 1, text_ids[judged]
    ids = np.full((len(judgments.query_ids), depth), -1, np.int64)  # [q, depth]
    ids[rows, columns] = found

    # one number for a (query, passage), so that one sorted search finds all grades
    width = 1 + max(found.max(initial=0), judgments.text_ids.max(initial=0))
    position, known = _positions(judgments.rows * width + judgments.text_ids, rows * width + found)
    grades = np.zeros(ids.shape, np.int64)
    grades[rows[known], columns[known]] = judgments.grades[position[known]]
    return Ranking(ids, grades, judgments)


def _positions(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each `wanted` in the sorted `keys`, and whether it is there at all."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return index, keys[index] == wanted


def mrr(ranking: Ranking, k: int) -> np.ndarray:
    """1 / rank of the first relevant passage within `k`, else 0; float64 [q]."""
    hits = ranking.relevant[:, :k]  # [q, k]
    return np.where(hits.any(1), 1.0 / (hits.argmax(1) + 1), 0.0)


def recall(ranking: Ranking, k: int) -> np.ndarray:
    """Relevant passages within `k` / min(k, relevant passages); float64 [q].

    FlagEmbedding's definition: 1 is always within reach, unlike with the usual denominator.
    """
    found = ranking.relevant[:, :k].sum(1)
    return found / np.clip(ranking.judgments.n_relevant, 1, k)


def hit(ranking: Ranking, k: int) -> np.ndarray:
    """1 where any passage within `k` is relevant, else 0; float64 [q]."""
    return ranking.relevant[:, :k].any(1).astype(np.float64)


OWN = {"MRR": mrr, "Recall": recall, "Hit": hit}
REFERENCE = {
    "nDCG": lambda level: ir_measures.nDCG,
    "MAP": lambda level: ir_measures.AP(rel=level),
    "P": lambda level: ir_measures.P(rel=level),
}
MEASURES = ("MRR", "Recall", "nDCG", "MAP", "P", "Hit")


def values(ranking: Ranking, cutoffs: Sequence[int]) -> dict[tuple[str, int], np.ndarray]:
    """Value of every query for every (measure, cutoff), float64 [q] each, in the order of `MEASURES`."""
    columns = {(name, k): measure(ranking, k) for name, measure in OWN.items() for k in cutoffs}
    columns |= _reference_values(ranking, cutoffs)
    return {(name, k): columns[name, k] for name in MEASURES for k in cutoffs}


def _reference_values(ranking: Ranking, cutoffs: Sequence[int]) -> dict[tuple[str, int], np.ndarray]:
    level = ranking.judgments.level
    keys = {measure(level) @ k: (name, k) for name, measure in REFERENCE.items() for k in cutoffs}
    n = len(ranking.text_ids)
    columns = {key: np.zeros(n) for key in keys.values()}
    for start in range(0, n, CHUNK):
        rows = range(start, min(start + CHUNK, n))
        # this provider by name: with the default one, what else is installed would decide
        evaluator = ir_measures.pytrec_eval.evaluator(list(keys), dict(_qrels(ranking.judgments, rows)))
        for metric in evaluator.iter_calc(dict(_run(ranking, rows, max(cutoffs)))):
            columns[keys[metric.measure]][int(metric.query_id)] = metric.value
    return columns


def _qrels(judgments: Judgments, rows: range) -> Iterator[tuple[str, dict[str, int]]]:
    bounds = np.searchsorted(judgments.rows, [*rows, rows.stop]).tolist()
    for row, start, stop in zip(rows, bounds, bounds[1:], strict=False):
        ids, grades = judgments.text_ids[start:stop].tolist(), judgments.grades[start:stop].tolist()
        yield str(row), {str(text_id): grade for text_id, grade in zip(ids, grades, strict=True)}


def _run(ranking: Ranking, rows: range, depth: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The provider sorts by score and breaks ties by name; with ranks as scores our order is the order."""
    for row in rows:
        ids = ranking.text_ids[row, :depth].tolist()
        yield str(row), {str(text_id): -float(rank) for rank, text_id in enumerate(ids) if text_id >= 0}
