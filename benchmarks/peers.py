"""What the comparisons with other tools share: real texts, contenders as processes, one table.

Not a benchmark itself.  Each contender is a command, run in an environment of its own; its wall
time and peak memory are those of the process and its children.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from retune.config import DemoConfig
from retune.stages.demo import demo


@dataclass(frozen=True)
class Result:
    """What a contender cost and said; `error` holds its last lines where it failed."""

    seconds: float
    megabytes: float
    error: str = ""
    said: str = ""
    cpu: float = 0.0
    """Seconds of CPU, of the process and its children."""


def docstring_rows(folder: Path, rows: int) -> list[dict]:
    """At least `rows` / 2 and at most `rows` rows {"query", "pos"} of docstrings of installed packages."""
    demo(DemoConfig(train_rows=rows, test_queries=10, test_passages=10), folder / "raw", 42)
    return [json.loads(line) for line in (folder / "raw/train.jsonl").read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: Sequence[Mapping]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def timed(command: Sequence[str], threads: int) -> Result:
    """Run a contender to its end."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        said.seek(0)
        text = said.read()
        error = "" if status == 0 else " / ".join(text.strip().splitlines()[-3:])[-400:]
    return Result(seconds, usage.ru_maxrss / 1024, error, text, usage.ru_utime + usage.ru_stime)


def compare(contenders: Mapping[str, Sequence[str]], threads: int, repeat: int = 1) -> dict[str, Result]:
    """The best time and the highest memory of each contender over `repeat` rounds, all of them in each round."""
    found: dict[str, list[Result]] = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, command in contenders.items():
            found[name].append(timed(command, threads))
            last = found[name][-1]
            print(f"{name}: {last.error or f'{last.seconds:.1f} s'}", file=sys.stderr, flush=True)
    return {
        name: Result(min(r.seconds for r in results), max(r.megabytes for r in results), results[-1].error)
        for name, results in found.items()
    }


def table(results: Mapping[str, Result], own: str, what: str, amount: int) -> str:
    """Markdown: wall time, `amount` of `what` a second, peak memory, and each contender's time as multiples of ours."""
    lines = [f"| | wall | {what}/s | peak memory | times {own} |", "|---|---|---|---|---|"]
    for name, result in results.items():
        if result.error:
            lines.append(f"| {name} | failed: {result.error} | | | |")
            continue
        ratio = result.seconds / results[own].seconds
        lines.append(
            f"| {name} | {result.seconds:.1f} s | {amount / result.seconds:.0f} | {result.megabytes / 1000:.2f} GB | "
            f"{ratio:.2f}× |"
        )
    return "\n".join(lines)
