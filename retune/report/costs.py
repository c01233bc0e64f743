"""Section on what the run cost: wall time, memory and throughput of its jobs, from Snakemake's benchmark files.

A job's throughput is what its table says it did over its whole time, loading of models included; that of training
alone is what it measured itself, of its steps.
"""

from __future__ import annotations

import csv
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from retune import tables
from retune.data import funnel
from retune.report.page import Html, Section, count, join, paragraph, plural, table, tag
from retune.report.spread import scan

ORDER = (
    "demo", "ingest", "leakage", "split", "embed", "search", "mine", "fit", "scores", "score", "train", "weigh",
    "merge", "evaluate", "metrics", "card",
)  # fmt: skip
UNITS = {"ingest": "rows", "split": "tokens", "embed": "texts", "mine": "queries", "scores": "pairs",
         "evaluate": "queries"}  # fmt: skip
"""What a job's table counts, by rule; a rule that is not here has no throughput."""
TRAINED = ("train", "fit")
PASSAGES = "embed.base.texts-"  # jobs that embed the passages whose tokens `split` counts, by the same tokenizer


class Job(NamedTuple):
    """A job's wall time in seconds and its peak memory in MiB, if it was measured; its name begins with the rule's."""

    name: str
    seconds: float
    memory: float | None

    @property
    def rule(self) -> str:
        return self.name.split(".")[0]


def jobs(folders: Sequence[Path]) -> list[Job]:
    """Jobs of all files; one of a later folder replaces the one of the same name in an earlier."""
    files = {path.name: path for folder in folders for path in sorted(Path(folder).glob("*.tsv"))}
    return [job for name in sorted(files) if (job := _job(files[name])) is not None]


def _job(path: Path) -> Job | None:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            row = next(csv.DictReader(file, delimiter="\t"))
        # Snakemake looks when a job starts, where nothing is loaded yet, and half a second later; the mean load is 0
        # until it has seen the working process twice, and the memory that of a process which is still growing.
        memory = None if _number(row.get("mean_load")) == 0 else _number(row.get("max_rss"))
        return Job(path.name.removesuffix(".tsv"), float(row["s"]), memory)
    except (OSError, StopIteration, KeyError, ValueError):
        return None  # a file that is just being written, or of another kind


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:  # "NA" or "-": the job was over before it was measured
        return None


def costs(
    folders: Sequence[Path], worked: Mapping[str, Path] | None = None, histories: Mapping[str, Path] | None = None,
    without: Container[str] = (),
) -> Section | None:  # fmt: skip
    """A row a rule, with all of its jobs, and their sum; None where nothing was measured.

    Args:
        folders: with the benchmark files; those of a later one count.
        worked: the table that a job's throughput is counted by; those that are not there are passed over.
        histories: of the rules `train` and `fit`.
        without: rules whose jobs in these folders are another run's.
    """
    found = [job for job in jobs(folders) if job.rule != "report" and job.rule not in without]
    if not found:
        return None
    places = {rule: place for place, rule in enumerate(ORDER)}
    by_rule: dict[str, list[Job]] = {}
    for job in sorted(found, key=lambda job: (places.get(job.rule, len(ORDER)), job.rule)):
        by_rule.setdefault(job.rule, []).append(job)
    longest = max(sum(job.seconds for job in mine) for mine in by_rule.values())
    rows = []
    for rule, mine in by_rule.items():
        seconds = sum(job.seconds for job in mine)
        width = 4.5 * seconds / max(longest, 1e-9)
        bar = Html(f'<span class="bar" style="width:{width:.2f}rem"></span>' if width > 0.1 else "")
        rows.append([_stage(rule, mine), join([duration(seconds), bar]), _memory(mine),
                     _throughput(rule, mine, worked or {}, histories or {})])  # fmt: skip
    total = duration(sum(job.seconds for job in found))
    rows.append([_stage("all", found), tag("b", total), tag("b", _memory(found)), ""])
    said = f"{plural(len(found), 'job')}, {total} of work in all"
    said += "; jobs that ran side by side took less by the clock." if len(found) > 1 else "."
    note = (
        "Throughput: over the whole of a job, the loading of its model included, and with the vectors that it found "
        "in the cache; tokens of embed: of the training passages; of train and fit: over their steps. Memory: the "
        "peak of the job that took most, as Snakemake sampled it; – where all jobs were over too soon for that."
    )
    shown = table(["stage", "wall time", "memory", "throughput"], rows, [2, 3])
    return Section("run", "What was run", join([paragraph(said), tag("div", shown), paragraph(note, css="note")]))


def _stage(name: str, mine: Sequence[Job]) -> Html:
    return join([name, tag("small", plural(len(mine), "job"))] if len(mine) > 1 else [name])


def _throughput(rule: str, mine: Sequence[Job], worked: Mapping[str, Path], histories: Mapping[str, Path]) -> Html:
    """`1,234 tokens/s`, a line a unit; empty where it is not known."""
    if rule in TRAINED:
        rate, unit = (_trained(histories[rule]) if rule in histories else None), "tokens"
    elif rule in UNITS:
        # only jobs that are both timed and counted
        both = [(job.seconds, worked[job.name]) for job in mine if job.name in worked and worked[job.name].exists()]
        seconds = sum(seconds for seconds, _ in both)
        rate, unit = (sum(_work(rule, path) for _, path in both) / seconds if seconds else None), UNITS[rule]
    else:
        return Html("")
    rates = {unit: rate} if rate is not None else {}
    if rule == "embed" and "split" in worked and worked["split"].exists():
        rates |= _tokens(mine, worked)
    lines = [f"{count(rate) if rate >= 10 else f'{rate:.1f}'} {unit}/s" for unit, rate in rates.items()]
    return join([*lines[:1], *(tag("small", line) for line in lines[1:])])


def _work(rule: str, path: Path) -> float:
    if rule == "split":
        return scan(path).select(pl.col("n_tokens").cast(pl.Int64).sum()).collect().item()
    if rule == "mine":
        wanted = (pl.col("measure") == funnel.QUERIES) & (pl.col("name") == "mined_for")
        return scan(path).filter(wanted).select(pl.col("value").sum()).collect().item()
    return tables.n_rows(path)


def _tokens(mine: Sequence[Job], worked: Mapping[str, Path]) -> dict[str, float]:
    """Tokens a second of the jobs that embed the training passages, whose lengths are known."""
    tokens, seconds, lengths = 0, 0.0, scan(worked["split"])
    for job in mine:
        path = worked.get(job.name)
        if job.name.startswith(PASSAGES) and path and path.exists() and (n := tables.n_rows(path)):
            first = scan(path).select(pl.col("id").min()).collect().item()  # rows of a shard follow one another
            cut = pl.col("n_tokens").clip(upper_bound=int(tables.metadata(path)["max_length"]))
            tokens += lengths.slice(first, n).select(cut.cast(pl.Int64).sum()).collect().item()
            seconds += job.seconds
    return {"tokens": tokens / seconds} if seconds else {}


def _trained(path: Path) -> float | None:
    """Tokens a second of a `history`: its rows are of as many steps each, so their harmonic mean."""
    if "tokens_per_second" not in scan(path).collect_schema():  # of an earlier version
        return None
    rates = scan(path).select(pl.col("tokens_per_second").drop_nulls()).collect()["tokens_per_second"]
    rates = rates.filter(rates > 0)
    return len(rates) / (1 / rates).sum() if len(rates) else None


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _memory(mine: Sequence[Job]) -> str:
    mebibytes = max((job.memory for job in mine if job.memory is not None), default=None)
    if mebibytes is None:
        return "–"
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"
