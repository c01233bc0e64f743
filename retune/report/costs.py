"""Section on what the run cost: wall time and memory of its jobs, from Snakemake's benchmark files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from retune.report.page import Html, Section, join, paragraph, plural, table, tag

ORDER = (
    "demo", "ingest", "split", "embed", "search", "mine", "fit", "scores", "score", "train", "merge", "evaluate",
    "metrics",
)  # fmt: skip


class Job(NamedTuple):
    """A job's wall time in seconds and its peak memory in MiB, if it was measured."""

    rule: str
    seconds: float
    memory: float | None


def jobs(folders: Sequence[Path]) -> list[Job]:
    """Jobs of all files; one of a later folder replaces the one of the same name in an earlier."""
    files = {path.name: path for folder in folders for path in sorted(Path(folder).glob("*.tsv"))}
    return [job for name in sorted(files) if (job := _job(files[name])) is not None]


def _job(path: Path) -> Job | None:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            row = next(csv.DictReader(file, delimiter="\t"))
        return Job(path.name.split(".")[0], float(row["s"]), _number(row.get("max_rss")))
    except (OSError, StopIteration, KeyError, ValueError):
        return None  # a file that is just being written, or of another kind


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:  # "NA" or "-": the job was over before it was measured
        return None


def costs(folders: Sequence[Path]) -> Section | None:
    """A row a rule, with all of its jobs; None where nothing was measured."""
    found = [job for job in jobs(folders) if job.rule != "report"]
    if not found:
        return None
    places = {rule: place for place, rule in enumerate(ORDER)}
    rules = sorted({job.rule for job in found}, key=lambda rule: (places.get(rule, len(ORDER)), rule))
    total = sum(job.seconds for job in found)
    longest = max(sum(job.seconds for job in found if job.rule == rule) for rule in rules)
    rows = []
    for rule in rules:
        mine = [job for job in found if job.rule == rule]
        seconds = sum(job.seconds for job in mine)
        memory = [job.memory for job in mine if job.memory is not None]
        bar = Html(f'<span class="bar" style="width:{8 * seconds / max(longest, 1e-9):.2f}rem"></span>')
        rows.append([rule, len(mine), duration(seconds), bar, _size(max(memory, default=None))])
    said = f"{plural(len(found), 'job')}, {duration(total)} of work in all"
    said += "; jobs that ran side by side took less by the clock." if len(found) > 1 else "."
    shown = table(["stage", "jobs", "wall time", "", "peak memory"], rows, [1, 2, 4])
    return Section("run", "What was run", join([paragraph(said), tag("div", shown)]))


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _size(mebibytes: float | None) -> str:
    if mebibytes is None:
        return "–"
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"
