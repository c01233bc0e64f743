"""GPUs are lent to one job at a time, and come back from one that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retune import gpus

LISTED = """GPU 0: NVIDIA H200 (UUID: GPU-aaaa)
GPU 1: NVIDIA H200 (UUID: GPU-bbbb)
  MIG 1g.18gb     Device  0: (UUID: MIG-cccc)
  MIG 1g.18gb     Device  1: (UUID: MIG-dddd)
GPU 2: NVIDIA H200 (UUID: GPU-eeee)
"""
# Takes GPUs of a fake machine, marks them as its own, and fails where another job has marked one of them.
JOB = """
import os, sys, time
from pathlib import Path
from retune import gpus
gpus.POLL = 0.02
folder, count, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
names = gpus.take(["a", "b", "c"], count, folder)
for name in names:
    os.mkdir(folder / f"used-{name}")
print(*names, flush=True)
time.sleep(seconds)
for name in names:
    os.rmdir(folder / f"used-{name}")
"""


def start(folder: Path, count: int, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", JOB, str(folder), str(count), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_jobs_side_by_side_never_meet(tmp_path: Path) -> None:
    jobs = [start(tmp_path, count, 0.1) for count in (1, 2, 3, 1, 2, 1, 2)]
    said = [job.communicate(timeout=60) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * len(jobs), said
    assert [len(out.split()) for out, _ in said] == [1, 2, 3, 1, 2, 1, 2]


def test_the_locks_of_a_killed_job_are_free(tmp_path: Path) -> None:
    first = start(tmp_path, 3, 60)
    assert first.stdout.readline().split() == ["a", "b", "c"]
    second = start(tmp_path, 2, 0)
    time.sleep(0.5)
    assert second.poll() is None  # it waits
    for name in "abc":
        (tmp_path / f"used-{name}").rmdir()
    first.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=60)[0].split() == ["a", "b"]
    first.communicate()


def test_what_nvidia_smi_lists() -> None:
    assert gpus.parsed(LISTED) == {"0": "GPU-aaaa", "1": "MIG-cccc", "2": "MIG-dddd", "3": "GPU-eeee"}
    assert gpus.parsed("No devices found.") == {}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with three GPUs, whose locks lie in a folder of the test's own."""
    monkeypatch.setattr(gpus, "installed", lambda: {"0": "GPU-a", "1": "GPU-b", "2": "GPU-c"})
    monkeypatch.setattr(gpus, "folder", lambda: tmp_path)
    monkeypatch.setattr(gpus, "_held", [])
    monkeypatch.delenv(gpus.SCHEDULED, raising=False)
    monkeypatch.delenv(gpus.LENDS, raising=False)
    monkeypatch.setenv(gpus.VISIBLE, "")  # so that what a test sets goes again
    monkeypatch.delenv(gpus.VISIBLE)
    return monkeypatch


@pytest.mark.parametrize(
    ("allowed", "count", "seen"),
    [
        (None, 1, "GPU-a"),
        (None, 8, "GPU-a,GPU-b,GPU-c"),
        (None, 0, ""),
        ("2,1", 1, "GPU-c"),
        ("GPU-b", 2, "GPU-b"),
    ],
)
def test_a_job_sees_its_own_gpus(machine, allowed: str | None, count: int, seen: str) -> None:
    if allowed is not None:
        machine.setenv(gpus.VISIBLE, allowed)
    assert gpus.reserve(count) == [name for name in seen.split(",") if name]
    assert os.environ[gpus.VISIBLE] == seen


def test_a_schedulers_choice_stands(machine) -> None:
    machine.setenv(gpus.SCHEDULED, "17")
    machine.setenv(gpus.VISIBLE, "1")
    assert gpus.reserve(2) == [] and os.environ[gpus.VISIBLE] == "1"


def test_inside_an_allocation_snakemake_lends_what_that_has(machine) -> None:
    """`salloc --gpus=2`, then `snakemake --cores all`: its jobs share the two."""
    machine.setenv(gpus.SCHEDULED, "17")
    machine.setenv(gpus.LENDS, "1")
    machine.setenv(gpus.VISIBLE, "1,2")
    assert gpus.reserve(1) == ["GPU-b"] and os.environ[gpus.VISIBLE] == "GPU-b"


def test_without_a_gpu_nothing_changes(machine) -> None:
    machine.setattr(gpus, "installed", dict)
    assert gpus.reserve(1) == [] and gpus.VISIBLE not in os.environ
