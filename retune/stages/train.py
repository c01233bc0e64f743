"""train: pairs → checkpoint.

Reads the tables, tokenises every text once, and hands model, loss and batches to the trainer.
Several processes are started by torchrun, which runs this module on a job file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retune.config import EmbedderConfig, TrainConfig
from retune.runtime import UserError, log, timed
from retune.training.launch import launch, run_job, under_torchrun

if TYPE_CHECKING:
    import numpy as np
    import torch

    from retune.data.batches import EmbedderCollate
    from retune.data.candidates import TrainSet
    from retune.model.embedder import Embedder
    from retune.model.engine import Tokens
    from retune.objective.recipe import Recipe


def train(
    *, texts: Path, queries: Path, pairs: Path, bins: Path | None, settings: TrainConfig, embedder: EmbedderConfig,
    seed: int, drop_longer_than: int | None, state: Path, model_out: Path, history_out: Path,
) -> None:  # fmt: skip
    """Train `embedder` on the tables; writes the checkpoint `model_out` and the table `history_out`.

    Args:
        bins: the table of lengths, needed where `drop_longer_than` (tokens) is given.
        state: folder of this run's own checkpoints; what is found there is continued, at the end it is removed.

    Raises:
        UserError: for settings or data that cannot be trained on, and for a run that goes wrong.
    """
    files = {"texts": texts, "queries": queries, "pairs": pairs, "bins": bins}
    outputs = {"state": state, "model_out": model_out, "history_out": history_out}
    if settings.nproc_per_node > 1 and not under_torchrun():
        job: dict[str, Any] = {name: path and str(path) for name, path in (files | outputs).items()}
        job |= {"settings": settings.model_dump(mode="json"), "embedder": embedder.model_dump(mode="json")}
        job |= {"seed": seed, "drop_longer_than": drop_longer_than}
        launch("retune.stages.train", job, settings.nproc_per_node, Path(state))
        return
    _train(files, settings, embedder, seed, drop_longer_than, outputs)


def _train(
    files: dict[str, Path | None], settings: TrainConfig, embedder: EmbedderConfig, seed: int,
    drop_longer_than: int | None, outputs: dict[str, Path],
) -> None:  # fmt: skip
    # Imported here: the parent of several processes needs none of it.
    from retune.data import candidates
    from retune.data.batches import GroupDataset
    from retune.fingerprint import content_key
    from retune.model.backbone import set_dropout
    from retune.model.checkpoint import resolve
    from retune.training.arguments import training_arguments
    from retune.training.embedding import EmbedderTask
    from retune.training.m3 import UnifiedTask, unified
    from retune.training.memory import policy
    from retune.training.run import Outputs, claim, run

    places = Outputs(*(Path(path) for path in outputs.values()))
    arguments = training_arguments(settings.args, places.checkpoints, seed, embedder.dtype)
    data = candidates.load(
        files["texts"], files["queries"], files["pairs"], group_size=settings.train_group_size, seed=seed,
        bins=files["bins"], drop_longer_than=drop_longer_than, scored=settings.knowledge_distillation,
    )  # fmt: skip
    sizes = _group_sizes(settings, data)
    _check_candidates(settings, arguments.per_device_train_batch_size, arguments.world_size, data)
    chosen = {"settings": settings.model_dump(mode="json"), "embedder": embedder.model_dump(mode="json"), "seed": seed}
    folder = resolve(embedder.model, embedder.revision, embedder.sha256)
    chosen |= {"drop_longer_than": drop_longer_than, "processes": arguments.world_size}
    claim(places.state, content_key(chosen, list(files.values()), folder, __file__))
    model = _model(embedder, settings, seed, arguments.device)
    if settings.dropout is not None:
        set_dropout(model, settings.dropout)
    recipe = _recipe(settings, model)
    with timed("tokenising"):
        collate = _collate(model, data, files["texts"], settings, arguments.bf16 or arguments.fp16, sizes, seed)
    data_seed = arguments.data_seed if arguments.data_seed is not None else arguments.seed
    dataset = GroupDataset(data, settings.train_group_size, data_seed, sizes)
    bounded = settings.max_tokens_per_batch is not None or settings.sub_batch_size is not None
    keep = policy(settings.grad_cache, bounded)
    task = UnifiedTask(model, unified(settings, recipe), keep) if model.heads else EmbedderTask(model, recipe, keep)
    run(task, arguments, dataset, collate, places, model.save)


def _model(embedder: EmbedderConfig, settings: TrainConfig, seed: int, target: torch.device) -> Embedder:
    """The embedder to be trained, in float32, with the heads that are."""
    import torch

    from retune.model.embedder import Embedder

    embedder = embedder.model_copy(update={"examples": []})  # batches have examples of their own
    if not settings.unified_finetuning:
        model = Embedder.load(embedder, torch.float32, target)
        if model.heads is not None:
            log.info("train.unified_finetuning is off: dense is trained alone, and no other head is saved")
            model.heads = None
        return model
    model = Embedder.start(embedder, target, seed, settings.colbert_dim)
    if settings.fix_encoder:
        model.backbone.requires_grad_(False)
    return model


def _group_sizes(settings: TrainConfig, data: TrainSet) -> np.ndarray | None:
    """Passages that count in each query's group, int64 [N]; None where all do."""
    from retune.data import task_types

    sizes = task_types.group_sizes(data.types, data.n_negatives, settings.train_group_size)
    task_types.warn_of_repeats(data.n_negatives, sizes)
    if settings.use_inbatch_neg:
        task_types.warn_of_shared_answers(data.types, data.sources, data.in_batch)
    return sizes if (sizes < settings.train_group_size).any() else None


def _check_candidates(settings: TrainConfig, batch_size: int, processes: int, data: TrainSet) -> None:
    """A query with no passage but its positive teaches nothing: its loss is 0."""
    if settings.train_group_size > 1:
        return
    if not settings.use_inbatch_neg or batch_size * (processes if settings.negatives_cross_device else 1) == 1:
        raise UserError(
            "train.train_group_size: 1 leaves a query nothing but its positive, so the loss is 0; raise it, "
            "or use train.use_inbatch_neg with train.args.per_device_train_batch_size above 1"
        )
    if not data.in_batch.all():
        source = data.sources[int((~data.in_batch).argmax())]
        raise UserError(f"{source}: in_batch_negatives is false here, so train.train_group_size must be at least 2")


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


def _collate(
    model: Embedder, data: TrainSet, texts: Path, settings: TrainConfig, half: bool, sizes: np.ndarray | None,
    seed: int,
) -> EmbedderCollate:  # fmt: skip
    """Tokenises the queries and every passage that may be drawn."""
    from retune.data.batches import Chunker, EmbedderCollate, joined
    from retune.data.candidates import positive_texts
    from retune.data.incontext import InContextCollate

    queries = model.tokenize(data.queries, "query", data.prompts)
    passages, which = _passage_tokens(model, data, texts)
    chunker = Chunker.of(
        model, joined([queries, *passages]), settings.max_tokens_per_batch, half, settings.sub_batch_size
    )
    common = (data, chunker, len(data) + which, settings.knowledge_distillation, sizes)
    if model.context is None:
        return EmbedderCollate(*common)
    positives = positive_texts(data, texts)
    return InContextCollate(*common, model=model, positives=positives, settings=settings, seed=seed)


def _passage_tokens(model: Embedder, data: TrainSet, texts: Path) -> tuple[list[Tokens], np.ndarray]:
    """Token arrays of the distinct passages, and each candidate's row in them one after the other, int64 [M].

    A passage is read once as a passage, and once with each query instruction that a symmetric task gives it.
    """
    import numpy as np

    from retune.data.candidates import read_texts
    from retune.data.task_types import read_as_queries

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
            parts.append(model.tokenize(chosen, "passage"))
        else:
            parts.append(model.tokenize(chosen, "query", [str(instructions[kind]) or None] * len(chosen)))
        rows[members] = first + place
        first += len(distinct)
    return parts, rows


def main(job: dict[str, Any]) -> None:
    """One of several processes: train as the job says."""
    job["settings"] = TrainConfig.model_validate(job["settings"])
    job["embedder"] = EmbedderConfig.model_validate(job["embedder"])
    paths = ("texts", "queries", "pairs", "bins", "state", "model_out", "history_out")
    train(**job | {name: job[name] and Path(job[name]) for name in paths})


if __name__ == "__main__":
    sys.exit(run_job(main, Path(sys.argv[1])))
