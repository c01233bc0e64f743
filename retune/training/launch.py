"""Several processes on this machine, by torchrun.  Imports no torch: the parent only waits."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retune.runtime import UserError, log, report_and_exit_code, start_logging

ERROR = "error.txt"


def under_torchrun() -> bool:
    """Whether this process is one of torchrun's."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1


def launch(module: str, job: dict[str, Any], processes: int, state: Path) -> None:
    """Run `python -m module job.json` in so many processes, which share the threads of this one.

    Raises:
        UserError: what one of them raised, or that one of them failed.
    """
    state.mkdir(parents=True, exist_ok=True)
    (state / ERROR).unlink(missing_ok=True)
    file = state / "job.json"
    file.write_text(json.dumps(job))
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // processes))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    log.info("starting %d processes", processes)
    command += ["-m", module, str(file)]
    code = _wait_for(subprocess.Popen(command, env=environment, preexec_fn=_end_with_the_parent))
    if (state / ERROR).exists():
        raise UserError((state / ERROR).read_text())
    if code:
        raise UserError(f"train.nproc_per_node: one of {processes} processes failed (code {code}); see above")


LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _end_with_the_parent() -> None:
    """Have this process told to stop when its parent is killed: going on, it would share `state` with the next run."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_for(process: subprocess.Popen) -> int:
    """The exit code of `process`, which is stopped, with its own processes, where this one is."""

    def stop(number: int, _) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def run_job(main: Callable[[dict[str, Any]], None], file: Path) -> int:
    """One of several processes: `main` on the job in `file`; a user's mistake is handed to the parent.

    Returns:
        The exit code.
    """
    start_logging()
    try:
        main(json.loads(file.read_text()))
    except BaseException as error:
        if isinstance(error, UserError):
            file.with_name(ERROR).write_text(str(error))
        return report_and_exit_code(error)
    return 0
