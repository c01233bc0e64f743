"""How well an embedder finds what belongs to a few queries: one number, again and again for many models.

The collections are small (`devset.py`): queries, their positives and a draw of other passages.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from retune import tables
from retune.data import devset
from retune.data.devset import DevSet
from retune.data.metrics import align, judge, values
from retune.model.embedder import Embedder
from retune.runtime import UserError, log


def collections(
    aside: Mapping[str, Path], guards: Mapping[str, Mapping[str, Path]], levels: Mapping[str, int] | None = None, *,
    seed: int, queries: int, passages: int,
) -> dict[str, DevSet]:  # fmt: skip
    """{"dev" or a guard set's name: its queries and passages}.

    Args:
        aside: tables `texts`, `queries` and `pairs` with the queries that were set aside.
        guards: the same of each guard set, of which all queries count; none is called `dev`.
        levels: lowest grade of a relevant passage, by guard set; 1 where not given.
        queries, passages: how many at most, drawn with the seed; positives come on top.

    Raises:
        UserError: where a collection has no query with a positive.
    """
    options = {"seed": seed, "most_queries": queries, "passages": passages}
    found = {"dev": _known("dev", devset.load(aside["texts"], aside["queries"], aside["pairs"], **options))}
    for name, files in guards.items():
        with TemporaryDirectory() as folder:
            log.info("guard set %s:", name)
            all_aside = _all_aside(files["queries"], Path(folder) / "queries.parquet")
            loaded = devset.load(files["texts"], all_aside, files["pairs"], **options)
            found[name] = _known(name, loaded, (levels or {}).get(name, 1))
    return found


def _known(name: str, found: DevSet | None, level: int = 1) -> DevSet:
    if found is None or found.grades.max() < level:
        where = "ingest.dev_fraction set no query aside" if name == "dev" else f"{name}: no query has one"
        where += f" of grade {level} or higher" if level > 1 else ""
        raise UserError(f"merge.search: expected queries with positives, but {where}")
    return found


def _all_aside(queries: Path, out: Path) -> Path:
    """The table of a benchmark's queries, as if they were set aside from training: that they are."""
    table = tables.read(queries, "queries")
    place = table.column_names.index("split")
    dev = pa.array(["dev"] * len(table), table.schema.field("split").type)
    tables.write(out, "queries", table.set_column(place, table.schema.field("split"), dev))
    return out


def value(embedder: Embedder, collection: DevSet, measure: str, level: int = 1) -> float:
    """Mean of a measure, such as `nDCG@10`, over the queries of a collection; ties go to the earlier passage.

    Args:
        level: lowest grade of a relevant passage; nDCG alone takes the grades as they are.
    """
    queries = embedder.encode_texts(collection.queries, "query", collection.prompts)  # [Q, D]
    passages = embedder.encode_texts(collection.passages, "passage")  # [P, D]
    name, cutoff = measure.split("@")
    depth = min(int(cutoff), len(passages))
    best = np.argsort(-(queries @ passages.T), axis=1, kind="stable")[:, :depth]  # [Q, depth]
    ranks = np.tile(np.arange(1, depth + 1), len(best))
    judgments = judge(collection.rows, collection.columns, collection.grades, level)
    ranking = align(np.repeat(np.arange(len(best)), depth), best.ravel(), ranks, judgments)
    return float(values(ranking, [int(cutoff)])[name, int(cutoff)].mean())
