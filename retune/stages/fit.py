"""fit: pairs → a cross-encoder of one's own, the teacher where no ready one can be had.

An encoder gets a head with one logit and learns, by cross entropy over groups, to put the positive
before the negatives.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from retune.config import FitConfig, RerankerConfig
from retune.data import candidates
from retune.data.batches import Chunker, GroupDataset, RerankerCollate
from retune.fingerprint import content_key
from retune.model.adapters import unwrap, wrap
from retune.model.backbone import set_dropout
from retune.model.checkpoint import resolve
from retune.model.engine import Tokens
from retune.model.reranker import Reranker
from retune.runtime import UserError, timed
from retune.training.arguments import training_arguments
from retune.training.memory import WhatFits
from retune.training.reranking import RerankerTask
from retune.training.run import Outputs, claim, run

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
    aside, patience = settings.dev_queries, settings.early_stopping_patience
    dtype = reranker.dtype
    arguments = training_arguments(settings.args, places.checkpoints, seed, dtype, SECTION, aside > 0, patience)
    most = settings.max_queries + aside if settings.max_queries else None
    data = candidates.load(texts, queries, pairs, group_size=settings.train_group_size, seed=seed, max_queries=most)
    data, held = data.hold_back(aside, seed)
    if aside and not (len(held) and len(data)):
        raise UserError(
            f"reranker.fit.dev_queries: {aside} of {len(data) + len(held)} queries leave nothing to train on"
        )
    chosen = {"reranker": reranker.model_dump(mode="json"), "seed": seed, "processes": arguments.world_size}
    folder = resolve(reranker.model, reranker.revision, reranker.sha256)
    claim(places.state, content_key(chosen, [texts, queries, pairs], folder, __file__))
    model = Reranker.start(reranker, seed, arguments.device)
    if settings.dropout is not None:
        set_dropout(model, settings.dropout)
    if settings.use_lora:
        model.backbone = _wrapped(model.backbone, settings, seed)
    with timed("tokenising"):
        half = arguments.bf16 or arguments.fp16
        collate = RerankerCollate(Chunker.of(model, _tokens(model, data, texts), None, half))
        dev = partial(mrr, model, _tokens(model, held, texts), held) if aside else None
    data_seed = arguments.data_seed if arguments.data_seed is not None else arguments.seed
    dataset = GroupDataset(data, settings.train_group_size, data_seed)
    task = RerankerTask(model, WhatFits(bool(arguments.fsdp)), settings.loss)
    run(task, arguments, dataset, collate, places, partial(_save, model), SECTION, dev, patience)


def _wrapped(backbone: nn.Module, settings: FitConfig, seed: int) -> nn.Module:
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return wrap(backbone, settings, "SEQ_CLS")
    except UserError as error:
        raise UserError(f"reranker.fit.{error}") from None


def _save(model: Reranker, folder: Path) -> None:
    model.backbone = unwrap(model.backbone)
    model.save(folder)


def mrr(model: Reranker, tokens: Tokens, data: candidates.TrainSet) -> float:
    """Mean over queries of 1 / rank of the best positive among the query's candidates; ties count against it."""
    scores = model.scores(tokens)  # [M]
    found = []
    for start, n_positives, n_negatives in zip(data.starts, data.n_positives, data.n_negatives, strict=True):
        own = scores[start : start + n_positives + n_negatives]
        found.append(1 / (1 + (own[n_positives:] >= own[:n_positives].max()).sum()))
    return float(np.mean(found))


def _tokens(model: Reranker, data: candidates.TrainSet, texts: Path) -> Tokens:
    """Tokens of every pair of a query and its candidates; each text is tokenised once."""
    ids, which = np.unique(data.text_ids, return_inverse=True)
    query_rows = np.repeat(np.arange(len(data)), data.n_positives + data.n_negatives)
    passages = model.pieces(candidates.read_texts(texts, ids), "passage")
    return model.join(model.pieces(data.queries, "query"), passages, query_rows, which)
