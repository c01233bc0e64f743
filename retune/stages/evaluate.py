"""evaluate: an embedded benchmark → a run, the best passages of every query.

A search with the queries' vectors among the passages', exact unless an index is asked for, or a ranking by other
heads (`data/rankers.py`).  Knows vectors and ids; nothing of texts, models or judgments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from retune import tables
from retune.data.rankers import RANKERS, Ranking
from retune.data.search import backend, blocks, same_model, top_k
from retune.runtime import UserError, log


def evaluate(
    *, queries: Path, texts: Sequence[Path], k: int, out: Path, head: str = "dense",
    weights: Mapping[str, float] | None = None, index_factory: str = "Flat", nprobe: int | None = None,
    ef_search: int | None = None, index_train_size: int | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """Retrieve the best `k` passages of every query and write them as a `run`, ranks from 1.

    Args:
        queries: embeddings of the queries.
        texts: embeddings of the passages, by shard.
        k: passages retrieved for a query (fewer where there are fewer).
        head: who ranks, a key of `rankers.RANKERS`; the tables must hold what it needs.
        weights: how much each head counts in `hybrid`.
        out: the run; queries in the order of their embeddings.
        index_factory, nprobe, ef_search, index_train_size, seed: of an index of faiss, see `index.build`.

    Raises:
        UserError: if there is no query, a query's vector is not finite, models differ, or faiss cannot make the index.
    """
    same_model(queries, texts)
    parts = [(ids.copy(), vectors.copy()) for ids, vectors in blocks([queries])]
    if not parts:
        raise UserError(f"{queries}: no queries to search for")
    ids, vectors = (np.concatenate(column) for column in zip(*parts, strict=True))  # [q], [q, dim]
    if not np.isfinite(vectors).all():
        raise UserError(f"{queries}: a vector is not finite; the model overflows or has diverged")

    def nearest(vectors: np.ndarray, count: int) -> Ranking:
        """The passages with the nearest vectors: scores and ids [q, count]."""
        if index_factory == "Flat":
            return top_k(vectors, texts, count, nearest=backend())
        from retune.data import index

        made = index.build(
            texts, index_factory, nprobe=nprobe, ef_search=ef_search, train_size=index_train_size, seed=seed,
            section="evaluate",
        )  # fmt: skip
        return made.search(vectors, count)

    scores, found = RANKERS[head](Path(queries), texts, k, weights or {}, nearest)  # [q, k] each
    kept = found >= 0
    rows, columns = np.nonzero(kept)
    run = {"query_id": ids[rows], "text_id": found[kept], "rank": columns + 1, "score": scores[kept]}
    tables.write(out, "run", run)
    log.info("%d queries, %d passages retrieved", len(ids), len(rows))
