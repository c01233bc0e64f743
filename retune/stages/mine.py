"""mine: for each query, hard negatives from the texts that a retriever finds nearest.

Positives are never taken, for all queries that read the same; nor is the query itself, nor a text
that differs from either in case or white space only.  Ranks count from 0 over all texts of the pool,
positives included.  The same input gives the same bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from retune import tables
from retune.config import MineConfig, RerankerConfig, bounds
from retune.data import funnel, mineset, negatives, retrievers
from retune.data.funnel import Funnel
from retune.data.judge import Judge
from retune.data.mineset import MineSet
from retune.data.retrievers import Retriever
from retune.data.text import shown
from retune.runtime import UserError, log, progress


@dataclass(frozen=True)
class Shortage:
    """A query with too few candidates; `barred` are the texts which it has, or which are too likely positives."""

    query: int
    missing: int
    barred: np.ndarray


def mine(
    *, texts: Path, queries: Path, pairs: Path, query_vectors: Path | None, text_vectors: Sequence[Path] | None,
    settings: MineConfig, seed: int, out: Path, lengths: Path | None = None, bins: Path | None = None,
    reranker: RerankerConfig | None = None, stats: Path | None = None, candidates: np.ndarray | None = None,
    found: Sequence[Path] = (),
) -> None:  # fmt: skip
    """Write the pairs of the training queries with mined negatives, similarities and ranks (table `mined`).

    Args:
        query_vectors, text_vectors: embeddings tables, the texts' in shards of rising ids; None for bm25.
        lengths, bins: needed for `pool: bin`.
        reranker: a ready one, to judge candidates by `max_score_of_teacher`; None leaves that to a later stage. It
            scores the positives and as many candidates as are needed; the column `score` then holds its scores alone.
        stats: where the table `mining`, what was done, goes.
        candidates: bool [T]; the texts that are searched and ranked, None for all.
        found: what the stage search found in parts of the texts; where not given, all are searched here.

    Raises:
        UserError: where `on_shortage: error` and a query has too few candidates, the vectors are of other tables, a
            setting of the search cannot be met, or a score is not finite.
    """
    data = mineset.load(texts, queries, pairs, settings, lengths, bins, candidates)
    retriever = retrievers.load(
        settings,
        seed,
        texts=texts,
        queries=queries,
        query_vectors=query_vectors,
        text_vectors=text_vectors or (),
        found=found,
    )
    similarity = retriever.pair_scores(data.given["query_id"].to_numpy(), data.given["text_id"].to_numpy())
    given = data.given.with_columns(pl.Series("similarity", similarity, pl.Float32), rank=pl.lit(None, pl.Int32))
    judge = Judge.load(reranker, queries, texts) if reranker and settings.max_score_of_teacher is not None else None
    if judge:
        given = _judged(given, judge)
    limits = negatives.limits(_lowest_positive(given, data, "similarity"), settings)
    counts = Funnel([*negatives.EXCLUSIONS, *limits, *([funnel.REFUSED] if judge else []), funnel.NOT_DRAWN])
    mined, short = _mine(data, given, limits, retriever, judge, settings, seed, counts)
    if judge:
        judge.close()
    if short and settings.on_shortage == "error":
        raise _too_few(short[0].query, len(short), queries, settings)
    if short and settings.on_shortage == "random":
        mined = pl.concat([mined, _fill(data, short, retriever, seed, counts)])
    if short and settings.on_shortage == "drop":
        given, mined = _dropped(given, mined, short, counts)
    _count(data, given, mined, short, judge, settings, counts)
    log.info("%d queries, %d of them short of candidates (%s)", len(data.train), len(short), settings.on_shortage)
    log.info("%s", counts.said())
    if len(data.train) and not counts.get(funnel.CANDIDATES, "seen"):
        log.warning(
            "mine.range_for_sampling: no query has a text of ranks %s; %s texts are searched, so choose lower ones",
            settings.range_for_sampling, f"{data.n_texts if data.candidates is None else data.candidates.sum():,}",
        )  # fmt: skip
    _write(out, given, mined)
    if stats:
        counts.write(stats, {"settings": json.dumps(settings.model_dump(mode="json"))})


def _judged(given: pl.DataFrame, judge: Judge) -> pl.DataFrame:
    """The given pairs with the judge's scores of the positives; other scores would be on another scale."""
    positive = given["label"].to_numpy() > 0
    ids = (given[name].to_numpy()[positive] for name in ("query_id", "text_id"))
    scores = np.full(len(given), np.nan, np.float32)
    scores[positive] = judge(*ids)
    return given.with_columns(score=_known(scores))


def _known(scores: np.ndarray) -> pl.Series:
    """Scores, of which NaN is none."""
    return pl.Series(scores, dtype=pl.Float32).fill_nan(None)


def _mine(
    data: MineSet, given: pl.DataFrame, limits: negatives.Limits, retriever: Retriever, judge: Judge | None,
    settings: MineConfig, seed: int, counts: Funnel,
) -> tuple[pl.DataFrame, list[Shortage]]:  # fmt: skip
    """The mined negatives of all training queries, and the queries that came short."""
    low, high = (int(bound) for bound in bounds(settings.range_for_sampling))
    ceiling = negatives.ceilings(limits, data.n_queries)
    if judge:
        acceptable = _lowest_positive(given, data, "score") + np.float32(settings.max_score_of_teacher)  # [Q]
    parts, short = [_frame([], [], [], "mined")], []
    with progress(len(data.train), "mine", "queries") as bar:
        for rows, pool in data.batches(settings.search_batch_size):
            similarity, ids = retriever.search(rows, high, pool, bar)  # [Q, high] each
            left = (ids >= 0) & (np.arange(high) >= low)  # [Q, high]
            counts.add(funnel.CANDIDATES, "seen", left.sum())
            for name, passes in itertools.chain(
                data.exclusions.filters(rows, ids), negatives.inside(limits, rows, similarity)
            ):
                left = counts.filter(left, name, passes)
            scores = np.full(ids.shape, np.nan, np.float32)  # [Q, high]
            priority = negatives.SAMPLING[settings.sampling](rows, ids, seed)
            teacher = partial(_passes, judge, rows, ids, scores, acceptable) if judge else None
            chosen, refused = negatives.choose(left, priority, settings.negative_number, teacher)
            if judge:
                left = counts.filter(left, funnel.REFUSED, ~refused)
            counts.filter(left, funnel.NOT_DRAWN, chosen)
            at, rank = np.nonzero(chosen)
            parts.append(_frame(rows[at], ids[at, rank], similarity[at, rank], "mined", scores[at, rank], rank))
            missing = settings.negative_number - chosen.sum(1)
            barred = chosen | refused | (similarity > ceiling[rows][:, None])
            short += [Shortage(int(rows[i]), int(missing[i]), ids[i, barred[i]]) for i in np.flatnonzero(missing > 0)]
    return pl.concat(parts), sorted(short, key=lambda one: one.query)


def _passes(
    judge: Judge, rows: np.ndarray, ids: np.ndarray, scores: np.ndarray, acceptable: np.ndarray, at: np.ndarray,
    column: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Which candidates the judge lets pass, bool [n]; their scores are filled in.

    Args:
        rows int64 [Q], ids int64 [Q, W], scores float32 [Q, W]: the block's queries and candidates.
        acceptable: float32; the highest score that passes, by query id.
        at, column: int64 [n]; the candidates' places in the block.
    """
    scores[at, column] = judge(rows[at], ids[at, column])
    return scores[at, column] <= acceptable[rows[at]]


def _lowest_positive(given: pl.DataFrame, data: MineSet, column: str) -> np.ndarray:
    """The lowest similarity or score of each query's positives, inf where it has none: float32 [Q]."""
    positive = given.filter(pl.col("label") > 0)
    return negatives.lowest(positive["query_id"].to_numpy(), positive[column].to_numpy(), data.n_queries)


def _frame(query_ids, text_ids, similarity, origin: str, scores=None, ranks=None) -> pl.DataFrame:
    """Negatives as rows of the table `mined`; a score of NaN is none."""
    n = len(query_ids)
    return pl.DataFrame(
        {
            "query_id": pl.Series(query_ids, dtype=pl.Int64),
            "text_id": pl.Series(text_ids, dtype=pl.Int64),
            "label": pl.zeros(n, pl.Int8, eager=True),
            "origin": pl.repeat(origin, n, dtype=pl.String, eager=True),
            "similarity": pl.Series(similarity, dtype=pl.Float32),
            "score": pl.repeat(None, n, dtype=pl.Float32, eager=True) if scores is None else _known(scores),
            "rank": pl.repeat(None, n, dtype=pl.Int32, eager=True)
            if ranks is None
            else pl.Series(ranks, dtype=pl.Int32),
        }
    )


def _fill(data: MineSet, short: Sequence[Shortage], retriever: Retriever, seed: int, counts: Funnel) -> pl.DataFrame:
    """Random texts for the queries that came short."""
    query_ids, text_ids, still = [], [], 0
    pools: dict[int, np.ndarray] = {}
    for one in short:
        number = data.bin_of(one.query)
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
    counts.add(funnel.QUERIES, "still_short", still)
    if still:
        log.warning("mine: %d queries keep too few negatives: there are no more texts that they may have", still)
    query_ids, text_ids = np.concatenate(query_ids), np.concatenate(text_ids)
    counts.add(funnel.RANDOM, "filled", len(text_ids))
    return _frame(query_ids, text_ids, retriever.pair_scores(query_ids, text_ids), "random")


def _dropped(
    given: pl.DataFrame, mined: pl.DataFrame, short: Sequence[Shortage], counts: Funnel
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The pairs without the queries that came short."""
    dropped = pl.col("query_id").is_in([one.query for one in short])
    counts.add(funnel.REMOVED, funnel.QUERY_DROPPED, mined.filter(dropped).height)
    return given.filter(~dropped), mined.filter(~dropped)


def _write(out: Path, given: pl.DataFrame, mined: pl.DataFrame) -> None:
    """Query after query: positives, given negatives, then mined ones by rank, then random ones."""
    table = pl.concat([given, mined]).with_columns(_row=pl.int_range(pl.len()))
    table = table.sort("query_id", -pl.col("label"), pl.col("origin") != "given", "_row")
    tables.write(out, "mined", table.select(tables.TABLES["mined"].names).to_arrow())


def _count(
    data: MineSet, given: pl.DataFrame, mined: pl.DataFrame, short: Sequence[Shortage], judge: Judge | None,
    settings: MineConfig, counts: Funnel,
) -> None:  # fmt: skip
    """Add up what is in the tables at the end: queries, chosen negatives, and suspected ones among them."""
    chosen = mined.filter(pl.col("origin") == "mined")
    counts.add(funnel.CANDIDATES, "chosen", chosen.height)
    counts.add(funnel.QUERIES, "mined_for", len(data.train))
    counts.add(funnel.QUERIES, "short", len(short))
    counts.add(funnel.QUERIES, "dropped", len(short) if settings.on_shortage == "drop" else 0)
    query_ids = chosen["query_id"].to_numpy()
    positive = _lowest_positive(given, data, "similarity")[query_ids]
    known = np.isfinite(positive)
    near = chosen["similarity"].to_numpy()[known] >= negatives.below(positive[known], negatives.SUSPECT_MARGIN)
    counts.add(funnel.SUSPECTED, "compared", known.sum())
    counts.add(funnel.SUSPECTED, "similar", near.sum())
    if judge:
        counts.add(funnel.TEACHER, "scored", judge.count)
        counts.add(funnel.TEACHER, "compared", known.sum())
        above = chosen["score"].to_numpy() > _lowest_positive(given, data, "score")[query_ids]
        counts.add(funnel.TEACHER, "above", above.sum())


def _too_few(query: int, count: int, queries: Path, settings: MineConfig) -> UserError:
    row = tables.read(queries, "queries", ["text", "source"]).slice(query, 1).to_pylist()[0]
    return UserError(
        f"mine: {count} queries have fewer than {settings.negative_number} candidates, first {row['source']}: "
        f"{shown(row['text'])}; widen mine.range_for_sampling, or set mine.on_shortage to random or drop"
    )
