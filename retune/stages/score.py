"""score: the parts of the teacher's scores put together into the table of pairs.

Negatives that the teacher takes for positives are left out or relabelled, where the config says so.
Needs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retune import tables
from retune.data.teacher import false_negatives, read_distinct
from retune.runtime import UserError, log


def score(
    *, texts: Path, queries: Path, pairs: Path, parts: Sequence[Path], out: Path, counts: Path | None = None,
    margin: float | None = None, action: str = "drop", only_missing: bool = False,
) -> None:  # fmt: skip
    """Fill the column `score` of a table of pairs from its parts; scores that came with the data are replaced.

    Args:
        parts: tables `scores`, in the order of their shards.
        counts: the table `mining` of how many negatives were treated as false ones, with the action as its measure.
        margin: a negative that scores above the lowest of its query's positives by more is a false one.
        action: "drop" leaves it out (with its query, where that has no other negative), "relabel" makes
            it a positive, "keep" only counts it.
        only_missing: as for the parts: other scores stay.
    """
    table = tables.read(pairs, "pairs")
    distinct, _ = read_distinct(texts, queries, pairs, only_missing)
    found = [tables.read(part, "scores") for part in parts]
    ids = [np.concatenate([part[name].to_numpy() for part in found]) for name in ("query_id", "text_id", "score")]
    if not (np.array_equal(ids[0], distinct.query_ids) and np.array_equal(ids[1], distinct.text_ids)):
        raise UserError(f"{parts[0]}: these scores belong to other pairs than {pairs}; delete them and run again")
    before = table["score"].to_numpy(zero_copy_only=False).astype(np.float32)
    scores = np.where(distinct.back >= 0, np.append(ids[2], np.float32(0))[distinct.back], before)
    column = pa.array(scores, pa.float32())
    table = table.set_column(table.column_names.index("score"), table.schema.field("score"), column)
    numbers = {"pairs": len(table), "distinct pairs": len(distinct)}
    if margin is not None:
        table, treated = _treat(table, scores, margin, action)
        numbers |= treated
    tables.write(out, "pairs", table)
    for name, number in numbers.items():
        log.info("%s: %d", name, number)
    if counts is not None:
        columns = {
            "measure": [action] * len(numbers),
            "name": list(numbers),
            "value": list(map(float, numbers.values())),
        }
        tables.write(counts, "mining", columns)


def _treat(table: pa.Table, scores: np.ndarray, margin: float, action: str) -> tuple[pa.Table, dict[str, int]]:
    """The pairs without, or with relabelled, false negatives, and how many there were."""
    query_ids, positive = table["query_id"].to_numpy(), table["label"].to_numpy() > 0
    false = false_negatives(query_ids, positive, scores, margin)
    numbers = {"negatives": int((~positive).sum()), "false negatives": int(false.sum())}
    n_queries = int(query_ids.max(initial=-1)) + 1
    had = np.bincount(query_ids[~positive], minlength=n_queries) > 0
    has = np.bincount(query_ids[~positive & ~false], minlength=n_queries) > 0
    numbers["queries without another negative"] = int((had & ~has).sum())
    if action == "relabel":
        labels = np.where(false, 1, table["label"].to_numpy()).astype(np.int8)
        table = table.set_column(table.column_names.index("label"), table.schema.field("label"), pa.array(labels))
        order = pc.sort_indices(
            table.append_column("row", pa.array(np.arange(len(table)))),
            sort_keys=[("query_id", "ascending"), ("label", "descending"), ("row", "ascending")],
        )
        table = table.take(order)
    elif action == "drop":
        table = table.filter(pa.array(~false & ~(had & ~has)[query_ids]))
    return table, numbers
