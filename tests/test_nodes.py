"""Training on several nodes: each starts torchrun, they meet at the first, and learn what one machine would.

The nodes are a stand-in for srun that starts a task for each on this machine; tests/cluster has a real SLURM.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from test_train import history, job
from tiny import tiny_bert
from toy import toy_tables

from retune.runtime import UserError
from retune.stages.train import train
from retune.training.launch import launch

SRUN = """#!/bin/sh
# Starts the command once for each node; where one fails, the others are ended.
echo "$@" > "$ASKED"
while case $1 in --nodes=*) nodes=${1#--nodes=} ;; --*) ;; *) false ;; esac; do shift; done
trap 'kill $tasks 2>/dev/null; exit 1' USR1
node=0
while [ $node -lt $nodes ]; do
  (SLURM_PROCID=$node SLURM_LAUNCH_NODE_IPADDR=127.0.0.1 "$@" || { kill -USR1 $$; exit 1; }) &
  tasks="$tasks $!" node=$((node + 1))
done
wait $tasks
"""


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is in a job of SLURM."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))


def test_two_nodes_learn_as_two_processes_on_one(tmp_path: Path, nodes: None) -> None:
    base = tiny_bert(tmp_path / "base", dropout=0.0)
    paths = toy_tables(tmp_path / "tables", 16)
    args = {"per_device_train_batch_size": 4, "logging_steps": 1, "num_train_epochs": 2}
    train(**job(tmp_path / "nodes", base, paths, args, nnodes=2, negatives_cross_device=True))
    train(**job(tmp_path / "processes", base, paths, args, nproc_per_node=2, negatives_cross_device=True))
    found, wanted = ([row["loss"] for row in history(tmp_path / name)] for name in ("nodes", "processes"))
    assert len(found) == 4
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert not (tmp_path / "nodes" / "state").exists()


def test_a_failing_node_is_an_error(tmp_path: Path, nodes: None) -> None:
    with pytest.raises(UserError, match=r"train\.nnodes: one of 1 processes on 2 nodes failed"):
        launch("retune.no_such_module", {}, 1, tmp_path, 2)


@pytest.mark.parametrize("given", ["OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK", None])
def test_each_node_has_all_cpus_of_the_job(
    tmp_path: Path, nodes: None, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    """A task whose CPUs srun is not told is bound to one.  Where they are not known, SLURM decides."""
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "3")
    with pytest.raises(UserError, match=r"2 nodes failed"):
        launch("retune.no_such_module", {}, 1, tmp_path, 2)
    asked = [word for word in (tmp_path / "asked").read_text().split() if word.startswith("--cpus-per-task")]
    assert asked == (["--cpus-per-task=3"] if given else [])


def test_several_nodes_need_a_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match=r"train\.nnodes: 2 nodes need a job of SLURM"):
        launch("any", {}, 1, tmp_path / "state", 2)
    assert not (tmp_path / "state").exists()
