"""Batches of an in-context model: each query with 0 to 5 solved examples, drawn from its batch.

An example is another query of the same task (instruction and type) and its positive, or its `category`
where the task is clustering.  Queries of retrieval get examples where `retrieval_use_examples` says so,
those of symmetric tasks always.  Which ones depends on the seed and the batch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from retune.config import TrainConfig
from retune.data.batches import Chunker, EmbedderCollate, joined
from retune.data.candidates import TrainSet
from retune.data.shuffle import Shuffler
from retune.model.engine import Tokens, ragged
from retune.model.incontext import BETWEEN, cut
from retune.runtime import UserError

if TYPE_CHECKING:
    from retune.model.embedder import Embedder

MOST = 5  # examples of a query
KEPT = 512  # tokens of a query that examples leave room for
SYMMETRIC = ("symmetric_sts", "symmetric_clustering", "symmetric_class")
CLUSTERING = "symmetric_clustering"


class InContextCollate(EmbedderCollate):
    """Groups → the batch of an embedder, whose queries are tokenised anew in each batch.

    Args:
        model: whose tokenizer, prompt, lengths and suffix hold.
        positives: the texts of all positives, in the order of the candidates.
        seed: of the draw.
    """

    def __init__(
        self, train_set: TrainSet, chunker: Chunker, text_rows: np.ndarray, scored: bool, sizes: np.ndarray | None,
        shuffler: Shuffler | None = None, *, model: Embedder, positives: Sequence[str], settings: TrainConfig,
        seed: int,
    ) -> None:  # fmt: skip
        super().__init__(train_set, chunker, text_rows, scored, sizes, shuffler)
        self.model, self.seed = model, seed
        self.queries = model.prompts["query"].apply(train_set.queries, train_set.prompts)
        symmetric = np.isin(np.array(train_set.types, dtype=object).astype(str), SYMMETRIC)
        self._shows = symmetric | settings.retrieval_use_examples  # bool [N]: whether it has and is an example
        tasks = zip(train_set.prompts, train_set.types, strict=True)
        numbers: dict[tuple, int] = {}
        self._task = np.array([numbers.setdefault(task, len(numbers)) for task in tasks])  # int64 [N]
        self._short = cut(model.tokenizer, self.queries, settings.example_query_max_len)
        rows, _ = ragged(train_set.starts, train_set.n_positives)
        self._answers = dict(zip(rows.tolist(), self._all_answers(rows, positives, settings), strict=True))
        self._lengths = model.tokenizer(self.queries, None, special=False).lengths  # [N]

    def _all_answers(self, rows: np.ndarray, positives: Sequence[str], settings: TrainConfig) -> list[str]:
        """What each positive shows as an example's answer."""
        data = self.train_set
        owners = np.repeat(np.arange(len(data)), data.n_positives)
        answers = list(positives)
        for at, owner in enumerate(owners):
            if data.types[owner] == CLUSTERING and self._shows[owner]:
                if data.categories[owner] is None:
                    raise UserError(f"{data.sources[owner]}: category: {CLUSTERING} shows it as an example's answer")
                answers[at] = data.categories[owner]
        return cut(self.model.tokenizer, answers, settings.example_passage_max_len)

    def _chunks(
        self, queries: np.ndarray, candidates: np.ndarray, passages: np.ndarray, more: Tokens | None
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The batch's texts in chunks, the queries in their contexts; see `EmbedderCollate._chunks`."""
        prefixes = self.examples(queries, candidates)
        own = self.model.tokenize_within([self.queries[row] for row in queries], prefixes)
        distinct, which = np.unique(passages, return_inverse=True)
        known = distinct[: np.searchsorted(distinct, len(self.chunker.tokens))]  # the others are `more`, in its order
        tokens = joined([own, self.chunker.tokens.take(known), *([] if more is None else [more])])
        rows = np.concatenate([np.arange(len(queries)), len(queries) + which])
        return replace(self.chunker, tokens=tokens)(rows)

    def examples(self, queries: np.ndarray, candidates: np.ndarray) -> list[str]:
        """What stands before each query of a batch: its examples, or nothing.

        Args:
            queries: rows int64 [Q]. candidates: theirs, the positive first: int64 [Q, G].
        """
        rng = np.random.default_rng([self.seed, *queries, *candidates[:, 0]])
        suffix = self.model.context.suffix
        shown = [
            f"{self._short[row]}{suffix}{self._answers[int(positive)]}{BETWEEN}"
            for row, positive in zip(queries, candidates[:, 0], strict=True)
        ]
        lengths = self.model.tokenizer(shown, None, special=False).lengths  # [Q]
        answers = self.train_set.text_ids[candidates[:, 0]]  # [Q]
        found = []
        for place, row in enumerate(queries):
            number = int(rng.integers(MOST + 1))
            others = (self._task[queries] == self._task[row]) & (answers != answers[place]) & (queries != row)
            order = rng.permutation(np.flatnonzero(others))[:number] if self._shows[row] else []
            left = self.model.room(self._lengths[row], KEPT)
            prefix = ""
            for other in order:
                left -= lengths[other]
                if left < 0:
                    break
                prefix += shown[other]
            found.append(prefix)
        return found
