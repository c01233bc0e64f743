"""GPUs of this machine, each lent to one job at a time.

A job holds a lock on a file for each of its GPUs and sees these GPUs alone, through
CUDA_VISIBLE_DEVICES.  The locks are the kernel's (flock), so they end with the job, however it ends.
A job of SLURM keeps what the scheduler gave it; where Snakemake itself runs in one and starts jobs there, it lends
them the GPUs of that allocation.  Imports no torch: what a job may see must be
settled before.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from retune.runtime import log

VISIBLE = "CUDA_VISIBLE_DEVICES"
SCHEDULED = "SLURM_JOB_ID"
LENDS = "RETUNE_LENDS_GPUS"  # set by a Snakemake that starts its jobs on its own machine
POLL = 0.5  # seconds between two looks at GPUs that are all taken

_held: list[int] = []  # descriptors of this process' locks: open as long as it lives


def installed() -> dict[str, str]:
    """{index: id} of the GPUs of this machine, or of the parts that they are cut into (MIG); none without a driver."""
    if not Path("/dev/nvidiactl").exists():
        return {}
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parsed(said)


def parsed(said: str) -> dict[str, str]:
    """{index: id} from the lines of `nvidia-smi -L`; a GPU that is cut into parts gives way to them."""
    found: list[str] = []
    for line in said.splitlines():
        if match := re.search(r"UUID: ((?:GPU|MIG)-[^)]+)\)", line):
            if match[1].startswith("MIG-") and found and found[-1].startswith("GPU-"):
                found.pop()
            found.append(match[1])
    return {str(index): name for index, name in enumerate(found)}


def visible() -> list[str]:
    """Ids of the GPUs that this process may use, in order."""
    found = installed()
    if (allowed := os.environ.get(VISIBLE)) is None:
        return list(found.values())
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    return [found.get(name, name) for name in names] if found else []


def folder() -> Path:
    """Where the locks of a user's jobs on this machine lie."""
    path = Path(tempfile.gettempdir()) / f"retune-gpus-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def reserve(count: int) -> list[str]:
    """Wait until `count` GPUs are free, and let this process see them alone until it ends.

    Args:
        count: GPUs; where the machine has fewer, all of them, and where it has none, none.  0 hides them all.

    Returns:
        Their ids; what was visible before stays where a scheduler has chosen, or there is no GPU.
    """
    scheduled = SCHEDULED in os.environ and LENDS not in os.environ
    if scheduled or not (known := visible()):
        return []
    names = take(known, min(count, len(known)), folder())
    os.environ[VISIBLE] = ",".join(names)
    if names:
        log.info("GPUs of this job: %s", ", ".join(names))
    return names


def take(known: Sequence[str], count: int, locks: Path) -> list[str]:
    """Lock `count` of the devices `known`, all or none at a time, waiting where too few are free; returns their ids."""
    waiting = False
    while True:
        found = _free(known, count, locks)
        if len(found) == count:
            _held.extend(found.values())
            return list(found)
        for lock in found.values():
            os.close(lock)
        if not waiting:
            log.info("waiting for %d of the GPUs %s", count, ", ".join(known))
            waiting = True
        time.sleep(POLL * random.uniform(0.5, 1.5))  # two that wait for several do not get in step


def _free(known: Sequence[str], count: int, locks: Path) -> dict[str, int]:
    """{id: descriptor of its lock} of the first `count` devices that nobody holds."""
    found: dict[str, int] = {}
    for name in known:
        if len(found) == count:
            break
        lock = os.open(locks / re.sub(r"[^\w.-]", "_", name), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found[name] = lock
        except BlockingIOError:
            os.close(lock)
    return found
