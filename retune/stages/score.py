"""score: a reranker's teacher score for each distinct (query, passage), once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from retune import tables
from retune.config import RerankerConfig, ScoreConfig
from retune.data.text import shown
from retune.model.reranker import Reranker
from retune.runtime import UserError, log, progress

BLOCK = 65536  # distinct pairs put together and sorted by length at a time


def score(
    *, texts: Path, queries: Path, pairs: Path, settings: ScoreConfig, reranker: RerankerConfig, out: Path
) -> None:
    """Fill the column `score` of a table of pairs; the scores that came with the data are replaced.

    Raises:
        UserError: for a score that is not finite, naming the query.
    """
    table = tables.read(pairs, "pairs")
    query_ids, text_ids = table["query_id"].to_numpy(), table["text_id"].to_numpy()
    query_texts = tables.read(queries, "queries", ["text"])["text"]
    # queries with the same text are one query to the teacher
    same = query_texts.combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.unique(same, return_index=True)[1]  # the first query of each text
    n_texts = max(tables.n_rows(texts), 1)
    distinct, back = np.unique(first[same[query_ids]] * n_texts + text_ids, return_inverse=True)
    distinct_queries, distinct_texts = np.divmod(distinct, n_texts)
    model = Reranker.load(reranker)
    log.info("%d pairs, %d distinct, %s on %s", len(table), len(distinct), model.dtype, model.device)
    scores = _scores(model, texts, query_texts, distinct_queries, distinct_texts, settings)
    if not np.isfinite(scores).all():
        row = int(np.argmin(np.isfinite(scores)))
        query = shown(query_texts[int(distinct_queries[row])].as_py())
        raise UserError(
            f"the score of query {query} and text {distinct_texts[row]} is not finite; set reranker.dtype: float32, "
            "or the teacher is broken"
        )
    column = pa.array(scores[back], pa.float32())
    tables.write(out, "pairs", table.set_column(table.column_names.index("score"), table.schema.field("score"), column))


def _scores(
    model: Reranker, texts: Path, query_texts, query_ids: np.ndarray, text_ids: np.ndarray, settings: ScoreConfig
):
    """Scores of the pairs (query_ids[i], text_ids[i]), float32 [n]; each text is tokenised once a block."""
    passages = tables.read(texts, "texts", ["text"])["text"]
    parts = []
    with progress(len(query_ids), "score", "pairs") as bar:
        for start in range(0, len(query_ids), BLOCK):
            block = slice(start, start + BLOCK)
            q, q_rows = np.unique(query_ids[block], return_inverse=True)
            p, p_rows = np.unique(text_ids[block], return_inverse=True)
            tokens = model.join(
                model.pieces(query_texts.take(q).to_pylist(), "query"),
                model.pieces(passages.take(p).to_pylist(), "passage"), q_rows, p_rows,
            )  # fmt: skip
            parts.append(model.scores(tokens, settings.batch_tokens, bar))
    return np.concatenate(parts) if parts else np.empty(0, np.float32)
