"""How well a model retrieves: MRR, Recall and others on a benchmark, as one line on standard output.

Three forms of the same: FlagEmbedding's eval_msmarco (--corpus_data and --query_data, files of rows {content}
and {query, positive}, or data sets on the hub: MS MARCO where none are named), Intel's evaluate.py
(--index_file_jsonl_path and --query_file_jsonl_path, rows {context: [..]} and {query, pos}), and any benchmark
of the workflow (--format, --path). What is printed are means over the queries; the log adds 95% intervals.
An M3 model is measured by each of --heads, as the workflow does it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from retune import tables
from retune.commands import arrays, benchmark, models, rankings, vectors
from retune.commands.flags import Flag, Given, from_section, whole
from retune.commands.work import WORK_DIR, Work, identity, output_file, work_folder
from retune.config import BenchmarkConfig, Config, EmbedderConfig, EvaluateConfig
from retune.runtime import atomic, log
from retune.sections.evaluation import HUB, SumWeights

INSTRUCTION = "Represent this sentence for searching relevant passages: "
LENGTHS = {"query": 32, "passage": 128}  # tokens, of eval_msmarco
CUTOFFS = (1, 10, 100)
SEARCH = "search"
# What is printed, by the form; every measure is in the table that --save_metrics writes.
PRINTED = {
    "msmarco": ("MRR", "Recall"), "intel": ("MRR", "Hit"), "beir": ("nDCG", "MAP", "Recall", "P", "MRR", "Hit"),
    "flag": ("nDCG", "MAP", "Recall", "P", "MRR", "Hit"),
}  # fmt: skip


def _model_flags() -> list[Flag]:
    """The embedder's, under this command's own names as well."""
    changed: dict[str, dict[str, Any]] = {
        "embedder_name_or_path": {
            "names": ("encoder", "model_name", "embedder_name_or_path", "model_name_or_path", "model"),
            "default": "BAAI/bge-base-en-v1.5",
        },
        **{
            f"embedder_{kind}_max_length": {
                "names": (f"max_{kind}_length", f"embedder_{kind}_max_length", f"{kind}_max_length"), "default": None,
                "shown": f"{length} with --corpus_data and --query_data, else the checkpoint's own",
            }
            for kind, length in LENGTHS.items()
        },
        "use_fp16": {"names": ("fp16", "use_fp16")},
        "use_bf16": {"names": ("bf16", "use_bf16")},
    }  # fmt: skip
    found = [*models.embedder_flags(), *models.hardware_flags()]
    return [replace(flag, **changed.get(flag.name, {})) for flag in found]


FLAGS = [
    *benchmark.FLAGS,
    *_model_flags(),
    Flag(
        ("add_instruction",), f'Put "{INSTRUCTION.strip()}" before each query; `False`: nothing.', kind="bool",
        shown="the checkpoint's own instruction, or the one that is given", group=models.MODEL,
    ),
    *vectors.embed_flags(),
    Flag(("save_embedding",), "Save the passages' vectors at --save_path.", kind="bool", default=False, group=SEARCH),
    Flag(("load_embedding",), "Take the passages' vectors from --save_path.", kind="bool", default=False, group=SEARCH),
    Flag(("save_path",), "File of vectors: .parquet, .npy, or any other name for the bare numbers.",
         default="embeddings.memmap", group=SEARCH),
    *from_section(
        "evaluate", EvaluateConfig, SEARCH,
        {
            "cutoffs": {"convert": whole(1), "shown": "1 with --index_file_jsonl_path, else 1 10 100, up to --k"},
            "k": {"convert": whole(1)},
        },
        leave=("benchmarks", "models", "min_delta", "trec", "heads", "head_weights"),
    ),
    *rankings.FLAGS,
    Flag(("seed",), "Of an index's training and of the intervals.", convert=whole(0),
         default=Config.model_fields["seed"].default, group=SEARCH),
    Flag(("save_run",), "File that gets the best passages of every query in TREC's form; with several --heads one for "
         "each, run-sparse.trec beside run.trec."),
    Flag(("save_metrics",), "Parquet table that gets all measures, of every query and their means with intervals."),
    WORK_DIR,
]  # fmt: skip


def run(given: Given) -> None:
    """Evaluate as the flags say.

    Raises:
        UserError: for a mistake in flags or rows.
    """
    asked = benchmark.asked(given)
    if asked.format == "intel":
        log.info("a passage is a hit where it is a positive, word for word; for evaluate.py a part of one is a hit too")
    settings = _settings(given, asked.format)
    for name in ("save_run", "save_metrics", *(["save_path"] if given["save_embedding"] else [])):
        if given[name]:
            output_file(given, name)
    if given["save_embedding"] and given["load_embedding"]:
        raise given.mistake("load_embedding", f"and {given.shown('save_embedding')}: expected one of them")
    rankings.check_kept(given, settings)
    devices = models.prepare(given)
    embedder = _embedder(given, asked.format)
    models.fetch(embedder.model, embedder.revision)
    with work_folder(given, Path(given["save_run"] or given["save_metrics"] or given["save_path"])) as work:
        found = _read(given, work, asked)
        queries, texts, steps = _vectors(given, work, found, embedder, devices, settings)
        runs, measured = _measure(work, found, queries, texts, settings, asked, given["seed"], steps)
        if given["save_run"]:
            tag = re.sub(r"^.*[:/]", "", embedder.model.rstrip("/"))
            rankings.save(Path(given["save_run"]), runs, found, tag)
        if given["save_metrics"]:
            with atomic(Path(given["save_metrics"])) as part:
                part.write_bytes(measured.read_bytes())
        from retune.stages.metrics import summary

        log.info("%s", summary(measured))
        printed = {head: means(measured, PRINTED[asked.format], rankings.label(head)) for head in settings.heads}
        print(printed if len(printed) > 1 else printed[settings.heads[0]])


# ---- what is asked for --------------------------------------------------------------------------


def _settings(given: Given, form: str) -> EvaluateConfig:
    fixed: dict[str, Any] = {"head_weights": given.section("evaluate.head_weights", SumWeights)}
    k = given["k"] or EvaluateConfig.model_fields["k"].default
    if not given["cutoffs"]:
        usual = [cutoff for cutoff in ((1,) if form == "intel" else CUTOFFS) if cutoff <= int(k)]
        fixed["cutoffs"] = usual or [1]
    return given.section("evaluate", EvaluateConfig, **fixed)


def _embedder(given: Given, form: str) -> EmbedderConfig:
    """The section `embedder`, with what eval_msmarco takes for granted where its form is asked for."""
    found = models.embedder(given)
    changed: dict[str, Any] = {}
    for kind, length in LENGTHS.items():
        if form == "msmarco" and getattr(found, f"{kind}_max_length") is None:
            changed[f"{kind}_max_length"] = length
    if given.typed("add_instruction"):
        if given.typed("query_instruction"):
            raise given.mistake("add_instruction", f"and {given.shown('query_instruction')}: expected one of them")
        changed["query_instruction"] = INSTRUCTION if given["add_instruction"] else ""
    return found.model_copy(update=changed)


# ---- the steps ----------------------------------------------------------------------------------


def _read(given: Given, work: Work, asked: BenchmarkConfig) -> dict[str, Path]:
    """The benchmark's tables."""
    from retune.stages import ingest

    found = {name: work.path(f"ingest/{name}.parquet") for name in ("texts", "queries", "pairs")}
    brought = [Path(file) for file in asked.files().values() if not file.startswith(HUB)]
    lost = [file for file in brought if not file.is_file()]
    if lost:
        raise given.mistake("path", f"{lost[0]}: no such file")
    of = {"settings": asked.model_dump(mode="json"), "files": identity(brought)}
    work.step("benchmark", "ingest", list(found.values()), of, lambda: ingest.benchmark(asked, found))
    return found


def _vectors(
    given: Given, work: Work, found: Mapping[str, Path], embedder: EmbedderConfig, devices: Sequence[str],
    settings: EvaluateConfig,
) -> tuple[Path, list[Path], list[str]]:  # fmt: skip
    """Vectors of the queries and of the passages, embedded or taken from a file, and the steps so far."""
    common = (embedder, devices, ["benchmark"], settings.stored_heads())
    [queries], one = vectors.embed_table(given, work, found["queries"], "query", *common)
    path = Path(given["save_path"]).expanduser()
    if given["load_embedding"]:
        from retune.data.search import dimension

        out = work.path("embed/loaded.parquet")
        size = tables.n_rows(found["texts"]), dimension([queries])
        texts = arrays.read(path, *size, out, tables.metadata(queries))
        log.info("%s: %s vectors of %s dimensions%s", path, f"{size[0]:,}", size[1],
                 "" if texts == path else "; nothing in the file says which model they are of")  # fmt: skip
        return queries, [texts], ["benchmark", *one]
    texts, two = vectors.embed_table(given, work, found["texts"], "passage", *common)
    if given["save_embedding"]:
        shape, dtype = arrays.write(texts, path)
        log.info("%s: %s vectors of %d dimensions, %s", path, f"{shape[0]:,}", shape[1], dtype)
    return queries, texts, ["benchmark", *one, *two]


def _measure(
    work: Work, found: Mapping[str, Path], queries: Path, texts: Sequence[Path], settings: EvaluateConfig,
    asked: BenchmarkConfig, seed: int, steps: Sequence[str],
) -> tuple[dict[str, Path], Path]:  # fmt: skip
    """The run of each head, and the table of metrics."""
    from retune.stages.evaluate import evaluate
    from retune.stages.metrics import metrics

    runs, out = {}, work.path("evaluate/metrics.parquet")
    names = ("k", "index_factory", "nprobe", "ef_search", "index_train_size")
    of = {name: getattr(settings, name) for name in names} | {"seed": seed}
    of["vectors"] = identity(texts) if work.kept else None  # they may come from a file
    options = {name: of[name] for name in (*names, "seed")}
    for head in settings.heads:
        options |= {"head": head, "weights": settings.head_weights.model_dump()}
        runs[head] = work.path(f"evaluate/{rankings.label(head)}.run.parquet")
        do = partial(evaluate, queries=queries, texts=texts, out=runs[head], **options)
        work.step(f"evaluate {head}", "evaluate", [runs[head]], of | options, do, steps)
    levels = {"benchmark": asked.relevant_from}
    of = {"cutoffs": settings.cutoffs, "seed": seed, "levels": levels, "heads": settings.heads}
    work.step("metrics", "metrics", [out], of, lambda: metrics(
        runs={("benchmark", rankings.label(head)): run for head, run in runs.items()}, benchmarks={"benchmark": found},
        cutoffs=settings.cutoffs, seed=seed, out=out, levels=levels,
    ), [f"evaluate {head}" for head in settings.heads])  # fmt: skip
    return runs, out


def means(metrics: Path, measures: Sequence[str], model: str) -> dict[str, float]:
    """{"MRR@1": mean, …} of a model in a table of metrics, a measure after the other."""
    rows = [row for row in tables.read(metrics, "metrics").to_pylist() if row["model"] == model]
    found = {(row["measure"], row["cutoff"]): row["value"] for row in rows if row["query_id"] is None}
    cutoffs = sorted({cutoff for _, cutoff in found})
    return {f"{name}@{cutoff}": found[name, cutoff] for name in measures for cutoff in cutoffs}
