"""Several processes on this machine, by torchrun.  Imports no torch: the parent only waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from retune.runtime import UserError, log


def under_torchrun() -> bool:
    """Whether this process is one of torchrun's."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1


def launch(module: str, job: dict[str, Any], processes: int, state: Path) -> None:
    """Run `python -m module job.json` in so many processes, which share the threads of this one.

    Raises:
        UserError: if one of them fails; what it said stands above.
    """
    state.mkdir(parents=True, exist_ok=True)
    file = state / "job.json"
    file.write_text(json.dumps(job))
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // processes))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    log.info("starting %d processes", processes)
    code = subprocess.run([*command, "-m", module, str(file)], env=environment).returncode
    if code:
        raise UserError(f"train.nproc_per_node: one of {processes} processes failed (code {code}); see above")
