"""split: token lengths of every text, once, and the length bin of every query with its passages.

Knows nothing of vectors and scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retune import tables
from retune.config import SplitConfig
from retune.data.lengths import Count, bin_names, bin_of, counter
from retune.runtime import log, progress

BATCH = 4096  # texts


def split(
    texts: Path | str,
    queries: Path | str,
    pairs: Path | str,
    out: Mapping[str, Path | str],
    settings: SplitConfig,
    embedder: Mapping[str, Any],
    threads: int,
) -> None:
    """Write `lengths` (tokens of each text) and `bins` (of each query: longest text and length bin).

    Lengths are those of the bare texts with special tokens, without instructions, nothing cut off.

    Args:
        texts, queries, pairs: the tables which ingest wrote.
        out: paths of the tables `lengths` and `bins`.
        embedder: whose tokenizer counts: `model`, and where given `revision` and `trust_remote_code`.
        threads: for the tokenizer.
    """
    count = counter(embedder, threads)
    with tables.writer(out["lengths"], "lengths") as lengths, tables.writer(out["bins"], "bins") as bins:
        of_text = _lengths(texts, "texts", count)
        lengths.write({"text_id": np.arange(len(of_text)), "n_tokens": of_text})
        longest = _lengths(queries, "queries", count)
        _raise_to_longest(longest, of_text, pairs)
        names, index = bin_names(settings.length_list), bin_of(longest, settings.length_list)
        labels = pa.array(names, pa.large_string()).take(pa.array(index))
        bins.write({"query_id": np.arange(len(longest)), "n_tokens": longest, "length_bin": labels})
    _log_summary(queries, longest, index, names, settings.drop_longer_than)


def _lengths(path: Path | str, name: str, count: Count) -> np.ndarray:
    """Tokens of each row's text, int32 [rows]."""
    found = np.zeros(tables.n_rows(path), dtype=np.int32)
    at = 0
    with progress(len(found), f"tokens of {name}", name) as bar:
        for batch in tables.batches(path, name, ["text"], BATCH):
            found[at : at + batch.num_rows] = count(batch["text"])
            at += batch.num_rows
            bar.update(batch.num_rows)
    return found


def _raise_to_longest(longest: np.ndarray, of_text: np.ndarray, pairs: Path | str) -> None:
    """Make `longest` [queries] cover the query's passages as well, in place."""
    for batch in tables.batches(pairs, "pairs", ["query_id", "text_id"]):
        np.maximum.at(longest, batch["query_id"].to_numpy(), of_text[batch["text_id"].to_numpy()])


def _log_summary(
    queries: Path | str, longest: np.ndarray, index: np.ndarray, names: list[str], limit: int | None
) -> None:
    """One block a dataset: how many queries each bin holds, and their share."""
    datasets = tables.read(queries, "queries", ["dataset"])["dataset"].combine_chunks().dictionary_encode()
    codes = datasets.indices.to_numpy()
    for code, dataset in enumerate(datasets.dictionary.to_pylist()):
        chosen = codes == code
        total = int(chosen.sum())
        log.info("%s: %s queries, longest text %s tokens", dataset, f"{total:,}", f"{longest[chosen].max():,}")
        for name, found in zip(names, np.bincount(index[chosen], minlength=len(names)), strict=True):
            if found:
                log.info("  %-14s %10s  %6.2f %%", name, f"{found:,}", 100 * found / total)
    if limit is not None:
        over = int((longest > limit).sum())
        log.info("%s queries have a text of more than %s tokens: left out of training", f"{over:,}", f"{limit:,}")
