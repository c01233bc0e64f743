"""Positives with their text in another order, so that a model does not learn where in a passage its answer stands.

A positive is drawn for the query that it stands for: where the same passage is another query's negative, in the
same batch, it reads as it is.  Negatives stay as they are, and so do the examples of an in-context model.  What
is drawn depends on seed, epoch and query alone, so a resumed run reads what an uninterrupted one would have read.
Knows texts and a function that tokenises them; nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from retune.data.candidates import TrainSet
from retune.model.engine import Tokens

SHORTEST, PIECES = 101, 3  # characters of a text that is cut, and what it is cut into


def shuffled(text: str, rng: np.random.Generator) -> str:
    """The text's three thirds in a random order, a space between them; a short text as it is."""
    if len(text) < SHORTEST:
        return text
    size = len(text) // PIECES + 1
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    return " ".join(pieces[at] for at in rng.permutation(len(pieces)))


class Shuffler:
    """Which queries' positives are shuffled in an epoch, and their tokens.

    Args:
        positives: the texts of all positives, in the order of the candidates.
        tokenize: (texts, rows int64 [n] of their queries) → tokens, as those queries' passages are read.
        ratio: share of the positives that are shuffled.
    """

    def __init__(
        self, data: TrainSet, positives: Sequence[str], tokenize: Callable[[list[str], np.ndarray], Tokens],
        ratio: float, seed: int,
    ) -> None:  # fmt: skip
        self.positives, self.tokenize, self.ratio, self.seed = positives, tokenize, ratio, seed
        self.query_ids = data.query_ids
        self._before = np.cumsum(data.n_positives) - data.n_positives - data.starts  # candidate → place among positives

    def __call__(self, epoch: int, queries: np.ndarray, positives: np.ndarray) -> tuple[np.ndarray, Tokens]:
        """Which of a batch's positives are shuffled, bool [Q], and the tokens of those.

        Args:
            queries: rows int64 [Q]. positives: the candidate that is the positive of each, int64 [Q].
        """
        drawn, texts = np.zeros(len(queries), dtype=bool), []
        for at, (query, place) in enumerate(zip(queries, self._before[queries] + positives, strict=True)):
            text = self.positives[place]
            if len(text) >= SHORTEST:
                rng = np.random.default_rng([self.seed, epoch, int(self.query_ids[query]), 1])
                drawn[at] = rng.random() < self.ratio
                if drawn[at]:
                    texts.append(shuffled(text, rng))
        return drawn, self.tokenize(texts, queries[drawn])
