"""Several processes by torchrun, on this machine or on the nodes of a SLURM job.

Imports no torch: the parent only waits.  Nodes meet at the first, which is the one that the job's script runs on.
Where one of them fails or dies, srun ends the others, so that the job fails as a whole; run again, it goes on from its
last checkpoint.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from retune.processes import error_of
from retune.runtime import UserError, log


def under_torchrun() -> bool:
    """Whether this process is one of torchrun's."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1


def launch(module: str, job: dict[str, Any], processes: int, state: Path, nodes: int = 1) -> None:
    """Run `python -m module job.json` in so many processes on each node, which share the threads of this one.

    Args:
        state: a folder that all nodes see.

    Raises:
        UserError: what one of them raised, that one of them failed, or that this is no job of several nodes.
    """
    given = int(os.environ.get("OMP_NUM_THREADS") or os.environ.get("SLURM_CPUS_PER_TASK") or 0)
    threads = given or os.cpu_count() or 1
    torchrun = ["-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={processes}"]
    command = [*(_on_nodes(nodes, given) if nodes > 1 else []), sys.executable, *torchrun]
    state.mkdir(parents=True, exist_ok=True)
    file = state / "job.json"
    error_of(file).unlink(missing_ok=True)
    file.write_text(json.dumps(job))
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // processes))}
    log.info("starting %d processes%s", processes, f" on each of {nodes} nodes" if nodes > 1 else "")
    command += [*([] if nodes > 1 else ["--standalone"]), "-m", module, str(file)]
    code = _wait_for(subprocess.Popen(command, env=environment, preexec_fn=_end_with_the_parent))
    if error_of(file).exists():
        raise UserError(error_of(file).read_text())
    if code:
        where = f"one of {processes} processes" + (f" on {nodes} nodes" if nodes > 1 else "")
        raise UserError(f"train.{'nnodes' if nodes > 1 else 'nproc_per_node'}: {where} failed (code {code}); see above")


# What a node's torchrun must know of the others, from what srun tells a task; $0 is the port.
NODE = (
    'PET_NODE_RANK="$SLURM_PROCID" PET_MASTER_ADDR="$SLURM_LAUNCH_NODE_IPADDR" PET_MASTER_PORT="$0" '
    'PET_MAX_RESTARTS=0 exec "$@"'
)


def _on_nodes(nodes: int, cpus: int) -> list[str]:
    """What starts a command once on each node of this job, with its place among them.

    Args:
        cpus: of each node; 0 leaves them to SLURM.

    Raises:
        UserError: outside SLURM, which is the one scheduler that is known here.
    """
    job, srun = os.environ.get("SLURM_JOB_ID"), shutil.which("srun")
    if not job or not srun:
        raise UserError(
            f"train.nnodes: {nodes} nodes need a job of SLURM (snakemake --profile profiles/slurm); elsewhere set it "
            "to 1, or start `torchrun --nnodes ... -m retune train` on each node by hand"
        )
    port = 10000 + int(job) % 20000  # below those that a system hands out by itself; jobs on one node differ
    spread = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    if cpus:
        spread.append(f"--cpus-per-task={cpus}")  # srun does not take them from the job: a task would be bound to one
    return [srun, *spread, "sh", "-c", NODE, str(port)]


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
