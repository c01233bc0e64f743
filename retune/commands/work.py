"""The folder in which a command's tables lie, and which of its steps are done.

Without `--work_dir` it is a hidden folder beside the output, gone at the end.  With it, each step
leaves a key of all that it was made from (settings, input files, the library's code), and a step
whose key still holds is not done again: an interrupted run goes on, and another `--negative_number`
mines again but does not embed again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retune.commands.flags import Flag, Given
from retune.data.files import expand
from retune.fingerprint import fingerprint
from retune.runtime import atomic, log, make_folder

KEYS = "steps.json"
WAIT, PATIENCE = 0.2, 600.0  # seconds between looks at what the process that leads has done, and between warnings
WORK_DIR = Flag(
    ("work_dir",), "Folder that keeps the tables in between: a run that was interrupted goes on there.",
    shown="a folder beside the output, removed at the end",
)  # fmt: skip


class Work:
    """Tables of a command in `folder`; `kept` is whether they outlive it.

    Where several processes run the command, one `leads`: it does the steps, and the others wait for them.
    """

    def __init__(self, folder: Path, kept: bool, leads: bool = True) -> None:
        self.folder, self.kept, self.leads = folder, kept, leads
        self._keys: dict[str, str] = {}
        if kept:
            make_folder(folder)
            self._read()

    def _read(self) -> None:
        if (self.folder / KEYS).is_file():
            self._keys = json.loads((self.folder / KEYS).read_text())

    def path(self, name: str) -> Path:
        found = self.folder / name
        found.parent.mkdir(parents=True, exist_ok=True)
        return found

    def step(
        self, name: str, stage: str, made: Sequence[Path], of: Mapping[str, Any], do: Callable[[], object],
        after: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Do a step, unless it was done from the same things before.

        Args:
            stage: the stage's name, whose code counts. made: the step's files. of: its settings, JSON-able.
            after: names of the steps whose results it reads.
        """
        if not self.kept:
            do()
        elif not self.leads:
            for look in itertools.count(1):
                if self.done(name, stage, made, of, after):
                    break
                if look * WAIT % PATIENCE < WAIT:
                    log.error("%s: still waiting for the process of rank 0; do both see %s?", name, self.folder)
                time.sleep(WAIT)
                self._read()
        elif self.done(name, stage, made, of, after):
            log.info("%s: done before, in %s", name, self.folder)
        else:
            self._keys.pop(name, None)
            do()
            self.record(name, stage, of, after)

    def done(
        self, name: str, stage: str, made: Sequence[Path], of: Mapping[str, Any], after: Sequence[str] = ()
    ) -> bool:
        """Whether a step was done from the same things; its arguments are those of `step`."""
        return self._keys.get(name) == _key(name, stage, of, map(self.key, after)) and all(map(Path.exists, made))

    def record(self, name: str, stage: str, of: Mapping[str, Any], after: Sequence[str] = ()) -> None:
        """Note that a step is done."""
        self._keys[name] = _key(name, stage, of, map(self.key, after))
        with atomic(self.folder / KEYS) as part:
            part.write_text(json.dumps(self._keys, indent=1))

    def key(self, name: str) -> str:
        """What stands for all that a step, which is done, was made from."""
        return self._keys[name]


def _key(name: str, stage: str, of: Mapping[str, Any], after: Iterable[str]) -> str:
    code = fingerprint(importlib.util.find_spec(f"retune.stages.{stage}").origin)
    parts = [name, code, json.dumps(of, sort_keys=True, default=str), *after]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@contextmanager
def work_folder(given: Given, beside: Path) -> Iterator[Work]:
    """`--work_dir`, or a folder for the length of the block, on the disk of `beside`."""
    if given["work_dir"]:
        yield Work(Path(given["work_dir"]).expanduser(), True)
        return
    make_folder(beside.parent)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.work-", dir=beside.parent) as folder:
        yield Work(Path(folder), False)


def input_files(given: Given, name: str, output: Path | None = None) -> list[Path]:
    """The files behind a flag's paths, folders and globs, without what `output` holds of an earlier run."""
    value = given[name]
    patterns = [value] if isinstance(value, str) else value
    found = expand([str(Path(one).expanduser()) for one in patterns], given.shown(name))
    if output is None or len(found) < 2:  # a file that is named may be its own output
        return found
    left = [path for path in found if path.resolve() != output.resolve()]
    if len(left) < len(found):
        log.info("%s: the output of an earlier run is not read", output)
    return left


def output_file(given: Given, name: str, suffixes: Sequence[str] = ()) -> Path:
    """The path of a flag, checked to be one that can be written before anything else is done."""
    path = Path(given[name]).expanduser()
    if path.is_dir():
        raise given.mistake(name, f"{path}: expected a file, found a folder")
    if suffixes and not path.name.endswith(tuple(suffixes)):
        raise given.mistake(name, f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    check_writable(path.parent, given, name)
    return path


def output_rows(given: Given, name: str = "output_file") -> Path:
    """The path of a flag for rows, which are written as JSONL, checked likewise."""
    path = output_file(given, name)
    if path.name.endswith(".parquet"):
        raise given.mistake(name, f"{path}: rows are written as JSONL (.jsonl, .jsonl.gz, .jsonl.zst)")
    return path


def check_writable(folder: Path, given: Given, name: str) -> None:
    """Raise a UserError where `folder` can neither be written nor made."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise given.mistake(name, f"{there}: cannot be written to")


def identity(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What tells files from what they were before: path, size, time of the last change."""
    stats = [(path, path.stat()) for path in files]
    return [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def model_identity(settings: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """`identity` of a checkpoint's files, and of what else is read where that lies in a folder."""
    from retune.model.checkpoint import resolve

    folders = [resolve(settings["model"], settings.get("revision"), settings.get("sha256"), adapters_alone=True)]
    others = (settings.get(key) for key in ("peft_path", "config_name", "tokenizer_name"))
    folders += [Path(other).expanduser() for other in others if other]
    return identity([path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()])
