"""What mining reads: the queries to mine for, their given pairs, and what each may never be given.

Texts and queries are compared by 8 bytes of a digest, batch by batch, so that memory grows by some
tens of bytes a text.  Knows tables; nothing of vectors, ranks or scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.compute as pc

from retune import tables
from retune.config import MineConfig
from retune.data.negatives import Exclusions
from retune.data.text import digests, normalise


@dataclass(frozen=True, kw_only=True)
class Pools:
    """The queries to mine for, N of Q, and the texts of T that are searched for each.

    Attributes:
        train: int64 [N]; the queries to mine for.
        candidates: bool [T]; the texts that are searched, None for all.
        query_bin, text_bin: int64 [Q], [T]; numbers of the length bins, where negatives come from the query's own.
    """

    train: np.ndarray
    candidates: np.ndarray | None = None
    query_bin: np.ndarray | None = None
    text_bin: np.ndarray | None = None

    def bin_of(self, query: int) -> int:
        """The number of the query's bin; 0 where all texts are one pool."""
        return 0 if self.query_bin is None else int(self.query_bin[query])

    def pool(self, query: int) -> np.ndarray | None:
        """The texts that the query may have: bool [T], None for all."""
        if self.query_bin is None:
            return self.candidates
        inside = self.text_bin == self.query_bin[query]
        return inside if self.candidates is None else inside & self.candidates

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """(query ids [n], their pool bool [T] or None) of at most `size` queries that share a pool."""
        bins = np.zeros(len(self.train), int) if self.query_bin is None else self.query_bin[self.train]
        for number in np.unique(bins):
            rows = self.train[bins == number]
            for start in range(0, len(rows), size):
                yield rows[start : start + size], self.pool(rows[0])


@dataclass(frozen=True, kw_only=True)
class MineSet(Pools):
    """All that mining reads but vectors.

    Attributes:
        given: the pairs of the queries to mine for that came with the data and stay, columns of the table `pairs`.
        exclusions: what each query may never be given.
    """

    given: pl.DataFrame
    exclusions: Exclusions

    @property
    def n_queries(self) -> int:
        return len(self.exclusions.group)

    @property
    def n_texts(self) -> int:
        return len(self.exclusions.reads_as)


def pools(
    queries: Path, settings: MineConfig, lengths: Path | None = None, bins: Path | None = None,
    candidates: np.ndarray | None = None,
) -> Pools:  # fmt: skip
    """Who is mined for and from what; `lengths` and `bins` are needed for `pool: bin`."""
    train = np.flatnonzero(_trained(queries))
    return Pools(train=train, candidates=candidates, **(_bins(lengths, bins) if settings.pool == "bin" else {}))


def _trained(queries: Path) -> np.ndarray:
    """Which queries are trained on, bool [Q]."""
    return pc.equal(tables.read(queries, "queries", ["split"])["split"], "train").to_numpy()


def load(
    texts: Path, queries: Path, pairs: Path, settings: MineConfig, lengths: Path | None = None,
    bins: Path | None = None, candidates: np.ndarray | None = None,
) -> MineSet:  # fmt: skip
    """Read the tables; `lengths` and `bins` are needed for `pool: bin`."""
    found, trained = pools(queries, settings, lengths, bins, candidates), _trained(queries)
    table = pl.from_arrow(tables.read(pairs, "pairs"))
    taken = table if settings.keep_existing_neg else table.filter(pl.col("label") > 0)
    codes = _readings(texts, "texts"), _readings(queries, "queries")
    exclusions = _exclusions(*codes, table, taken, trained, candidates)
    given = taken.filter(pl.Series(trained[taken["query_id"].to_numpy()], dtype=pl.Boolean))
    return MineSet(**vars(found), given=given, exclusions=exclusions)


def _readings(path: Path, name: str) -> np.ndarray:
    """A number for each text of a table, the same for texts that read the same (8 bytes of a digest): int64 [n]."""
    parts = [np.empty(0, np.int64)]
    for batch in tables.batches(path, name, ["text"]):
        joined = b"".join(digest[:8] for digest in digests(map(normalise, batch["text"].to_pylist())))
        parts.append(np.frombuffer(joined, np.int64))
    return np.concatenate(parts)


def _exclusions(
    text_codes: np.ndarray, query_codes: np.ndarray, pairs: pl.DataFrame, taken: pl.DataFrame, trained: np.ndarray,
    candidates: np.ndarray | None,
) -> Exclusions:  # fmt: skip
    """From the readings of texts [T] and queries [Q], which queries are trained on, bool [Q], and which texts may stand
    for those that read the same, bool [T]."""
    n_texts = len(text_codes)
    order = np.arange(n_texts) if candidates is None else np.argsort(~candidates, kind="stable")
    readings, first, back = np.unique(text_codes[order], return_index=True, return_inverse=True)
    first, reads_as = order[first], np.empty(n_texts, np.int64)
    reads_as[order] = first[back]
    distinct, group = np.unique(query_codes, return_inverse=True)

    codes = group[taken["query_id"].to_numpy()] * n_texts + reads_as[taken["text_id"].to_numpy()]
    _, own_group, own_reading = np.intersect1d(distinct, readings, assume_unique=True, return_indices=True)
    codes = np.concatenate([codes, own_group * n_texts + first[own_reading]])  # and the query itself

    positive = pairs.filter(pl.col("label") > 0)
    belongs = trained[positive["query_id"].to_numpy()]
    of_positive = reads_as[positive["text_id"].to_numpy()]
    closed = np.zeros(n_texts, bool)
    closed[of_positive[~belongs]] = True
    closed[of_positive[belongs]] = False
    return Exclusions(group, reads_as, np.unique(codes), closed)


def _bins(lengths: Path, bins: Path) -> dict[str, np.ndarray]:
    """Number the bins that hold queries; a text's bin is the one that its length falls into, -1 for none of them."""
    table = pl.from_arrow(tables.read(bins, "bins"))
    names = table["length_bin"].unique(maintain_order=True).to_list()
    query_bin = table["length_bin"].replace_strict(names, list(range(len(names))), return_dtype=pl.Int64).to_numpy()
    tokens = tables.read(lengths, "lengths", ["n_tokens"])["n_tokens"].to_numpy()
    text_bin = np.full(len(tokens), -1)
    for number, name in enumerate(names):  # such as len-500-1000, len-7000-inf
        low, high = (float(bound) for bound in name.split("-")[1:])
        text_bin[(tokens >= low) & (tokens < high)] = number
    return {"query_bin": query_bin, "text_bin": text_bin}
