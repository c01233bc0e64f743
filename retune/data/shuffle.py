"""Passages with their text in another order, so that a model does not learn where in a passage its answer stands.

What is drawn depends on seed, epoch and passage alone, so a resumed run reads what an uninterrupted one
would have read.  Knows texts and a function that tokenises them; nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

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
    """Which passages are shuffled in an epoch, and their tokens.

    Args:
        texts: passages. first: row of the first of them among the rows that are asked for.
        tokenize: texts → tokens, as the passages themselves are tokenised.
        ratio: share of the passages that are shuffled.
    """

    def __init__(
        self, texts: Sequence[str], first: int, tokenize: Callable[[list[str]], Tokens], ratio: float, seed: int
    ) -> None:
        self.texts, self.first, self.tokenize, self.ratio, self.seed = texts, first, tokenize, ratio, seed

    def __call__(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, Tokens]:
        """Which of `rows` are shuffled, bool [n], and the tokens of those."""
        drawn, texts = np.zeros(len(rows), dtype=bool), []
        for at, row in enumerate((rows - self.first).tolist()):
            if 0 <= row < len(self.texts) and len(self.texts[row]) >= SHORTEST:
                rng = np.random.default_rng([self.seed, epoch, row])
                drawn[at] = rng.random() < self.ratio
                if drawn[at]:
                    texts.append(shuffled(self.texts[row], rng))
        return drawn, self.tokenize(texts)
