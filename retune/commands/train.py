"""JSONL in, a tuned embedding model out; `torchrun --nproc_per_node N -m retune train …` does it in N processes.

--output_dir becomes a checkpoint that SentenceTransformer and transformers.AutoModel load, with the
history of the run beside it (history.parquet).  A run that was interrupted goes on from its last
checkpoint when the same command is given again.  Flags that FlagEmbedding's trainers name have its
defaults, each family those of its trainer, so that decoders are trained by adapters; but what a checkpoint
says (pooling, an in-context model's format and suffix) is believed, and adapters are saved folded into the
model too.  TrainingArguments have retune's defaults, which suit embedding models better than transformers' own.
A teacher's scores, pos_scores and neg_scores, are learnt from with --knowledge_distillation.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retune.commands import arguments, models, rows
from retune.commands.flags import Flag, Given, from_section, whole
from retune.commands.placing import holds_model, place
from retune.commands.work import WORK_DIR, Work, check_writable, identity, input_files, model_identity
from retune.config import Config, EmbedderConfig, IngestConfig, TrainConfig
from retune.runtime import UserError, log, use_hub

TRAINING, MISSING = "training", "not here yet"
# What the incumbents' trainers have and this one does not, and the value that asks for nothing.
ABSENT = {"only_merge_lora_model": False, "use_slow_tokenizer": False, "use_fast_tokenizer": True}


def _positive_or_none(text: str) -> int | None:
    """FlagEmbedding's --sub_batch_size -1 means none."""
    return None if re.fullmatch(r"0|-\d+|None", text) else whole(1)(text)


TRAIN = from_section(
    "train", TrainConfig, TRAINING,
    {
        "sub_batch_size": {"convert": _positive_or_none},
        "colbert_dim": {"convert": int},
        "nproc_per_node": {
            "help": "Processes that this command starts; torchrun starts its own.",
        },
        "use_lora": {"shown": "True for decoder and icl, else False"},
        "lora_rank": {"default": 64}, "lora_alpha": {"default": 16.0, "convert": float},
        "continue_adapters": {
            "help": "Go on training the adapters of --raw_peft; --from_peft FOLDER stands for both, and --use_lora.",
        },
    },
    # the lengths are those of the model here: it is trained with them alone
    leave=("args", "same_length_within_batch", "head_weights", "query_max_length", "passage_max_length"),
)  # fmt: skip


NOT_HERE = [
    Flag((name,), f"Refused, but for {neutral}.", None, "bool", default=neutral, group=MISSING)
    for name, neutral in ABSENT.items()
]
FLAGS = [
    rows.input_flag(("train_data", "input_file")),
    Flag(("output_dir",), "Folder of the model.", required=True),
    Flag(("overwrite_output_dir",), "Replace the model that --output_dir holds.", kind="bool", default=False),
    *rows.ON_BAD_ROW,
    Flag(("max_example_num_per_dataset",), "Take at most so many rows of each file: the first ones.",
         convert=whole(1), shown="all"),
    Flag(("dev_fraction",), "Share of the queries that is set aside, never trained on: the checkpoint with the best "
         "nDCG@10 on them becomes the model.", "ingest.dev_fraction", convert=float, default=0.0),
    Flag(("cache_path",), "Folder that keeps the rows as tables, for other runs on the same files.",
         shown="with the run's state"),
    Flag(WORK_DIR.names, "Folder of the run's state: tables and checkpoints.",
         shown="<output_dir>/.state, removed at the end"),
    *models.trained_flags(),
    Flag(
        ("use_row_prompts",), "A row's `prompt` comes before its query; in FlagEmbedding it does so only where "
        "--query_instruction_for_retrieval is given.", kind="bool", default=True, group=models.MODEL,
    ),
    Flag(("cache_dir",), models.CACHE_DIR.help, shown=models.CACHE_DIR.shown, group=models.MODEL),
    Flag(("token",), "Of the hub.", shown="the environment's HF_TOKEN", group=models.MODEL),
    *TRAIN,
    Flag(("from_peft",), "Adapters that are trained further: --use_lora --continue_adapters --raw_peft FOLDER.",
         convert=models.or_none, group=TRAINING),
    Flag(("seed",), "Of every draw.", convert=whole(0), default=Config.model_fields["seed"].default, group=TRAINING),
    *arguments.USUAL,
    Flag(("logging_dir",), "Folder of TensorBoard's logs, with --report_to tensorboard.", shown="<output_dir>/runs",
         group=arguments.GROUP),
    *NOT_HERE,
]  # fmt: skip
further_flags: Callable[[], list[Flag]] = arguments.others


def run(given: Given) -> None:
    """Train as the flags say; where torchrun has started several processes, this is one of them.

    Raises:
        UserError: for a mistake in flags or rows, and for a run that goes wrong; an earlier model is left as it was.
    """
    leads = int(os.environ.get("RANK", 0)) == 0
    if not leads:
        log.setLevel("ERROR")  # one of them is enough to tell
    output = Path(given["output_dir"]).expanduser()
    _check(given, output)
    files = [path for path in input_files(given, "train_data") if output.resolve() not in path.resolve().parents]
    if not files:
        raise given.mistake("train_data", "nothing but the files of --output_dir")
    _environment(given, output)
    embedder = _embedder(given)
    settings = given.section("train", TrainConfig, args=arguments.arguments(given), **_adapters(given, embedder))
    work = Work(Path(given["work_dir"]).expanduser() if given["work_dir"] else output / ".state", True, leads)
    tables = _tables(given, files, work)
    found = rows.into_tables(
        given, tables, files, [], output / "rejected.jsonl", given["use_row_prompts"],
        settings.knowledge_distillation, _datasets(given, files), given["seed"],
    )  # fmt: skip
    made = _train(given, work, found, tables.key("ingest"), settings, embedder)
    if leads:
        place(*made, output)
        if not given["work_dir"]:
            shutil.rmtree(work.folder)
        log.info("%s: the model; history.parquet beside it tells of the run", output)


def _check(given: Given, output: Path) -> None:
    """Raise a UserError for flags that ask for what is not here, or an output that cannot be written."""
    for flag in NOT_HERE:
        if given[flag.name] != flag.default:
            raise given.mistake(flag.name, "not here yet; leave it out")
    models.check_family(given, models.KNOWN)
    if given["from_peft"] and given["peft_path"]:
        raise UserError(f"{given.shown('from_peft')} and {given.shown('peft_path')}: expected one of them; fold the "
                        "second into a model first")  # fmt: skip
    if output.exists() and not output.is_dir():
        raise given.mistake("output_dir", f"{output}: expected a folder, found a file")
    check_writable(output, given, "output_dir")
    if holds_model(output) and not given["overwrite_output_dir"]:
        raise given.mistake("output_dir", f"{output}: holds a model; --overwrite_output_dir replaces it")


def _environment(given: Given, output: Path) -> None:
    """What transformers and the hub read from the environment, for this process and its children."""
    use_hub(given["cache_dir"], given["token"])
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(given["logging_dir"] or output / "runs"))


def _embedder(given: Given) -> EmbedderConfig:
    """The section `embedder`; a checkpoint that does not say how it pools is pooled by its first token."""
    from retune.model.embedder_families import pools
    from retune.model.parts import locate

    going_on = {"peft_path": given["from_peft"]} if given["from_peft"] else {}
    found = given.section("embedder", EmbedderConfig, **going_on)
    if not pools(found, locate(found)):
        log.info("%s does not say how it pools: cls, see %s", found.model, given.shown("pooling"))
        return found.model_copy(update={"pooling": "cls"})
    return found


def _adapters(given: Given, embedder: EmbedderConfig) -> dict[str, bool]:
    """What holds of adapters where the flags do not say it: as in FlagEmbedding, decoders are trained by them."""
    if given["from_peft"]:
        return {"use_lora": True, "continue_adapters": True}
    if given.typed("use_lora"):
        return {}
    from retune.model.embedder_families import FAMILIES, family_chosen
    from retune.model.parts import locate

    family = family_chosen(embedder, locate(embedder))
    if not FAMILIES[family].causal:
        return {}
    log.info("family %s: low-rank adapters are trained; %s False trains all weights", family, given.shown("use_lora"))
    return {"use_lora": True}


def _datasets(given: Given, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Each file as a dataset of its own, {name: what the config says of it}."""
    named = IngestConfig(train=[str(path) for path in files]).train
    most = given["max_example_num_per_dataset"]
    return {name: {"path": dataset.path, "max_examples": most} for name, dataset in named.items()}


def _tables(given: Given, files: Sequence[Path], work: Work) -> Work:
    """Where the rows' tables lie."""
    if not given["cache_path"]:
        return work
    names = ["on_bad_row", "max_example_num_per_dataset", "use_row_prompts", "knowledge_distillation", "dev_fraction"]
    names += ["seed"] if given["dev_fraction"] else []
    of = json.dumps([identity(files), [given[name] for name in names]])
    return Work(Path(given["cache_path"]).expanduser() / hashlib.sha256(of.encode()).hexdigest()[:16], True, work.leads)


def _train(
    given: Given, work: Work, found: Mapping[str, Path], rows_key: str, settings: TrainConfig, embedder: EmbedderConfig
) -> tuple[Path, Path]:
    """The folder of the model and the table of the history."""
    from retune.stages.train import train

    model, history = work.path("train/model"), work.path("train/history.parquet")
    of = {
        "settings": settings.model_dump(mode="json"), "embedder": embedder.model_dump(mode="json"), "rows": rows_key,
        "seed": given["seed"], "model": model_identity(embedder.model_dump()),
        "processes": os.environ.get("WORLD_SIZE"),
    }  # fmt: skip
    if work.done("train", "train", [model], of):  # interrupted while the model was put in its place
        _meet()
        return model, history
    try:
        train(
            texts=found["texts"], queries=found["queries"], pairs=found["pairs"], bins=None, settings=settings,
            embedder=embedder, seed=given["seed"], drop_longer_than=None, state=work.path("train/state"),
            model_out=model, history_out=history, judgments=found["pairs"] if given["dev_fraction"] else None,
        )  # fmt: skip
    except UserError as error:
        raise UserError(str(error).replace(f"{arguments.KEY}: ", "")) from None
    if work.leads:
        _card(model, found, settings, embedder)
        work.record("train", "train", of)
    return model, history


def _card(model: Path, found: Mapping[str, Path], settings: TrainConfig, embedder: EmbedderConfig) -> None:
    """Write the model card into the model's folder."""
    from retune.stages.card import card

    sections = {"embedder": embedder, "train": settings}
    shown = {name: section.model_dump(mode="json", exclude_defaults=True) for name, section in sections.items()}
    card(
        kind="tuned", name="tuned model", model=model, settings={"base": embedder.model, "sections": shown},
        queries=found["queries"], pairs=found["pairs"], out=model / "README.md",
    )  # fmt: skip


def _meet() -> None:
    """Wait until all processes of torchrun are here."""
    from retune.training.launch import under_torchrun

    if under_torchrun():
        import torch.distributed as dist

        from retune.objective.gather import leave

        dist.init_process_group("gloo")
        leave()
