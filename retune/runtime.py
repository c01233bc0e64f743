"""What every job needs: errors for users, logs, progress, atomic writes.

Knows nothing of Snakemake, torch or tables.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("retune")
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class UserError(Exception):
    """A mistake in the user's input: shown as its message alone, without a traceback."""


def report_and_exit_code(error: BaseException) -> int:
    """Print `error` as a user should see it; returns the exit code."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        print(f"error: the disk is full{where}; free space and run again", file=sys.stderr, flush=True)
        return 1
    if isinstance(error, OSError) and error.errno in DENIED and error.filename:
        print(f"error: {error.filename}: {error.strerror}; may this user read and write there?", file=sys.stderr)
        return 1
    traceback.print_exception(error)
    return 1


def start_logging() -> None:
    """Send `retune`'s log to standard error, with times."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    logging.getLogger("retune").setLevel(logging.INFO)


def start_job(log_file: str, threads: int) -> None:
    """Make this process a job: everything it and its children print goes to `log_file`.

    Call it before torch is imported: the number of `threads` is read when torch starts.
    """
    Path(log_file).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log_file, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    start_logging()
    sys.excepthook = lambda kind, error, trace: report_and_exit_code(error)


def use_hub(cache_dir: str | None, token: str | None) -> None:
    """Make a folder the hub's cache, and a token its own, for this process and its children; None changes nothing."""
    if cache_dir:
        os.environ["HF_HUB_CACHE"] = cache_dir
        if "huggingface_hub.constants" in sys.modules:  # which has read the environment already
            sys.modules["huggingface_hub.constants"].HF_HUB_CACHE = cache_dir
    if token:
        os.environ["HF_TOKEN"] = token


class _Lines:
    """Standard error for a progress bar in a log: each state is a line, instead of painted over the last."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(total: int | None, what: str, unit: str) -> tqdm:
    """A progress bar on a terminal; in a log file a line every ten seconds."""
    options = {"total": total, "desc": what, "unit": f" {unit}", "unit_scale": True}
    if sys.stderr.isatty():
        return tqdm(**options, mininterval=0.2, dynamic_ncols=True)
    return tqdm(**options, mininterval=10, ascii=True, ncols=100, file=_Lines(), delay=1)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Log how long the block took."""
    start = time.perf_counter()
    yield
    log.info("%s: %.1f s", what, time.perf_counter() - start)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; a UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); expected a folder that can be written") from None


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed otherwise.

    Works for files and folders; a reader sees the old one, the whole new one, or nothing.
    """
    path = Path(path)
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        yield part
        if part.is_dir() and path.is_dir():
            _replace_folder(part, path)
        else:
            os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def _replace_folder(part: Path, path: Path) -> None:
    """Put the folder `part` where the folder `path` is, which goes only then: a half-removed model is never there."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    os.replace(path, old)
    try:
        os.replace(part, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old)
