"""search: for each query to mine for, the nearest of a part of the texts; the stage mine puts the parts together.

A part of mining that grows with queries × texts, so that it can be spread over jobs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from retune.config import MineConfig
from retune.data import found, mineset, retrievers, search
from retune.runtime import log, progress


def search_part(
    *, queries: Path, query_vectors: Path, text_vectors: Sequence[Path], settings: MineConfig, out: Path,
    lengths: Path | None = None, bins: Path | None = None,
) -> None:  # fmt: skip
    """Write the nearest texts of each query, of those in `text_vectors`, as the table of `retune.data.found`.

    Args:
        text_vectors: embeddings tables of the part, with rising ids.
        lengths, bins: needed for `pool: bin`.

    Raises:
        UserError: for vectors of different models, or a GPU that is asked for and not there.
    """
    search.same_model(query_vectors, text_vectors)
    pools, vectors = mineset.pools(queries, settings, lengths, bins), search.load(query_vectors)
    k, nearest = retrievers.depth(settings), retrievers.backend(settings.use_gpu_for_searching)
    log.info("%d queries, %d texts, %d nearest", len(pools.train), search.count(text_vectors), k)

    def blocks() -> Iterator[found.Found]:
        size = settings.search_batch_size
        with progress(len(pools.train), "search", "queries") as bar:
            for rows, pool in pools.batches(size):
                yield rows, *search.top_k(vectors[rows], text_vectors, k, size, nearest, pool, bar)

    found.write(out, k, blocks())
