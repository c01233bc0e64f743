"""How good an embedder is, during training, on the queries that were set aside."""

from __future__ import annotations

from collections.abc import Callable

import torch

from retune.data.devset import DevSet
from retune.model.embedder import Embedder

K = 10  # of nDCG


def evaluator(model: Embedder, aside: DevSet, half: torch.dtype | None) -> Callable[[], float]:
    """A function that tells the mean nDCG@10 of the model as it is then; texts are tokenised once, here.

    Args:
        half: what training computes in, where that is not float32.
    """
    queries = model.tokenize(aside.queries, "query", aside.prompts)
    passages = model.tokenize(aside.passages, "passage")

    def ndcg() -> float:
        with torch.autocast(model.device.type, half, enabled=half is not None):
            return aside.ndcg(model.encode(queries) @ model.encode(passages).T, K)  # [Q, P]

    return ndcg
