"""Training queries with their positives and negatives, read from the tables into flat arrays.

What a stage trains on is decided and checked here, before any model is loaded: which queries are
left out and why, that teacher scores are there where they are needed, and random negatives for
queries that have none.  Knows nothing of tokens or models.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retune import tables
from retune.data.text import normalise
from retune.runtime import UserError, log


@dataclass(frozen=True)
class TrainSet:
    """N queries and their M candidates: positives first, then negatives, query after query."""

    query_ids: np.ndarray
    """int64 [N]"""
    queries: list[str]
    prompts: list[str | None]
    """A query's own instruction."""
    types: list[str | None]
    """A query's kind of task, see `task_types.py`."""
    datasets: list[str]
    """A query's dataset."""
    length_bins: list[str]
    """Its length bin; "" where no table of bins was given."""
    batch_sizes: np.ndarray
    """Batch size that its dataset asks for, float64 [N]; NaN where it asks for none."""
    sources: list[str]
    """`file:line` of each query, for messages."""
    in_batch: np.ndarray
    """Whether other queries' passages count as negatives, bool [N]."""
    same_text: np.ndarray
    """Number of the query's normalised text, int64 [N]."""
    starts: np.ndarray
    """First candidate of each query, int64 [N]."""
    n_positives: np.ndarray
    n_negatives: np.ndarray
    text_ids: np.ndarray
    """int64 [M]"""
    scores: np.ndarray
    """Teacher scores, float32 [M]; NaN where there is none."""
    categories: list[str | None] = field(default_factory=list)
    """What a query's class or cluster is called."""

    def __len__(self) -> int:
        return len(self.query_ids)

    def take(self, rows: np.ndarray) -> TrainSet:
        """The queries at `rows`, in that order, with their candidates."""
        counts = (self.n_positives + self.n_negatives)[rows]
        starts = np.cumsum(counts) - counts
        kept = np.arange(counts.sum()) + np.repeat(self.starts[rows] - starts, counts)
        changed = {"starts": starts, "text_ids": self.text_ids[kept], "scores": self.scores[kept]}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in changed and len(value):
                changed[one.name] = [value[row] for row in rows] if isinstance(value, list) else value[rows]
        return replace(self, **changed)

    def hold_back(self, number: int, seed: int) -> tuple[TrainSet, TrainSet]:
        """(the others, `number` queries drawn with the seed); queries of one text stay together."""
        order = np.random.default_rng([seed, len(self), 1]).permutation(int(self.same_text.max(initial=-1)) + 1)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        sizes = np.bincount(self.same_text, minlength=len(order))[order]
        held = place[self.same_text] < np.searchsorted(np.cumsum(sizes), number, side="right")
        return self.take(np.flatnonzero(~held)), self.take(np.flatnonzero(held))


def load(
    texts: Path, queries: Path, pairs: Path, *, group_size: int, seed: int, bins: Path | None = None,
    drop_longer_than: int | None = None, scored: bool = False, max_queries: int | None = None,
) -> TrainSet:  # fmt: skip
    """The training queries of the tables at `texts`, `queries` and `pairs`.

    Args:
        group_size: passages of a group; from 2 on, a query without negatives gets random ones.
        bins: lengths, needed where `drop_longer_than` (tokens) is given, or length bins count.
        scored: whether every candidate needs a teacher score.
        max_queries: take at most so many, drawn with the seed.

    Raises:
        UserError: if no query is left, or a teacher score is missing.
    """
    table = tables.read(queries, "queries")
    kept = pc.equal(table["split"], "train").to_numpy()
    if drop_longer_than is not None:
        kept &= ~_longer(bins, drop_longer_than, len(kept))
    query_id, text_id, positive, score = _pairs(pairs, kept)
    with_positive = np.bincount(query_id[positive], minlength=len(kept)) > 0
    if without := int((kept & ~with_positive).sum()):
        log.info("%d queries without a positive are left out", without)
    rows = np.flatnonzero(kept & with_positive)
    if not len(rows):
        raise UserError(f"{queries}: no training query with a positive is left; see ingest.train, split and mine")
    if max_queries is not None and max_queries < len(rows):
        rows = np.sort(np.random.default_rng([seed, len(rows)]).choice(rows, max_queries, replace=False))
    chosen = np.zeros(len(kept), dtype=bool)
    chosen[rows] = True
    used = chosen[query_id]
    query_id, text_id, positive, score = query_id[used], text_id[used], positive[used], score[used]

    table = table.take(pa.array(rows))
    sources = table["source"].to_pylist()
    if scored:
        _check_scores(pairs, query_id, score, rows, sources)
    query = np.searchsorted(rows, query_id)  # [M]: row within the chosen queries
    names = [normalise(text) for text in table["text"].to_pylist()]
    same_text = np.unique(np.array(names, dtype=object), return_inverse=True)[1].astype(np.int64)
    if group_size > 1:
        lacking = np.flatnonzero(np.bincount(query[~positive], minlength=len(rows)) == 0)
        if len(lacking):
            if scored:
                raise UserError(f"{sources[lacking[0]]}: no negatives, so no teacher scores to learn from; mine some")
            extra = _random_negatives(lacking, query, text_id, positive, same_text, texts, 4 * (group_size - 1), seed)
            query, text_id = np.append(query, extra[0]), np.append(text_id, extra[1])
            positive = np.append(positive, np.zeros(len(extra[0]), dtype=bool))
            score = np.append(score, np.full(len(extra[0]), np.nan, np.float32))
    order = np.lexsort((~positive, query))  # stable: the tables' order within positives and negatives
    counts = np.bincount(query, minlength=len(rows))
    n_positives = np.bincount(query[positive], minlength=len(rows))
    return TrainSet(
        query_ids=rows, queries=table["text"].to_pylist(), prompts=table["prompt"].to_pylist(),
        types=table["type"].to_pylist(), datasets=table["dataset"].to_pylist(), length_bins=_length_bins(bins, rows),
        batch_sizes=table["batch_size"].to_numpy(zero_copy_only=False).astype(np.float64), sources=sources,
        in_batch=table["in_batch_negatives"].to_numpy(), same_text=same_text, starts=np.cumsum(counts) - counts,
        n_positives=n_positives, n_negatives=counts - n_positives, text_ids=text_id[order], scores=score[order],
        categories=table["category"].to_pylist(),
    )  # fmt: skip


def read_texts(path: Path, ids: np.ndarray) -> list[str]:
    """The texts with the given ids, which must rise; the table is streamed, the rest of it never kept."""
    found: list[str] = []
    first = 0
    for batch in tables.batches(path, "texts", ["text"]):
        low, high = np.searchsorted(ids, [first, first + len(batch)])
        found += batch["text"].take(pa.array(ids[low:high] - first)).to_pylist()
        first += len(batch)
    if len(found) != len(ids):
        raise UserError(f"{path}: text_id {ids[-1]} is named by the pairs, but the table has {first} rows")
    return found


def positive_texts(data: TrainSet, path: Path) -> list[str]:
    """The texts of all positives, in the order of the candidates."""
    rows = np.concatenate([start + np.arange(n) for start, n in zip(data.starts, data.n_positives, strict=True)])
    ids, which = np.unique(data.text_ids[rows], return_inverse=True)
    found = read_texts(path, ids)
    return [found[place] for place in which]


def _longer(bins: Path | None, limit: int, n_queries: int) -> np.ndarray:
    """Queries whose longest text has more than `limit` tokens, bool [n_queries]."""
    if bins is None:
        raise UserError("split.drop_longer_than: needs the table of bins")
    table = tables.read(bins, "bins", ["query_id", "n_tokens"])
    longer = np.zeros(n_queries, dtype=bool)
    longer[table["query_id"].to_numpy()] = table["n_tokens"].to_numpy() > limit
    log.info("%d queries with a text of more than %d tokens are left out", longer.sum(), limit)
    return longer


def _length_bins(bins: Path | None, rows: np.ndarray) -> list[str]:
    if bins is None:
        return [""] * len(rows)
    table = tables.read(bins, "bins", ["query_id", "length_bin"])
    names = np.full(int(rows[-1]) + 1, "", dtype=object)
    ids = table["query_id"].to_numpy()
    known = ids <= rows[-1]
    names[ids[known]] = table["length_bin"].to_numpy(zero_copy_only=False)[known]
    return names[rows].tolist()


def _pairs(path: Path, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """query_id, text_id, whether positive, teacher score (NaN: none) of the kept queries' pairs."""
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for batch in tables.batches(path, "pairs", ["query_id", "text_id", "label", "score"]):
        query_id = batch["query_id"].to_numpy()
        used = kept[query_id]
        score = batch["score"].to_numpy(zero_copy_only=False).astype(np.float32)
        for column, values in zip(columns, (query_id, batch["text_id"], batch["label"], score), strict=True):
            column.append(np.asarray(values)[used])
    query_id, text_id, label, score = (np.concatenate(column or [np.zeros(0, np.int64)]) for column in columns)
    return query_id, text_id, label > 0, score


def _check_scores(path: Path, query_id: np.ndarray, score: np.ndarray, rows: np.ndarray, sources: list[str]) -> None:
    missing = np.isnan(score)
    if missing.any():
        source = sources[np.searchsorted(rows, query_id[missing][0])]
        raise UserError(
            f"{path}: {missing.sum()} of {len(score)} pairs have no teacher score, the first for query {source}; "
            "set `reranker` and `score`, give pos_scores and neg_scores, or switch train.knowledge_distillation off"
        )


def _random_negatives(
    lacking: np.ndarray, query: np.ndarray, text_id: np.ndarray, positive: np.ndarray, same_text: np.ndarray,
    texts: Path, wanted: int, seed: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Up to `wanted` random passages for each lacking query, none a positive of a query of the same text."""
    n_texts = tables.n_rows(texts)
    keys, ids = same_text[query[positive]], text_id[positive]
    order = np.argsort(keys, kind="stable")
    keys, ids = keys[order], ids[order]
    owners, found = [], []
    for row in lacking:
        low, high = np.searchsorted(keys, [same_text[row], same_text[row] + 1])
        known = np.unique(ids[low:high])
        rng = np.random.default_rng([seed, row])
        drawn = rng.choice(n_texts, min(n_texts, wanted + len(known)), replace=False)
        drawn = drawn[~np.isin(drawn, known)][:wanted]
        if not len(drawn):
            raise UserError(f"{texts}: nothing but positives of a query, so it can have no negatives; add passages")
        owners.append(np.full(len(drawn), row))
        found.append(drawn)
    log.info("%d queries without negatives get random ones", len(lacking))
    return np.concatenate(owners), np.concatenate(found)
