"""train: pairs → checkpoint.

Reads the tables, tokenises every text once, and hands model, loss and batches to the trainer.
Several processes are started by torchrun, which runs this module on a job file.
"""

from __future__ import annotations

import sys
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retune import processes
from retune.config import EmbedderConfig, TrainConfig
from retune.runtime import UserError, log, timed
from retune.training.launch import launch, under_torchrun

if TYPE_CHECKING:
    import numpy as np

    from retune.data.batches import EmbedderCollate
    from retune.data.candidates import TrainSet
    from retune.data.devset import DevSet
    from retune.model.embedder import Embedder
    from retune.model.engine import Tokens
    from retune.objective.recipe import Recipe


def train(
    *, texts: Path, queries: Path, pairs: Path, bins: Path | None, settings: TrainConfig, embedder: EmbedderConfig,
    seed: int, drop_longer_than: int | None, state: Path, model_out: Path, history_out: Path,
    judgments: Path | None = None,
) -> None:  # fmt: skip
    """Train `embedder` on the tables; writes the checkpoint `model_out` and the table `history_out`.

    Args:
        bins: the table of lengths, needed where `drop_longer_than` (tokens) is given, or batches are of one length.
        judgments: pairs with the positives of the queries that were set aside, which are searched for during training.
        state: folder of this run's own checkpoints; what is found there is continued, at the end it is removed.

    Raises:
        UserError: for settings or data that cannot be trained on, and for a run that goes wrong.
    """
    files = {"texts": texts, "queries": queries, "pairs": pairs, "bins": bins, "judgments": judgments}
    outputs = {"state": state, "model_out": model_out, "history_out": history_out}
    if settings.nproc_per_node * settings.nnodes > 1 and not under_torchrun():
        job: dict[str, Any] = {name: path and str(path) for name, path in (files | outputs).items()}
        job |= {"settings": settings.model_dump(mode="json"), "embedder": embedder.model_dump(mode="json")}
        job |= {"seed": seed, "drop_longer_than": drop_longer_than}
        launch("retune.stages.train", job, settings.nproc_per_node, Path(state), settings.nnodes)
        return
    _train(files, settings, embedder, seed, drop_longer_than, outputs)


def _train(
    files: dict[str, Path | None], settings: TrainConfig, embedder: EmbedderConfig, seed: int,
    drop_longer_than: int | None, outputs: dict[str, Path],
) -> None:  # fmt: skip
    # Imported here: the parent of several processes needs none of it.
    import torch

    from retune.data import candidates
    from retune.data.batches import GroupDataset
    from retune.fingerprint import content_key
    from retune.model import parts, trainable
    from retune.training import preflight
    from retune.training.arguments import training_arguments
    from retune.training.dev import evaluator
    from retune.training.embedding import EmbedderTask
    from retune.training.m3 import UnifiedTask, unified
    from retune.training.memory import policy
    from retune.training.order import order_of
    from retune.training.run import Outputs, claim, run

    places = Outputs(*(Path(path) for path in outputs.values()))
    aside = _set_aside(files, settings, seed)
    patience = settings.early_stopping_patience
    arguments = training_arguments(
        settings.args, places.checkpoints, seed, embedder.dtype, dev=aside is not None, patience=patience
    )
    data = candidates.load(
        files["texts"], files["queries"], files["pairs"], group_size=settings.train_group_size, seed=seed,
        bins=files["bins"], drop_longer_than=drop_longer_than, scored=settings.knowledge_distillation,
    )  # fmt: skip
    sizes = _group_sizes(settings, data)
    order = order_of(settings, data, arguments.per_device_train_batch_size)
    preflight.check_candidates(settings, order, arguments.world_size, data)
    chosen = {"settings": settings.model_dump(mode="json"), "embedder": embedder.model_dump(mode="json"), "seed": seed}
    chosen |= {"drop_longer_than": drop_longer_than, "processes": arguments.world_size}
    claim(places.state, content_key(chosen, list(files.values()), parts.locate(embedder).folders, __file__))
    model = trainable.load(embedder, settings, seed, arguments.device)
    recipe = _recipe(settings, model)
    with timed("tokenising"):
        half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
        data_seed = arguments.data_seed if arguments.data_seed is not None else arguments.seed
        collate = _collate(model, data, files["texts"], settings, half is not None, sizes, data_seed)
        dev = evaluator(model, aside, half) if aside else None
    dataset = GroupDataset(data, settings.train_group_size, data_seed, sizes)
    bounded = settings.max_tokens_per_batch is not None or settings.sub_batch_size is not None
    keep = policy(settings.grad_cache, bounded, bool(arguments.fsdp))
    if model.heads is None:
        task = EmbedderTask(model, recipe, keep)
    else:
        task = UnifiedTask(model, unified(settings, recipe), keep)
    save = partial(trainable.save, model, training=settings)
    run(task, arguments, dataset, collate, places, save, dev=dev, patience=patience, order=order)


def _group_sizes(settings: TrainConfig, data: TrainSet) -> np.ndarray | None:
    """Passages that count in each query's group, int64 [N]; None where all do."""
    from retune.data import task_types

    sizes = task_types.group_sizes(data.types, data.n_negatives, settings.train_group_size)
    task_types.warn_of_repeats(data.n_negatives, sizes)
    if settings.use_inbatch_neg:
        task_types.warn_of_shared_answers(data.types, data.sources, data.in_batch)
    return sizes if (sizes < settings.train_group_size).any() else None


def _recipe(settings: TrainConfig, model: Embedder) -> Recipe:
    """The objective of the settings.

    Raises:
        UserError: for more dimensions than the model has.
    """
    from retune.objective.recipe import Recipe

    if settings.mrl_dims and max(settings.mrl_dims) > model.dim:
        raise UserError(f"train.mrl_dims: {max(settings.mrl_dims)} is more than the model's {model.dim} dimensions")
    if settings.mrl_dims and model.dim not in settings.mrl_dims:
        log.warning("train.mrl_dims: without %d, whole vectors are not trained on; name it too", model.dim)
    mask = settings.mask_false_negatives
    return Recipe(
        scope="group" if not settings.use_inbatch_neg else "world" if settings.negatives_cross_device else "batch",
        temperature=settings.temperature,
        distillation=settings.kd_loss_type if settings.knowledge_distillation else None,
        mask_false_negatives=mask is not None,
        false_negative_margin=settings.false_negative_margin if mask == "margin" else None,
        directions=tuple(settings.directions),
        dims=tuple(settings.mrl_dims),
        normalize=model.card.normalize,
        info_nce_weight=settings.info_nce_weight,
    )


def _set_aside(files: dict[str, Path | None], settings: TrainConfig, seed: int) -> DevSet | None:
    """What is searched during training; None where nothing is.

    Raises:
        UserError: where training is to be stopped by it, and there is none.
    """
    from retune.data import devset

    found, watched = None, settings.dev_queries and files["judgments"]
    if watched and settings.fix_encoder:
        log.info("train.fix_encoder: vectors stay as they are, so queries set aside tell nothing; the last step counts")
    elif watched:
        found = devset.load(
            files["texts"], files["queries"], files["judgments"], seed=seed, most_queries=settings.dev_queries,
            passages=settings.dev_passages,
        )  # fmt: skip
    if settings.early_stopping_patience and found is None:
        raise UserError(
            "train.early_stopping_patience: no queries are set aside to stop by; set ingest.dev_fraction, "
            "and train.dev_queries above 0"
        )
    return found


def _collate(
    model: Embedder, data: TrainSet, texts: Path, settings: TrainConfig, half: bool, sizes: np.ndarray | None, seed: int
) -> EmbedderCollate:
    """Tokenises the queries and every passage that may be drawn."""
    from retune.data.batches import Chunker, EmbedderCollate, joined
    from retune.data.candidates import positive_texts
    from retune.data.incontext import InContextCollate
    from retune.data.shuffle import Shuffler
    from retune.data.task_types import read_as_queries
    from retune.training import memory, preflight

    model, sections = _reader(model, settings)
    queries = preflight.tokenized(model, data.queries, "query", data.prompts, sections["query"])
    passages, which = _passage_tokens(model, data, texts, sections)
    positives = positive_texts(data, texts) if settings.shuffle_ratio or model.context is not None else []
    shuffler = None
    if settings.shuffle_ratio:
        tokenize = partial(_tokenized_for, model, data.prompts, read_as_queries(data.types))
        shuffler = Shuffler(data, positives, tokenize, settings.shuffle_ratio, seed)
    tokens = joined([queries, *passages])
    most = memory.chunk_tokens(settings.max_tokens_per_batch, settings.grad_cache, model.device)
    chunker = Chunker.of(model, tokens, most, half, settings.sub_batch_size)
    if settings.pad_to_multiple_of:
        # shuffled sentences and queries with examples may have other tokens
        more = [model.max_lengths["passage"]] if shuffler else []
        as_queries = shuffler and read_as_queries(data.types).any()
        more += [model.max_lengths["query"]] if model.context is not None or as_queries else []
        preflight.check_padding(model, max([*more, int(tokens.lengths.max())]), settings.pad_to_multiple_of)
        chunker = replace(chunker, multiple=settings.pad_to_multiple_of)
    common = (data, chunker, len(data) + which, settings.knowledge_distillation, sizes, shuffler)
    if model.context is None:
        return EmbedderCollate(*common)
    return InContextCollate(*common, model=model, positives=positives, settings=settings, seed=seed)


def _reader(model: Embedder, settings: TrainConfig) -> tuple[Embedder, dict[str, str]]:
    """The model as it reads in training, weights shared, and for each kind of text the section that limits its length.

    The model itself keeps its lengths, for the queries that are set aside and for what is saved.
    """
    given = {"query": settings.query_max_length, "passage": settings.passage_max_length}
    shorter = {kind: most for kind, most in given.items() if most and most < model.max_lengths[kind]}
    reader = copy(model)
    reader.max_lengths = model.max_lengths | shorter
    return reader, {kind: "train" if kind in shorter else "embedder" for kind in given}


def _passage_tokens(
    model: Embedder, data: TrainSet, texts: Path, sections: dict[str, str]
) -> tuple[list[Tokens], np.ndarray]:
    """Token arrays of the distinct passages, and each candidate's row in them one after the other, int64 [M].

    A passage is read once as a passage, and once with each query instruction that a symmetric task gives it.
    """
    import numpy as np

    from retune.data.candidates import read_texts
    from retune.data.task_types import read_as_queries
    from retune.training import preflight

    ids, which = np.unique(data.text_ids, return_inverse=True)
    contents = np.array(read_texts(texts, ids), dtype=object)
    instructions, own = np.unique([prompt or "" for prompt in data.prompts], return_inverse=True)
    reading = np.where(read_as_queries(data.types), own, -1)  # [N]: -1 as a passage, else with the query's instruction
    reading = np.repeat(reading, data.n_positives + data.n_negatives)  # [M]
    kinds = np.unique(reading)
    parts, rows, first = [], np.empty_like(which), 0
    for kind in kinds:
        members = np.flatnonzero(reading == kind)
        distinct, place = np.unique(which[members], return_inverse=True)
        chosen = contents[distinct].tolist()
        if kind < 0:
            parts.append(preflight.tokenized(model, chosen, "passage", section=sections["passage"]))
        else:
            own = [str(instructions[kind]) or None] * len(chosen)
            parts.append(preflight.tokenized(model, chosen, "query", own, sections["query"]))
        rows[members] = first + place
        first += len(distinct)
    return parts, rows


def _tokenized_for(
    model: Embedder, prompts: list[str | None], as_queries: np.ndarray, texts: list[str], queries: np.ndarray
) -> Tokens:
    """Passages as the queries that they stand for have them read; see `_passage_tokens`.

    Args:
        prompts: each query's own instruction, [N]. as_queries: whether its passages are read as it is, bool [N].
        queries: rows of the texts' queries, int64 [n].
    """
    import numpy as np

    from retune.data.batches import joined

    with_own = as_queries[queries]
    order = np.argsort(~with_own, kind="stable")  # those that are read as queries first
    own = [prompts[queries[at]] or None for at in order[: with_own.sum()]]
    chosen = [texts[at] for at in order]
    read = joined([model.tokenize(chosen[: len(own)], "query", own), model.tokenize(chosen[len(own) :], "passage")])
    return read.take(np.argsort(order))


def main(job: dict[str, Any]) -> None:
    """One of several processes: train as the job says."""
    job["settings"] = TrainConfig.model_validate(job["settings"])
    job["embedder"] = EmbedderConfig.model_validate(job["embedder"])
    paths = ("texts", "queries", "pairs", "bins", "judgments", "state", "model_out", "history_out")
    train(**job | {name: Path(job[name]) for name in paths if job.get(name)})


if __name__ == "__main__":
    sys.exit(processes.run_job(main, Path(sys.argv[1]), aloud=True))
