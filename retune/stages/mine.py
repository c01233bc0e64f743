"""mine: for each query, hard negatives from its nearest texts.

Positives are never taken, for all queries that have the same text; nor is the query itself.
Which candidates are drawn depends on the seed, the query and the text alone, never on batches,
shards or threads: the same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from retune import tables
from retune.config import MineConfig, bounds
from retune.data import search
from retune.data.text import normalise
from retune.runtime import UserError, log


@dataclass
class Data:
    """The tables that mining reads, as arrays.

    group int64 [Q]: queries with the same normalised text share a number. positives: a frame
    (query_id, text_id) of positive pairs. excluded int64, sorted: codes group * n_texts + text_id
    that may not be taken. closed bool [T]: texts that belong to set-aside queries.
    """

    n_texts: int
    train: np.ndarray
    group: np.ndarray
    pairs: pl.DataFrame
    excluded: np.ndarray
    closed: np.ndarray
    query_bin: np.ndarray | None = None
    text_bin: np.ndarray | None = None


def mine(
    *, texts: Path, queries: Path, pairs: Path, query_vectors: Path, text_vectors: Sequence[Path],
    settings: MineConfig, seed: int, out: Path, lengths: Path | None = None, bins: Path | None = None,
) -> None:  # fmt: skip
    """Write the pairs of the training queries with mined negatives and similarities.

    Args:
        query_vectors, text_vectors: embeddings tables, the texts' in shards of rising ids.
        lengths, bins: needed for `pool: bin`.

    Raises:
        UserError: where `on_shortage: error` and a query has too few candidates.
    """
    search.same_model(query_vectors, text_vectors)
    data = _load(texts, queries, pairs, settings, lengths, bins)
    vectors = search.load(query_vectors)
    given = data.pairs.filter(pl.col("query_id").is_in(data.train.tolist()))
    if not settings.keep_existing_neg:
        given = given.filter(pl.col("label") > 0)
    similarity = search.pair_scores(vectors, text_vectors, given["query_id"].to_numpy(), given["text_id"].to_numpy())
    given = given.with_columns(pl.Series("similarity", similarity, pl.Float32))
    mined = _mine(data, given, vectors, text_vectors, settings, seed)
    order = pl.concat([given, mined]).with_columns(_row=pl.int_range(pl.len()))
    order = order.sort("query_id", -pl.col("label"), pl.col("origin") != "given", "_row").drop("_row")
    if settings.on_shortage == "drop":
        enough = mined.group_by("query_id").len().filter(pl.col("len") >= settings.negative_number)
        order = order.filter(pl.col("query_id").is_in(enough["query_id"].to_list()))
    tables.write(out, "pairs", order.to_arrow().select(tables.TABLES["pairs"].names))


def _load(
    texts: Path, queries: Path, pairs: Path, settings: MineConfig, lengths: Path | None, bins: Path | None
) -> Data:
    asked = pl.from_arrow(tables.read(queries, "queries", ["query_id", "text", "split"]))
    table = pl.from_arrow(tables.read(pairs, "pairs"))
    names = [normalise(text) for text in asked["text"].to_list()]
    group = pl.Series(names, dtype=pl.String).rank("dense").to_numpy().astype(np.int64) - 1
    n_texts = tables.n_rows(texts)
    # the query itself, wherever it stands among the texts
    number = dict(zip(names, group.tolist(), strict=True))
    own, seen = [], 0
    for batch in tables.batches(texts, "texts", ["text"]):
        found = [(number.get(normalise(text)), row) for row, text in enumerate(batch["text"].to_pylist(), seen)]
        own += [g * n_texts + row for g, row in found if g is not None]
        seen += len(batch)
    positive = table.filter(pl.col("label") > 0)
    taken = positive if not settings.keep_existing_neg else table
    codes = group[taken["query_id"].to_numpy()] * n_texts + taken["text_id"].to_numpy()
    aside = asked.filter(pl.col("split") != "train")["query_id"].to_list()
    closed = np.zeros(n_texts, bool)
    closed[positive.filter(pl.col("query_id").is_in(aside))["text_id"].to_numpy()] = True
    closed[positive.filter(~pl.col("query_id").is_in(aside))["text_id"].to_numpy()] = False
    train = asked.filter(pl.col("split") == "train")["query_id"].to_numpy()
    data = Data(n_texts, train, group, table, np.unique(np.concatenate([codes, np.array(own, np.int64)])), closed)
    if settings.pool == "bin":
        _bins(data, lengths, bins)
    return data


def _bins(data: Data, lengths: Path, bins: Path) -> None:
    """Number the length bins; a text's bin is the one that its own length falls into."""
    table = pl.from_arrow(tables.read(bins, "bins"))
    names = sorted(table["length_bin"].unique().to_list(), key=lambda name: int(name.split("-")[1]))
    starts = np.array([int(name.split("-")[1]) for name in names])
    data.query_bin = table["length_bin"].replace_strict(names, list(range(len(names)))).to_numpy()
    tokens = tables.read(lengths, "lengths", ["n_tokens"])["n_tokens"].to_numpy()
    data.text_bin = np.searchsorted(starts, tokens, side="right") - 1


def _mine(
    data: Data, given: pl.DataFrame, vectors: np.ndarray, shards: Sequence[Path], settings: MineConfig, seed: int
) -> pl.DataFrame:
    """The mined negatives of all training queries: a frame with the columns of `given`."""
    low, high = (int(bound) for bound in bounds(settings.range_for_sampling))
    floor = _ceilings(given, len(vectors), settings)
    parts, short = [], 0
    for start in range(0, len(data.train), settings.search_batch_size):
        rows = data.train[start : start + settings.search_batch_size]
        scores, ids = search.top_k(vectors[rows], shards, high, settings.search_batch_size, search.backend())
        scores, ids = scores[:, low:], ids[:, low:]  # [Q, W]
        allowed = _allowed(data, rows, ids) & _within(scores, floor[rows], settings)
        chosen = _choose(scores, ids, allowed, rows, settings, seed)  # [Q, W] bool
        missing = settings.negative_number - chosen.sum(1)
        short += int((missing > 0).sum())
        parts.append(_frame(rows, scores, ids, chosen))
        if settings.on_shortage == "error" and (missing > 0).any():
            query = int(rows[np.argmax(missing > 0)])
            raise UserError(
                f"mine: {int((missing > 0).sum())} queries have fewer than {settings.negative_number} candidates, first "
                f"query {query}; widen mine.range_for_sampling, or set mine.on_shortage to random or drop"
            )
        if settings.on_shortage == "random":
            taken = [ids[i][chosen[i]] for i in range(len(rows))]
            parts.append(_fill(data, rows, taken, missing, vectors, shards, seed))
    log.info("%d queries, %d of them short of candidates (%s)", len(data.train), short, settings.on_shortage)
    return pl.concat(parts) if parts else given.clear()


def _allowed(data: Data, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Which candidates may be taken at all: bool [Q, W]."""
    codes = data.group[rows][:, None] * data.n_texts + ids
    at = np.minimum(np.searchsorted(data.excluded, codes), max(len(data.excluded) - 1, 0))
    hit = data.excluded[at] == codes if len(data.excluded) else np.zeros(ids.shape, bool)
    allowed = (ids >= 0) & ~hit & ~data.closed[ids]
    if data.query_bin is not None:
        allowed &= data.text_bin[ids] == data.query_bin[rows][:, None]
    return allowed


def _ceilings(given: pl.DataFrame, n_queries: int, settings: MineConfig) -> np.ndarray:
    """The highest similarity that a negative may have, by query: float32 [Q]; the lowest positive counts."""
    ceiling = np.full(n_queries, np.inf, np.float32)
    lowest = given.filter(pl.col("label") > 0).group_by("query_id").agg(pl.col("similarity").min())
    ids, positive = lowest["query_id"].to_numpy(), lowest["similarity"].to_numpy()
    if settings.relative_margin is not None:
        ceiling[ids] = np.minimum(ceiling[ids], positive * (1 - settings.relative_margin))
    if settings.absolute_margin is not None:
        ceiling[ids] = np.minimum(ceiling[ids], positive - settings.absolute_margin)
    return ceiling


def _within(scores: np.ndarray, ceiling: np.ndarray, settings: MineConfig) -> np.ndarray:
    within = scores <= ceiling[:, None]
    if settings.similarity_range:
        low, high = bounds(settings.similarity_range)
        within &= (scores >= low) & (scores <= high)
    return within


def _mix(*parts: np.ndarray | int) -> np.ndarray:
    """A well-mixed uint64 from integers (splitmix64 after each): random, yet a function of its arguments alone."""
    mixed = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            mixed = (mixed ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def _by_chance(scores: np.ndarray, ids: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    return _mix(seed, rows[:, None], ids).astype(np.float64)


def _by_rank(scores: np.ndarray, ids: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    return np.broadcast_to(np.arange(ids.shape[1], dtype=np.float64), ids.shape)


SAMPLING: dict[str, Callable[..., np.ndarray]] = {"random": _by_chance, "top": _by_rank}


def _choose(
    scores: np.ndarray, ids: np.ndarray, allowed: np.ndarray, rows: np.ndarray, settings: MineConfig, seed: int
) -> np.ndarray:
    """The `negative_number` allowed candidates of lowest priority: bool [Q, W]."""
    priority = np.where(allowed, SAMPLING[settings.sampling](scores, ids, rows, seed), np.inf)
    best = np.argsort(priority, axis=1, kind="stable")[:, : settings.negative_number]
    chosen = np.zeros(ids.shape, bool)
    np.put_along_axis(chosen, best, True, 1)
    return chosen & allowed


def _frame(rows: np.ndarray, scores: np.ndarray, ids: np.ndarray, chosen: np.ndarray) -> pl.DataFrame:
    at, where = np.nonzero(chosen)
    return _rows(rows[at], ids[at, where], scores[at, where], "mined")


def _rows(query_ids: np.ndarray, text_ids: np.ndarray, similarity: np.ndarray, origin: str) -> pl.DataFrame:
    columns = {
        "query_id": pl.Series(query_ids, dtype=pl.Int64), "text_id": pl.Series(text_ids, dtype=pl.Int64),
        "label": pl.Series(np.zeros(len(text_ids)), dtype=pl.Int8), "origin": pl.Series([origin] * len(text_ids), dtype=pl.String),
        "similarity": pl.Series(similarity, dtype=pl.Float32), "score": pl.Series([None] * len(text_ids), dtype=pl.Float32),
    }  # fmt: skip
    return pl.DataFrame(columns)


def _fill(
    data: Data, rows: np.ndarray, taken: list[np.ndarray], missing: np.ndarray, vectors: np.ndarray,
    shards: Sequence[Path], seed: int,
) -> pl.DataFrame:  # fmt: skip
    """Random texts for the queries that came short, by a walk over the texts of each query's own."""
    query_ids, text_ids = [], []
    for i in np.flatnonzero(missing > 0):
        rng = np.random.default_rng([seed, int(rows[i])])
        need, used = int(missing[i]), set(taken[i].tolist())
        for _ in range(8):
            drawn = dict.fromkeys(rng.integers(0, data.n_texts, 4 * need + 16).tolist())
            fresh = np.array([one for one in drawn if one not in used], np.int64)
            fresh = fresh[_allowed(data, rows[i : i + 1], fresh[None])[0]][:need]
            query_ids += [int(rows[i])] * len(fresh)
            text_ids += fresh.tolist()
            used.update(fresh.tolist())
            need -= len(fresh)
            if need <= 0:
                break
    query_ids, text_ids = np.array(query_ids, np.int64), np.array(text_ids, np.int64)
    return _rows(query_ids, text_ids, search.pair_scores(vectors, shards, query_ids, text_ids), "random")
