"""Flags of a benchmark, in the incumbents' spelling and the config's, and what they stand for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from retune.commands.flags import Given, from_section
from retune.config import BenchmarkConfig
from retune.data.files import expand
from retune.runtime import log
from retune.sections.evaluation import HUB

MSMARCO = {"corpus": "namespace-Pt/msmarco-corpus", "queries": "namespace-Pt/msmarco"}
SECTION = "evaluate.benchmarks.benchmark"  # as messages of the stage call it
DEV = "dev"
N_PASSAGES, N_QUERIES = 8_841_823, 6_980  # of MS MARCO, and of its queries for development

FLAGS = from_section(
    SECTION,
    BenchmarkConfig,
    "benchmark",
    {
        "format": {"shown": "msmarco; intel with --index_file_jsonl_path, beir with --path or --qrels"},
        "queries": {"names": ("query_data", "query_file_jsonl_path", "queries"), "shown": MSMARCO["queries"]},
        "corpus": {"names": ("corpus_data", "index_file_jsonl_path", "corpus"), "shown": MSMARCO["corpus"]},
        "split": {"shown": f"{DEV} with msmarco, else test"},
        "n_queries": {"shown": f"{N_QUERIES} with {MSMARCO['queries']} itself and its split {DEV}"},
        "n_passages": {"shown": f"{N_PASSAGES} with {MSMARCO['corpus']} itself"},
    },
    leave=("guard",),
)


def asked(given: Given) -> BenchmarkConfig:
    """The benchmark that the flags name."""
    intel = any(given.shown(n).endswith("_file_jsonl_path") for n in ("queries", "corpus") if given.typed(n))
    judged = given["path"] or given["qrels"]
    form = given["format"] or ("intel" if intel else "beir" if judged else "msmarco")
    places = {role: given[role] for role in ("queries", "corpus")}
    if form == "msmarco":
        if not any(places.values()):
            places = dict(MSMARCO)
        elif places == {"corpus": MSMARCO["queries"], "queries": MSMARCO["corpus"]}:
            log.info("eval_msmarco's defaults name queries and corpus the wrong way round; taken as they are meant")
            places = dict(MSMARCO)
    for role in ("queries", "corpus"):
        if form in ("msmarco", "intel") and not places[role]:
            raise given.mistake(role, "required, but not given: a file, or a data set on the hub")
    split = given["split"] if given.typed("split") else DEV if form == "msmarco" else "test"
    fixed: dict[str, Any] = {role: _place(given, role, place) for role, place in places.items() if place}
    for role in ("path", "qrels"):
        if given[role]:
            fixed[role] = _place(given, role, given[role])
    if form == "msmarco" and places == MSMARCO:
        expected = {"n_passages": N_PASSAGES} | ({"n_queries": N_QUERIES} if split == DEV else {})
        fixed |= {name: number for name, number in expected.items() if not given.typed(name)}
    return given.section(SECTION, BenchmarkConfig, format=form, split=split, **fixed)


def _place(given: Given, role: str, value: str) -> str:
    """A path that is there, or `hub:…` for a data set's id, which needs no prefix here."""
    path = Path(value).expanduser()
    if value.startswith(HUB):
        return value
    if path.is_dir():
        return str(path)
    if (
        not path.exists()
        and re.fullmatch(r"[\w.-]+/[\w.-]+(@[^:]+)?(:.+)?", value)
        and not re.search(r"\.(jsonl|json|parquet|tsv|txt|gz|zst)$", value)
    ):
        return HUB + value
    found = expand([str(path)], given.shown(role))
    if len(found) > 1:
        raise given.mistake(role, f"{value}: expected one file, found {len(found)}")
    return str(found[0])
