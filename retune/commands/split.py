"""Split files of rows by the number of tokens of a row's longest text, one output file a length bin.

<name>.jsonl becomes <name>_len-0-500.jsonl and so on, the last one <name>_len-7000-inf.jsonl; a bin
without rows has no file.  A row goes out byte for byte.  The length of a row is that of the longest of
its query, positives and negatives, special tokens included.  --log_name gets a line of JSON for each
input file.
"""

from __future__ import annotations

import itertools
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from retune import tables
from retune.commands import lengths, models, rows
from retune.commands.flags import Flag, Given, whole
from retune.commands.work import WORK_DIR, check_writable, input_files, work_folder
from retune.data import jsonl
from retune.data.files import COMPRESSED, FORMS
from retune.runtime import UserError, log

MADE = r"_len-\d+-(\d+|inf)\.jsonl"

FLAGS = [
    rows.input_flag(("input_path", "input_file"), kind="value"),
    Flag(("output_dir",), "Folder of the output files; folders within the input folder are kept.", required=True),
    Flag(("log_name",), "Name of the log, a file in --output_dir.", default=".split_log"),
    Flag(("overwrite",), "Replace the files of an earlier split.", kind="bool", default=False),
    *rows.ON_BAD_ROW,
    WORK_DIR,
    *lengths.FLAGS,
    Flag(
        ("model_name_or_path", "embedder_name_or_path"), "Whose tokenizer counts: a folder or a hub id.",
        "embedder.model", default="BAAI/bge-m3", group="lengths",
    ),
    Flag(("revision", "embedder_revision"), "Branch, tag or commit of a hub id.", group="lengths"),
    Flag(
        ("trust_remote_code", "embedder_trust_remote_code"), "Run code that comes with the tokenizer.", kind="bool",
        default=False, group="lengths",
    ),
    Flag(("num_proc",), "Threads of the tokenizer.", convert=whole(1), shown="one a processor", group="lengths"),
    models.CACHE_DIR,
]  # fmt: skip


def run(given: Given) -> None:
    """Split as the flags say.

    Raises:
        UserError: for a mistake in flags or rows, or outputs that are there already; nothing is written then.
    """
    start = time.localtime()
    folder = Path(given["output_dir"]).expanduser()
    if folder.exists() and not folder.is_dir():
        raise given.mistake("output_dir", f"{folder}: expected a folder, found a file")
    check_writable(folder, given, "output_dir")
    bases = _bases(given, folder)
    earlier = [path for base in bases.values() for path in _made(base)]
    if earlier and not given["overwrite"]:
        shown = earlier[0] if len(earlier) == 1 else f"{earlier[0]} and {len(earlier) - 1} more"
        raise UserError(f"{shown}: there already; `--overwrite` replaces what an earlier split made")
    settings = lengths.settings(given)
    tokenizer = {"model": given["model_name_or_path"]} | {n: given[n] for n in ("revision", "trust_remote_code")}
    models.use_cache(given)
    models.fetch(tokenizer["model"], tokenizer["revision"])
    with work_folder(given, folder / "split") as work:
        found = rows.into_tables(given, work, list(bases), [], folder / "split.rejected")
        made = lengths.measure(work, found, settings, tokenizer, given["num_proc"])
        _write(bases, found["queries"], made["bins"], earlier, folder / given["log_name"], start)


def _bases(given: Given, folder: Path) -> dict[Path, Path]:
    """{input file: its outputs' path up to `_len-…`}."""
    path = Path(given["input_path"]).expanduser()
    found = input_files(given, "input_path")
    if path.is_dir():  # an earlier split may lie within
        found = [one for one in found if not (folder in one.parents and re.search(MADE + "$", one.name))]
        if not found:
            raise given.mistake("input_path", f"{path}: nothing but the files of an earlier split")
    ending = "|".join(map(re.escape, FORMS))
    bases: dict[Path, Path] = {}
    for one in found:
        within = one.parent.relative_to(path) if path.is_dir() else Path()
        name = re.sub(rf"({ending})?({'|'.join(map(re.escape, COMPRESSED))})?$", "", one.name)
        bases[one] = folder / within / name
    twice = [base for base, count in Counter(bases.values()).items() if count > 1]
    if twice:
        same = " and ".join(str(one) for one, base in bases.items() if base == twice[0])
        raise given.mistake("input_path", f"{same} would be split into the same files; rename one of them")
    return bases


def _made(base: Path) -> list[Path]:
    """The files that an earlier split made of an input, whatever its bins."""
    if not base.parent.is_dir():
        return []
    return sorted(path for path in base.parent.iterdir() if re.fullmatch(re.escape(base.name) + MADE, path.name))


def _write(
    bases: Mapping[Path, Path], queries: Path, bins: Path, earlier: list[Path], log_file: Path, start: time.struct_time
) -> None:
    """Write all files and then move them to their places, those of an earlier split away first."""
    table = tables.read(bins, "bins", ["n_tokens", "length_bin"])
    tokens, names = table["n_tokens"].to_pylist(), table["length_bin"].to_pylist()
    places: dict[Path, Path] = {}
    found: dict[Path, list[int]] = {path: [] for path in bases}
    with tempfile.TemporaryDirectory(prefix=".split-", dir=log_file.parent) as scratch:
        every = rows.numbered(list(bases), queries)
        for path, own in itertools.groupby(every, key=lambda row: row[1]):
            with ExitStack() as stack:
                writers: dict[str, Callable[[bytes], object]] = {}
                for query, _, raw in own:
                    if (name := names[query]) not in writers:
                        target = bases[path].with_name(f"{bases[path].name}_{name}.jsonl")
                        places[target] = Path(scratch, f"{len(places)}.jsonl")
                        writers[name] = stack.enter_context(jsonl.writer(places[target]))
                    writers[name](jsonl.line(raw))
                    found[path].append(query)
        for old in earlier:
            old.unlink()
        for target, place in places.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            place.replace(target)
    with log_file.open("ab") as file:
        for path, queries_of in found.items():
            own = [tokens[query] for query in queries_of], [names[query] for query in queries_of]
            file.write(orjson.dumps(_statistics(path, start, *own)) + b"\n")
    log.info("%s rows in %s files, see %s", f"{len(tokens):,}", f"{len(places):,}", log_file)


def _statistics(path: Path, start: time.struct_time, tokens: list[int], names: list[str]) -> dict[str, Any]:
    """What the log says of an input file: its rows, their mean length, and how many each bin holds."""
    stamp, counts = "%Y-%m-%d %H:%M:%S", Counter(names)
    return {
        "file_name": path.name, "size": len(tokens), "avg_length": sum(tokens) / max(len(tokens), 1),
        "file_path": str(path), "start_time": time.strftime(stamp, start), "end_time": time.strftime(stamp),
        "split_info": {name: counts[name] for name in sorted(counts, key=lambda name: int(name.split("-")[1]))},
    }  # fmt: skip
