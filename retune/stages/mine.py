"""mine: for each query, hard negatives from its nearest texts.

Positives are never taken, for all queries that read the same; nor is the query itself, nor a text
that differs from either in case or white space only.  The same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from retune import tables
from retune.config import MineConfig, bounds
from retune.data import negatives, search
from retune.data.negatives import Exclusions
from retune.data.text import digests, normalise, shown
from retune.runtime import UserError, log, progress


@dataclass(frozen=True)
class Data:
    """The tables that mining reads.

    train int64: the queries to mine for.  pairs: the table `pairs`.  query_bin [Q], text_bin [T]: numbers of the
    length bins, where negatives come from the query's own bin.
    """

    train: np.ndarray
    pairs: pl.DataFrame
    exclusions: Exclusions
    n_texts: int
    query_bin: np.ndarray | None = None
    text_bin: np.ndarray | None = None

    def pool(self, query: int) -> np.ndarray | None:
        """The texts that the query may have: bool [T], None for all."""
        return None if self.query_bin is None else self.text_bin == self.query_bin[query]


@dataclass(frozen=True)
class Shortage:
    """A query with too few candidates; `barred` are the texts which it has, or which are too similar to it."""

    query: int
    missing: int
    barred: np.ndarray


def mine(
    *, texts: Path, queries: Path, pairs: Path, query_vectors: Path, text_vectors: Sequence[Path],
    settings: MineConfig, seed: int, out: Path, lengths: Path | None = None, bins: Path | None = None,
) -> None:  # fmt: skip
    """Write the pairs of the training queries with mined negatives and similarities.

    Args:
        query_vectors, text_vectors: embeddings tables, the texts' in shards of rising ids.
        lengths, bins: needed for `pool: bin`.

    Raises:
        UserError: where `on_shortage: error` and a query has too few candidates, or the vectors are of other tables.
    """
    _check_vectors(texts, queries, query_vectors, text_vectors)
    data = _load(texts, queries, pairs, settings)
    if settings.pool == "bin":
        data = _with_bins(data, lengths, bins)
    vectors = search.load(query_vectors)
    given = data.pairs.filter(pl.col("query_id").is_in(data.train))
    if not settings.keep_existing_neg:
        given = given.filter(pl.col("label") > 0)
    similarity = search.pair_scores(vectors, text_vectors, given["query_id"].to_numpy(), given["text_id"].to_numpy())
    given = given.with_columns(pl.Series("similarity", similarity, pl.Float32))
    mined, short = _mine(data, given, vectors, text_vectors, settings, seed)
    log.info("%d queries, %d of them short of candidates (%s)", len(data.train), len(short), settings.on_shortage)
    if short and settings.on_shortage == "error":
        raise _too_few(short[0].query, len(short), queries, settings)
    if short and settings.on_shortage == "random":
        mined = pl.concat([mined, _fill(data, short, vectors, text_vectors, seed)])
    if short and settings.on_shortage == "drop":
        given, mined = (table.filter(~pl.col("query_id").is_in([s.query for s in short])) for table in (given, mined))
    table = pl.concat([given, mined]).with_columns(_row=pl.int_range(pl.len()))
    table = table.sort("query_id", -pl.col("label"), pl.col("origin") != "given", "_row")
    tables.write(out, "pairs", table.select(tables.TABLES["pairs"].names).to_arrow())


def _check_vectors(texts: Path, queries: Path, query_vectors: Path, text_vectors: Sequence[Path]) -> None:
    search.same_model(query_vectors, text_vectors)
    for table, found in ((queries, [query_vectors]), (texts, text_vectors)):
        if search.count(found) != tables.n_rows(table):
            raise UserError(
                f"{found[0]}: {search.count(found)} vectors for {tables.n_rows(table)} rows of {table}; "
                "delete the vectors and run again"
            )


def _load(texts: Path, queries: Path, pairs: Path, settings: MineConfig) -> Data:
    asked = pl.from_arrow(tables.read(queries, "queries", ["query_id", "text", "split"]))
    table = pl.from_arrow(tables.read(pairs, "pairs"))
    query_codes = _reading(asked["text"].to_list())
    parts = [_reading(batch["text"].to_pylist()) for batch in tables.batches(texts, "texts", ["text"])]
    text_codes = np.concatenate([np.empty(0, np.int64), *parts])
    readings, first, back = np.unique(text_codes, return_index=True, return_inverse=True)
    reads_as, n_texts = first[back], len(text_codes)
    distinct, group = np.unique(query_codes, return_inverse=True)

    taken = table if settings.keep_existing_neg else table.filter(pl.col("label") > 0)
    codes = group[taken["query_id"].to_numpy()] * n_texts + reads_as[taken["text_id"].to_numpy()]
    _, own_group, own_reading = np.intersect1d(distinct, readings, assume_unique=True, return_indices=True)
    codes = np.concatenate([codes, own_group * n_texts + first[own_reading]])  # and the query itself

    trained = (asked["split"] == "train").to_numpy()
    positive = table.filter(pl.col("label") > 0)
    belongs = trained[positive["query_id"].to_numpy()]
    of_positive = reads_as[positive["text_id"].to_numpy()]
    closed = np.zeros(n_texts, bool)
    closed[of_positive[~belongs]] = True
    closed[of_positive[belongs]] = False
    return Data(np.flatnonzero(trained), table, Exclusions(group, reads_as, np.unique(codes), closed), n_texts)


def _reading(texts: Sequence[str]) -> np.ndarray:
    """A number for each text, the same for texts that read the same (8 bytes of a digest): int64 [n]."""
    joined = b"".join(digest[:8] for digest in digests(map(normalise, texts)))
    return np.frombuffer(joined, np.int64)


def _with_bins(data: Data, lengths: Path, bins: Path) -> Data:
    """Number the bins that hold queries; a text's bin is the one that its length falls into, -1 for none of them."""
    table = pl.from_arrow(tables.read(bins, "bins"))
    names = table["length_bin"].unique(maintain_order=True).to_list()
    query_bin = table["length_bin"].replace_strict(names, list(range(len(names))), return_dtype=pl.Int64).to_numpy()
    tokens = tables.read(lengths, "lengths", ["n_tokens"])["n_tokens"].to_numpy()
    text_bin = np.full(len(tokens), -1)
    for number, name in enumerate(names):  # such as len-500-1000, len-7000-inf
        low, high = (float(bound) for bound in name.split("-")[1:])
        text_bin[(tokens >= low) & (tokens < high)] = number
    return Data(data.train, data.pairs, data.exclusions, data.n_texts, query_bin, text_bin)


def _batches(data: Data, size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """(query ids [Q], their pool bool [T] or None) of at most `size` training queries that share a pool."""
    bins = np.zeros(len(data.train), int) if data.query_bin is None else data.query_bin[data.train]
    for number in np.unique(bins):
        rows = data.train[bins == number]
        for start in range(0, len(rows), size):
            yield rows[start : start + size], data.pool(rows[0])


def _mine(
    data: Data, given: pl.DataFrame, vectors: np.ndarray, shards: Sequence[Path], settings: MineConfig, seed: int
) -> tuple[pl.DataFrame, list[Shortage]]:
    """The mined negatives of all training queries, and the queries that came short."""
    low, high = (int(bound) for bound in bounds(settings.range_for_sampling))
    ceiling = negatives.ceilings(_lowest_positive(given, len(vectors)), settings)
    parts, short = [_frame([], [], [], "mined")], []
    with progress(len(data.train), "mine", "queries") as bar:
        for rows, pool in _batches(data, settings.search_batch_size):
            scores, ids = search.top_k(
                vectors[rows], shards, high, settings.search_batch_size, search.backend(), pool, bar
            )  # [Q, high] each
            allowed = data.exclusions.allowed(rows, ids) & negatives.within(scores, ceiling[rows], settings)
            allowed[:, :low] = False
            chosen = negatives.choose(rows, ids, allowed, settings, seed)  # [Q, high]
            at, rank = np.nonzero(chosen)
            parts.append(_frame(rows[at], ids[at, rank], scores[at, rank], "mined"))
            missing = settings.negative_number - chosen.sum(1)
            barred = chosen | (scores > ceiling[rows][:, None])
            short += [Shortage(int(rows[i]), int(missing[i]), ids[i, barred[i]]) for i in np.flatnonzero(missing > 0)]
    return pl.concat(parts), sorted(short, key=lambda one: one.query)


def _lowest_positive(given: pl.DataFrame, n_queries: int) -> np.ndarray:
    """The similarity of each query's least similar positive, inf where it has none: float32 [Q]."""
    lowest = np.full(n_queries, np.inf, np.float32)
    positive = given.filter(pl.col("label") > 0)
    np.minimum.at(lowest, positive["query_id"].to_numpy(), positive["similarity"].to_numpy())
    return lowest


def _frame(query_ids, text_ids, similarity, origin: str) -> pl.DataFrame:
    """Negatives as rows of the table `pairs`."""
    n = len(query_ids)
    return pl.DataFrame(
        {
            "query_id": pl.Series(query_ids, dtype=pl.Int64),
            "text_id": pl.Series(text_ids, dtype=pl.Int64),
            "label": pl.zeros(n, pl.Int8, eager=True),
            "origin": pl.repeat(origin, n, dtype=pl.String, eager=True),
            "similarity": pl.Series(similarity, dtype=pl.Float32),
            "score": pl.repeat(None, n, dtype=pl.Float32, eager=True),
        }
    )


def _fill(
    data: Data, short: Sequence[Shortage], vectors: np.ndarray, shards: Sequence[Path], seed: int
) -> pl.DataFrame:
    """Random texts for the queries that came short."""
    query_ids, text_ids, still = [], [], 0
    pools: dict[int, np.ndarray] = {}
    for one in short:
        number = -1 if data.query_bin is None else int(data.query_bin[one.query])
        if number not in pools:
            pool = data.pool(one.query)
            pools[number] = np.arange(data.n_texts) if pool is None else np.flatnonzero(pool)
        row = np.array([one.query])

        def allowed(ids: np.ndarray, row: np.ndarray = row, barred: np.ndarray = one.barred) -> np.ndarray:
            return data.exclusions.allowed(row, ids[None])[0] & ~np.isin(ids, barred)

        found = negatives.draw(np.random.default_rng([seed, one.query]), pools[number], one.missing, allowed)
        still += len(found) < one.missing
        query_ids.append(np.full(len(found), one.query))
        text_ids.append(found)
    if still:
        log.warning("mine: %d queries keep too few negatives: there are no more texts that they may have", still)
    query_ids, text_ids = np.concatenate(query_ids), np.concatenate(text_ids)
    return _frame(query_ids, text_ids, search.pair_scores(vectors, shards, query_ids, text_ids), "random")


def _too_few(query: int, count: int, queries: Path, settings: MineConfig) -> UserError:
    row = tables.read(queries, "queries", ["text", "source"]).slice(query, 1).to_pylist()[0]
    return UserError(
        f"mine: {count} queries have fewer than {settings.negative_number} candidates, first {row['source']}: "
        f"{shown(row['text'])}; widen mine.range_for_sampling, or set mine.on_shortage to random or drop"
    )
