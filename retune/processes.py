"""Several processes of one module, each with a job of its own, while this one works too.

They are started as `python -m module job.json`: what multiprocessing starts would run the script
of this process again.  Knows nothing of torch or of what the jobs are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retune.runtime import UserError, report_and_exit_code, start_logging


class Processes:
    """Processes at work; `update` counts what they and this one have done, and notices their failures."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._lock = bar, threading.Lock()
        self._running: list[tuple[subprocess.Popen, Path, threading.Thread]] = []

    def start(self, command: Sequence[str], job: Path, environment: Mapping[str, str]) -> None:
        process = subprocess.Popen([*command, str(job)], stdout=subprocess.PIPE, env=environment, text=True)
        listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
        listener.start()
        self._running.append((process, job, listener))

    def _listen(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            if line.strip().isdigit():
                self._count(int(line))
            else:
                print(line, end="", file=sys.stderr)

    def _count(self, done: int) -> None:
        with self._lock:
            self._bar.update(done)

    def update(self, done: int) -> None:
        """Count what this process has done.

        Raises:
            UserError: if one of the others has failed.
        """
        self._count(done)
        self.check()

    def check(self) -> bool:
        """Whether some are still running; a UserError says what one has failed of."""
        codes = [process.poll() for process, _, _ in self._running]
        for code, (_, job, _) in zip(codes, self._running, strict=True):
            if code:
                error = error_of(job)
                said = f"a process of {len(codes) + 1} failed (code {code}); see above"
                raise UserError(error.read_text() if error.exists() else said)
        return None in codes

    def wait(self) -> None:
        """Until all have ended well; else a UserError."""
        while self.check():
            time.sleep(0.1)
        for _, _, listener in self._running:
            listener.join()

    def stop(self) -> None:
        """End those that still run."""
        for process, _, _ in self._running:
            process.terminate()
        for process, _, _ in self._running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def working(
    module: str, jobs: Sequence[Mapping[str, Any]], folder: Path, bar: Any, threads: int
) -> Iterator[Processes]:
    """Run `python -m module` on each job (JSON-able) beside the block; when it ends, they have ended well.

    Args:
        folder: for files of the jobs.
        bar: a progress bar, for the work of all.
        threads: of each process.

    Raises:
        UserError: what one of them raised, or that one failed; the others are stopped.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    environment = os.environ | {name: str(threads) for name in names} | {"PYTHONPATH": path}
    processes = Processes(bar)
    try:
        for number, job in enumerate(jobs):
            file = folder / f"job-{number}.json"
            file.write_text(json.dumps(job))
            processes.start([sys.executable, "-m", module], file, environment)
        yield processes
        processes.wait()
    finally:
        processes.stop()


class Told:
    """A progress bar whose states go to the process that started this one; it ends this one if that is gone."""

    def update(self, done: int) -> None:
        print(done, flush=True)


def error_of(job: Path) -> Path:
    """Where a process leaves a user's mistake that it met in the job in a file."""
    return job.with_suffix(".error")


def run_job(main: Callable[[dict[str, Any]], None], file: Path, aloud: bool = False) -> int:
    """`main` on the job in `file`; a user's mistake is handed to the process that started this one.

    Args:
        aloud: whether it is printed as well, for the case that the other process, on another node, does not see it yet.

    Returns:
        The exit code.
    """
    start_logging()
    try:
        main(json.loads(file.read_text()))
    except BaseException as error:
        if isinstance(error, UserError):
            error_of(file).write_text(str(error))
            if not aloud:
                return 1
        return report_and_exit_code(error)
    return 0
