"""Training batches: groups drawn from the candidates, in an order that depends on seed and epoch alone.

Nothing here has a state to be saved: the order of queries is a function of (seed, epoch), the
passages of a group are one of (seed, epoch, query).  So a resumed run sees the same data.

A batch's texts are cut into chunks sorted by length, each padded to its own longest text, and every
text of a batch goes through the model once, however often it occurs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from retune.data.candidates import TrainSet
from retune.data.sampler import GroupSampler
from retune.data.shuffle import Shuffler
from retune.model.device import default_token_budget, length_multiple
from retune.model.engine import Tokens, pad, ragged

if TYPE_CHECKING:
    from retune.model.embedder import Embedder
    from retune.model.reranker import Reranker

# What a chunk of its own costs, in tokens: on a CPU a few hundred calls of small kernels (64 to 256
# were equally good, 15% better than 0); on a GPU the launches of a layer's kernels, an estimate.
CPU_OVERHEAD, GPU_OVERHEAD = 128, 4096


def joined(parts: list[Tokens]) -> Tokens:
    """The texts of several token arrays, one array after the other."""
    lengths = np.concatenate([part.lengths for part in parts])
    return Tokens(np.concatenate([part.ids for part in parts]), np.concatenate([[0], np.cumsum(lengths)]))


@dataclass(frozen=True)
class Group:
    """A query's row and its candidates' rows within a `TrainSet`, the positive first: int64 [G]."""

    query: int
    candidates: np.ndarray
    epoch: int = 0


class GroupDataset(Dataset):
    """(epoch, query row) → the group drawn for it.

    Args:
        sizes: passages of each query's group that count, int64 [N]; smaller groups are filled up with their
            last passage.  All count where not given.
    """

    def __init__(self, train_set: TrainSet, group_size: int, seed: int, sizes: np.ndarray | None = None) -> None:
        self.train_set, self.group_size, self.seed, self.sizes = train_set, group_size, seed, sizes

    def __len__(self) -> int:
        return len(self.train_set)

    def __getitem__(self, key: tuple[int, int]) -> Group:
        epoch, query = key
        data = self.train_set
        wanted = (self.group_size if self.sizes is None else self.sizes[query]) - 1
        rng = np.random.default_rng([self.seed, epoch, int(data.query_ids[query])])
        start, n_positives, n_negatives = data.starts[query], data.n_positives[query], data.n_negatives[query]
        positive = start + rng.integers(n_positives)
        if not wanted:
            return Group(query, np.full(self.group_size, positive), epoch)
        # too few negatives: drawn from several copies of them
        urn = np.tile(np.arange(n_negatives), -(-wanted // n_negatives))
        negatives = start + n_positives + rng.choice(urn, wanted, replace=False)
        filling = np.repeat(negatives[-1:], self.group_size - 1 - wanted)
        return Group(query, np.concatenate([[positive], negatives, filling]), epoch)


def length_chunks(
    lengths: np.ndarray, max_tokens: int, multiple: int = 1, overhead: int = 0, max_rows: int | None = None
) -> list[np.ndarray]:
    """Rows in chunks of similar length, longest first, at the least cost.

    The cost of a chunk is its padded size (rows × longest, rounded up to `multiple`) plus `overhead`,
    the tokens that could be computed in the time that a chunk of its own costs.  A chunk has at most
    `max_tokens` padded tokens, but one row at least; and at most `max_rows` rows.
    """
    order = np.argsort(-lengths, kind="stable")
    rounded = -(-lengths[order] // multiple) * multiple
    # Where the rounded length changes, and the end: an optimal chunk begins and ends there, or at the budget.
    edges = np.append(np.flatnonzero(np.diff(rounded, prepend=-1)), len(order))
    widths = rounded[edges[:-1]]
    most = np.clip(max_tokens // widths, 1, max_rows)  # rows of a chunk of each width
    cost, after = np.zeros(len(edges), np.int64), np.zeros(len(edges), np.int64)
    for first in range(len(widths) - 1, -1, -1):  # cost[i]: of all rows from edges[i] on
        rows = edges[first + 1 :] - edges[first]
        pieces = -(-rows // most[first])
        costs = rows * widths[first] + pieces * overhead + cost[first + 1 :]
        after[first] = first + 1 + np.argmin(costs)
        cost[first] = costs.min()
    chunks, at = [], 0
    while at < len(widths):
        rows = order[edges[at] : edges[after[at]]]
        pieces = -(-len(rows) // most[at])
        chunks += np.array_split(rows, pieces)
        at = after[at]
    return chunks


@dataclass(frozen=True)
class Chunker:
    """Cuts the texts of a batch into padded chunks under a token budget."""

    tokens: Tokens
    pad_id: int
    max_tokens: int
    multiple: int = 1
    overhead: int = CPU_OVERHEAD
    max_rows: int | None = None

    @classmethod
    def of(
        cls, model: Embedder | Reranker, tokens: Tokens, max_tokens: int | None, half: bool,
        max_rows: int | None = None,
    ) -> Chunker:  # fmt: skip
        """Chunks that suit the model's device; `half`: whether it computes in 16 bits."""
        device = model.device
        return cls(
            tokens, model.pad_token_id, max_tokens or default_token_budget(device),
            length_multiple(torch.bfloat16 if half else torch.float32, device),
            CPU_OVERHEAD if device.type == "cpu" else GPU_OVERHEAD, max_rows,
        )  # fmt: skip

    def __call__(self, rows: np.ndarray, more: Tokens | None = None) -> tuple[dict[str, Any], np.ndarray]:
        """Chunks of the distinct texts among `rows`, and where each of `rows` comes out.

        Args:
            more: texts of this batch alone; rows from `len(tokens)` on are theirs.

        Returns:
            {"chunks": padded batches, "n_tokens": tokens in them without padding}, and for each of
            `rows` its position in the concatenated outputs, int64 [len(rows)].
        """
        distinct, which = np.unique(rows, return_inverse=True)
        tokens, at = self.tokens, distinct  # where each distinct text's tokens are
        if more is not None:
            known = np.searchsorted(distinct, len(tokens))
            at = np.append(np.arange(known), known + distinct[known:] - len(tokens))
            tokens = joined([tokens.take(distinct[:known]), more])
        lengths = tokens.lengths[at]
        batches = length_chunks(lengths, self.max_tokens, self.multiple, self.overhead, self.max_rows)
        chunks = [pad(tokens, at[batch], self.pad_id, self.multiple) for batch in batches]
        place = np.empty(len(distinct), np.int64)
        place[np.concatenate(batches)] = np.arange(len(distinct))
        return {"chunks": chunks, "n_tokens": int(lengths.sum())}, place[which]


class EmbedderCollate:
    """Groups → the batch of an embedder.

    Args:
        text_rows: row of each candidate's passage in the chunker's tokens, int64 [M]; the queries' rows
            come first, in the order of the `TrainSet`.
        scored: whether teacher scores go into the batch.
        sizes: passages of each query's group that count, int64 [N]; all where not given.
        shuffler: positives whose text is shuffled; none where not given.
    """

    def __init__(
        self, train_set: TrainSet, chunker: Chunker, text_rows: np.ndarray, scored: bool,
        sizes: np.ndarray | None = None, shuffler: Shuffler | None = None,
    ) -> None:  # fmt: skip
        self.train_set, self.chunker, self.text_rows, self.scored = train_set, chunker, text_rows, scored
        self.sizes, self.shuffler = sizes, shuffler
        rows, _ = ragged(train_set.starts, train_set.n_positives)  # candidates that are positives
        keys = np.repeat(train_set.same_text, train_set.n_positives)
        order = np.argsort(keys, kind="stable")
        self._keys, self._positives = keys[order], train_set.text_ids[rows][order]

    def __call__(self, groups: list[Group]) -> dict[str, Any]:
        """The batch: chunks, n_tokens; int64: queries [Q], query_places [Q], passage_places and passage_ids [Q * G],
        positive_rows and positive_ids [K]; in_batch bool [Q]; teacher float32 [Q, G] where scored;
        counted bool [Q, G] where groups have sizes of their own.
        """
        queries = np.array([group.query for group in groups])
        candidates = np.stack([group.candidates for group in groups])  # [Q, G]
        passages, more = self.text_rows[candidates], None  # [Q, G]
        if self.shuffler:
            drawn, more = self.shuffler(groups[0].epoch, queries, candidates[:, 0])
            passages[drawn, 0] = len(self.chunker.tokens) + np.arange(len(more))
        batch, places = self._chunks(queries, candidates, passages.ravel(), more)
        rows, ids = self._known(queries)
        data = self.train_set
        arrays = {
            "query_places": places[: len(queries)], "passage_places": places[len(queries) :],
            "passage_ids": data.text_ids[candidates.ravel()], "positive_rows": rows, "positive_ids": ids,
            "in_batch": data.in_batch[queries], "queries": queries,
        }  # fmt: skip
        if self.scored:
            arrays["teacher"] = data.scores[candidates]
        if self.sizes is not None:
            arrays["counted"] = np.arange(candidates.shape[1]) < self.sizes[queries, None]
        return batch | {name: torch.from_numpy(values) for name, values in arrays.items()}

    def _chunks(
        self, queries: np.ndarray, candidates: np.ndarray, passages: np.ndarray, more: Tokens | None
    ) -> tuple[dict[str, Any], np.ndarray]:
        """What the chunker makes of the queries [Q] and then of their candidates [Q, G].

        Args:
            passages: the candidates' rows in the chunker's tokens and, after them, in those of `more`, int64 [Q * G].
        """
        return self.chunker(np.concatenate([queries, passages]), more)

    def _known(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row in the batch, passage id) of every known positive of the batch's query texts, int64 [K] each."""
        keys = self.train_set.same_text[queries]
        low, high = np.searchsorted(self._keys, keys), np.searchsorted(self._keys, keys, side="right")
        where = [self._positives[a:b] for a, b in zip(low, high, strict=True)]
        return np.repeat(np.arange(len(queries)), high - low), np.concatenate(where)


class RerankerCollate:
    """Groups → the batch of a reranker; row m of the chunker's tokens is the pair of candidate m."""

    def __init__(self, chunker: Chunker) -> None:
        self.chunker = chunker

    def __call__(self, groups: list[Group]) -> dict[str, Any]:
        """{chunks, n_tokens, pair_places int64 [Q, G], queries int64 [Q]}."""
        candidates = np.stack([group.candidates for group in groups])  # [Q, G]
        batch, places = self.chunker(candidates.ravel())
        queries = np.array([group.query for group in groups])
        places = places.reshape(candidates.shape)
        return batch | {"pair_places": torch.from_numpy(places), "queries": torch.from_numpy(queries)}


def loader(
    dataset: GroupDataset, sampler: GroupSampler, collate: EmbedderCollate | RerankerCollate, workers: int = 0,
    pin_memory: bool = False, prefetch_factor: int | None = None, persistent_workers: bool = False,
) -> DataLoader:  # fmt: skip
    """The loader of a process; it draws nothing from torch's global generator.

    Args:
        prefetch_factor: batches that each of the workers makes ahead. persistent_workers: whether they outlive an
            epoch; both count only where there are workers.
    """
    ahead = {"prefetch_factor": prefetch_factor, "persistent_workers": persistent_workers} if workers else {}
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, pin_memory=pin_memory,
        generator=torch.Generator(), **ahead,
    )  # fmt: skip
