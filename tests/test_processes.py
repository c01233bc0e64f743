"""Several processes: their work is counted, a failure of one is one error, and nobody goes on working."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from retune import processes
from retune.runtime import UserError

WORKER = """
import os, signal, sys, time
from pathlib import Path
from retune import processes
from retune.runtime import UserError

def main(job):
    Path(job["pid"]).write_text(str(os.getpid()))
    for done in job["done"]:
        processes.Told().update(done)
    print(job.get("said", ""))
    if job.get("fails") == "mistake":
        raise UserError("what is wrong")
    if job.get("fails") == "crash":
        raise ValueError("a bug")
    if job.get("fails") == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(job.get("sleep", 0))

sys.exit(processes.run_job(main, Path(sys.argv[1])))
"""


class Bar:
    done = 0

    def update(self, n: int) -> None:
        self.done += n


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "worker_for_test.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def start(folder: Path, bar: Bar, *jobs: dict):
    jobs = [{"pid": str(folder / f"{number}.pid"), "done": []} | job for number, job in enumerate(jobs)]
    return processes.working("worker_for_test", jobs, folder, bar, threads=1)


def is_running(file: Path) -> bool:
    try:
        return psutil.Process(int(file.read_text())).status() != psutil.STATUS_ZOMBIE
    except (FileNotFoundError, psutil.NoSuchProcess):
        return False


def test_the_work_of_all_is_counted(folder: Path, capfd) -> None:
    bar = Bar()
    with start(folder, bar, {"done": [1, 2]}, {"done": [10], "said": "a word"}) as others:
        others.update(100)
    assert bar.done == 113 and "a word" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("fails", "message"), [("mistake", "^what is wrong$"), ("crash", r"of 3 .*code 1"), ("killed", r"of 3 .*code -9")]
)
def test_one_that_fails_stops_all(folder: Path, capfd, fails: str, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(UserError, match=message), start(folder, Bar(), {"sleep": 600}, {"fails": fails}) as others:
        while time.monotonic() < begin + 300:  # this one's own work
            others.update(0)
            time.sleep(0.05)
    assert time.monotonic() < begin + 200 and not is_running(folder / "0.pid")
    assert ("ValueError: a bug" in capfd.readouterr().err) == (fails == "crash")


def test_one_that_fails_when_all_else_is_done(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^what is wrong$"), start(folder, Bar(), {"fails": "mistake"}):
        pass


def test_they_stop_when_this_one_fails(folder: Path) -> None:
    with pytest.raises(KeyError), start(folder, Bar(), {"sleep": 600}):
        while not (folder / "0.pid").exists():
            time.sleep(0.05)
        raise KeyError
    assert not is_running(folder / "0.pid")


def test_they_stop_when_this_one_is_killed(folder: Path) -> None:
    code = (
        "import time; from pathlib import Path; from test_processes import Bar, start\n"
        f"with start(Path({str(folder)!r}), Bar(), {{'done': [1] * 10**7}}): time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent)])}
    parent, pid = subprocess.Popen([sys.executable, "-c", code], env=environment), folder / "0.pid"
    while not (pid.exists() and pid.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 100
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_running(pid)
