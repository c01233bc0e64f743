"""fit: pairs → a cross-encoder of one's own, the teacher where no ready one can be had.

An encoder gets a head with one logit and learns, by cross entropy over groups, to put the positive
before the negatives.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from retune.config import RerankerConfig
from retune.data import candidates
from retune.data.batches import Chunker, GroupDataset, RerankerCollate
from retune.model.backbone import set_dropout
from retune.model.checkpoint import resolve
from retune.model.reranker import Reranker
from retune.runtime import timed
from retune.training.arguments import training_arguments
from retune.training.reranking import RerankerTask
from retune.training.run import Outputs, claim, run, run_key

SECTION = "reranker.fit.args"


def fit(
    *, texts: Path, queries: Path, pairs: Path, reranker: RerankerConfig, seed: int, state: Path, model_out: Path,
    history_out: Path,
) -> None:  # fmt: skip
    """Train a cross-encoder from the encoder `reranker.model` as `reranker.fit` says.

    Writes the checkpoint `model_out` and the table `history_out`; `state` holds this run's own
    checkpoints, from which an interrupted run goes on, and is removed at the end.

    Raises:
        UserError: for settings or data that cannot be trained on, and for a run that goes wrong.
    """
    settings, places = reranker.fit, Outputs(Path(state), Path(model_out), Path(history_out))
    arguments = training_arguments(settings.args, places.checkpoints, seed, reranker.dtype, SECTION)
    data = candidates.load(
        texts, queries, pairs, group_size=settings.train_group_size, seed=seed, max_queries=settings.max_queries
    )
    chosen = {"reranker": reranker.model_dump(mode="json"), "seed": seed, "processes": arguments.world_size}
    folder = resolve(reranker.model, reranker.revision, reranker.sha256)
    claim(places.state, run_key(chosen, [texts, queries, pairs], folder, __file__))
    model = Reranker.start(reranker, seed, arguments.device)
    if settings.dropout is not None:
        set_dropout(model, settings.dropout)
    with timed("tokenising"):
        collate = RerankerCollate(_chunker(model, data, texts, arguments.bf16 or arguments.fp16))
    data_seed = arguments.data_seed if arguments.data_seed is not None else arguments.seed
    dataset = GroupDataset(data, settings.train_group_size, data_seed)
    run(RerankerTask(model), arguments, dataset, collate, places, model.save, SECTION)


def _chunker(model: Reranker, data: candidates.TrainSet, texts: Path, half: bool) -> Chunker:
    """Tokens of every pair that may be drawn; each text is tokenised once."""
    ids, which = np.unique(data.text_ids, return_inverse=True)
    query_rows = np.repeat(np.arange(len(data)), data.n_positives + data.n_negatives)
    passages = model.pieces(candidates.read_texts(texts, ids), "passage")
    tokens = model.join(model.pieces(data.queries, "query"), passages, query_rows, which)
    return Chunker.of(model, tokens, None, half)
