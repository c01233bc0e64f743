"""What a job does with the last good results: kept until the next good ones, whatever ends the job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ["results/x/train/model", "results/x/train/history.parquet"]
JOB = f"""
import os, shutil, signal, sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, {str(ROOT / "workflow/scripts")!r})
from job import start

outputs = [Path(path) for path in {OUTPUTS!r}]
here = SimpleNamespace(run="x")
start(SimpleNamespace(log=["logs/x/train.log"], threads=1, resources={{}}, output={OUTPUTS!r}, wildcards=here))
for path in outputs:  # as Snakemake does before a job runs
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
"""
WRITE = """
outputs[0].mkdir(parents=True)
(outputs[0] / "weights").write_text({0!r})
outputs[1].write_text({0!r})
"""


def run(folder: Path, body: str) -> tuple[int, str]:
    """Run a job in `folder`; its exit code and its log."""
    code = subprocess.run([sys.executable, "-c", JOB + body], cwd=folder).returncode
    return code, (folder / "logs/x/train.log").read_text()


@pytest.mark.parametrize(
    ("ending", "code"), [("raise SystemExit(143)", 143), ("1 / 0", 1), ("os.kill(os.getpid(), signal.SIGKILL)", -9)]
)
def test_the_last_good_result_is_kept_however_a_job_ends(tmp_path: Path, ending: str, code: int) -> None:
    """An exit that is asked for, as by a process that is told to stop, is no error to Python, but no result either."""
    model, history = (tmp_path / path.replace("results/x", "results/x/.kept") for path in OUTPUTS)
    assert run(tmp_path, WRITE.format("one"))[0] == 0
    assert (model / "weights").read_text() == history.read_text() == "one"
    ended, log = run(tmp_path, ending)
    assert ended == code and (model / "weights").read_text() == history.read_text() == "one"
    assert ("the last good result is kept in results/x/.kept/train/model" in log) == (ending == "1 / 0")
    assert run(tmp_path, WRITE.format("two"))[0] == 0
    assert (model / "weights").read_text() == history.read_text() == "two"
