"""metrics: runs and judgments → measures with intervals, and tests against the base model.

The second half of evaluation.  Knows ids, ranks and judgments; nothing of texts, vectors or models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retune import tables
from retune.data import metrics as measures
from retune.data.baseline import BASE, baseline
from retune.data.significance import bootstrap_interval, randomisation_test
from retune.runtime import UserError, log, progress

Values = dict[tuple[str, int], np.ndarray]  # (measure, cutoff) → a value for every judged query


def metrics(
    *,
    runs: Mapping[tuple[str, str], Path],
    benchmarks: Mapping[str, Mapping[str, Path]],
    cutoffs: Sequence[int],
    seed: int,
    out: Path,
    levels: Mapping[str, int] | None = None,
) -> None:
    """Measure runs against judgments and write a `metrics` table.

    For every benchmark, model, measure and cutoff there is a row with the mean over the judged
    queries, its 95% bootstrap interval and the p-value of a paired randomisation test against
    `base` (ranked by the same head), then a row for every judged query.

    Args:
        runs: a run for (benchmark, model).
        benchmarks: for each, at least its table of `pairs`: the judgments.
        cutoffs: ranks at which each measure is taken.
        seed: of resampling.
        out: the table.
        levels: lowest grade of a relevant passage, by benchmark; 1 where not given.

    Raises:
        UserError: if a benchmark has no positive, or none of its positives is in any of its runs.
    """
    with tables.writer(out, "metrics") as table, progress(len(runs), "metrics", "runs") as bar:
        for benchmark, files in benchmarks.items():
            pairs = tables.read(files["pairs"], "pairs", ["query_id", "text_id", "label"])
            columns = (pairs[name].to_numpy() for name in ("query_id", "text_id", "label"))
            judgments = measures.judge(*columns, (levels or {}).get(benchmark, 1))
            values: dict[str, Values] = {}
            found = 0
            for model in (model for name, model in runs if name == benchmark):
                ranking = _ranking(runs[benchmark, model], judgments, f"{benchmark}, {model}")
                found += _count_found(ranking, f"{benchmark}, {model}")
                values[model] = measures.values(ranking, cutoffs)
                bar.update()
            _check(benchmark, files["pairs"], judgments, found)
            for model, rows in _rows(values, judgments.query_ids, seed):
                n = len(rows["value"])
                table.write(rows | {"model": pa.repeat(model, n), "benchmark": pa.repeat(benchmark, n)})


def _ranking(run: Path, judgments: measures.Judgments, what: str) -> measures.Ranking:
    """The run beside the judgments; says which queries one of them lacks."""
    table = tables.read(run, "run", ["query_id", "text_id", "rank"])
    found, asked = np.unique(table["query_id"].to_numpy()), judgments.query_ids
    if lost := len(np.setdiff1d(asked, found)):
        log.warning("%s: %d of %d judged queries have no passage in the run and count as 0", what, lost, len(asked))
    if unjudged := len(np.setdiff1d(found, asked)):
        log.warning("%s: %d queries of the run have no judgment and are left out", what, unjudged)
    return measures.align(*(table[name].to_numpy() for name in ("query_id", "text_id", "rank")), judgments)


def _count_found(ranking: measures.Ranking, what: str) -> int:
    found, total = int(ranking.relevant.sum()), int(ranking.judgments.n_relevant.sum())
    tell = log.info if found else log.warning  # where no run found any, an error follows
    tell("%s: %d of %d positives found", what, found, total)
    return found


def _check(benchmark: str, pairs: Path, judgments: measures.Judgments, found: int) -> None:
    total = int(judgments.n_relevant.sum())
    if not total:
        raise UserError(f"{pairs}: benchmark {benchmark} has no positive judgment; check its qrels")
    if not found:
        raise UserError(
            f"{pairs}: 0 of {total} positives found in any run of benchmark {benchmark}; the ids of its judgments and "
            "of its queries and passages do not belong together: check that qrels, queries and corpus are of one set"
        )
    if without := int((judgments.n_relevant == 0).sum()):
        log.warning("%s: %d judged queries have no positive and count as 0", benchmark, without)


def _rows(values: dict[str, Values], query_ids: np.ndarray, seed: int) -> Iterator[tuple[str, dict[str, object]]]:
    """(model, columns) by model: for each measure and cutoff the mean's row, then those of the queries."""
    matrices = {model: np.stack(list(mine.values()), axis=1) for model, mine in values.items()}  # [q, m]
    # all models are resampled together, so that their intervals rest on the same draws
    bounds = bootstrap_interval(np.concatenate(list(matrices.values()), axis=1), seed)
    lows, highs = (dict(zip(matrices, np.split(side, len(matrices)), strict=True)) for side in bounds)
    others = [model for model in matrices if baseline(model) in matrices and model != baseline(model)]
    p_values = dict.fromkeys(matrices)
    if others:
        differences = np.concatenate([matrices[model] - matrices[baseline(model)] for model in others], axis=1)
        p_values |= dict(zip(others, np.split(randomisation_test(differences, seed), len(others)), strict=True))
    for model, matrix in matrices.items():
        yield model, _columns(list(values[model]), matrix, query_ids, lows[model], highs[model], p_values[model])


def _columns(
    keys: Sequence[tuple[str, int]],
    matrix: np.ndarray,
    query_ids: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    p_value: np.ndarray | None,
) -> dict[str, object]:
    """Columns of a `metrics` table for one model; matrix [q, m], the others [m]."""
    q, m = matrix.shape

    def of_means(column: np.ndarray | None) -> pa.Array:
        """`column` in the rows of the means, null elsewhere."""
        full, mask = np.zeros((q + 1, m)), np.ones((q + 1, m), bool)
        if column is not None:
            full[0], mask[0] = column, False
        return pa.array(full.T.ravel(), mask=mask.T.ravel())

    ids, no_id = np.tile([0, *query_ids], m), np.tile([True, *[False] * q], m)
    return {
        "measure": pa.array(np.repeat([name for name, _ in keys], q + 1)),
        "cutoff": np.repeat([cutoff for _, cutoff in keys], q + 1),
        "query_id": pa.array(ids, mask=no_id),
        "value": np.concatenate([matrix.mean(0)[None], matrix]).T.ravel(),
        "low": of_means(low),
        "high": of_means(high),
        "p_value": of_means(p_value),
    }


def summary(path: Path, guards: Collection[str] = ()) -> str:
    """The means of a `metrics` table as plain text, a block a benchmark: value [interval] p against base.

    Shows MRR and nDCG at 10 and Recall at the largest cutoff (or what is nearest to that); says which of the
    benchmarks are guard sets, those in `guards`.
    """
    table = tables.read(path, "metrics")
    n_queries = {b["benchmark"]: b["query_id_count_distinct"] for b in _query_counts(table)}
    means = table.filter(pc.is_null(table["query_id"])).to_pylist()
    cutoffs = sorted({row["cutoff"] for row in means})
    near = min(cutoffs, key=lambda k: abs(k - 10), default=10)
    columns = [("MRR", near), ("nDCG", near), ("Recall", max(cutoffs, default=10))]
    cells = {(r["benchmark"], r["model"], r["measure"], r["cutoff"]): _cell(r) for r in means}
    blocks = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in means):
        models = list(dict.fromkeys(row["model"] for row in means if row["benchmark"] == benchmark))
        lines = [["", *(f"{name}@{k}" for name, k in columns)]]
        lines += [[model, *(cells.get((benchmark, model, *column), "") for column in columns)] for model in models]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        name = f"{benchmark} (guard set)" if benchmark in guards else benchmark
        title = f"{name}: {n_queries.get(benchmark, 0):,} queries; mean [95% interval], p against {BASE}"
        blocks.append("\n".join([title, *text]))
    return "\n\n".join(blocks)


def _query_counts(table: pa.Table) -> list[dict[str, object]]:
    counted = [("query_id", "count_distinct")]
    return table.select(["benchmark", "query_id"]).group_by("benchmark").aggregate(counted).to_pylist()


def _cell(row: Mapping[str, object]) -> str:
    p = row["p_value"]
    tested = "" if p is None else " p<.001" if p < 0.001 else f" p={p:.3f}".replace("0.", ".", 1)
    return f"{row['value']:.4f} [{row['low']:.3f} {row['high']:.3f}]{tested}"
