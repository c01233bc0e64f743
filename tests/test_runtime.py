"""Jobs: logs, one-line errors, atomic writes."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from retune.runtime import UserError, atomic, report_and_exit_code

ROOT = Path(__file__).resolve().parents[1]


def job(tmp_path: Path, body: str) -> tuple[int, str]:
    """Run `body` as a job; its exit code and its log."""
    log = tmp_path / "logs/x.log"
    code = f"from retune.runtime import *\nstart_job({str(log)!r}, 1)\n{body}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "" and done.stderr == ""
    return done.returncode, log.read_text()


def test_everything_goes_to_the_log(tmp_path: Path) -> None:
    body = (
        "import subprocess\nprint('out')\nlog.info('told')\nsubprocess.run(['echo', 'child'])\nwith timed('work'): pass"
    )
    code, log = job(tmp_path, body)
    assert code == 0
    assert "out" in log and "told" in log and "child" in log and "work: 0.0 s" in log


def test_a_users_mistake_is_one_line(tmp_path: Path) -> None:
    code, log = job(tmp_path, "raise UserError('train.jsonl:17: pos: expected a list')")
    assert code == 1 and log == "error: train.jsonl:17: pos: expected a list\n"


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    code, log = job(tmp_path, "1 / 0")
    assert code == 1 and "Traceback" in log and "ZeroDivisionError" in log


def test_a_full_disk_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        with open("/dev/full", "w") as file:
            file.write("x")
            file.flush()
    except OSError as error:
        assert report_and_exit_code(error) == 1
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [PermissionError, OSError])
def test_a_place_that_is_not_the_users_is_said(kind: type[OSError], capsys: pytest.CaptureFixture[str]) -> None:
    number = errno.EACCES if kind is PermissionError else errno.EROFS
    assert report_and_exit_code(kind(number, os.strerror(number), "/models/x.parquet")) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: /models/x.parquet: {os.strerror(number)}; ") and said.count("\n") == 1


def test_threads_are_set_before_torch(tmp_path: Path) -> None:
    _, log = job(tmp_path, "import torch\nprint(torch.get_num_threads())")
    assert log.strip() == "1"


@pytest.mark.parametrize("folder", [False, True])
def test_atomic_replaces_whole_or_not_at_all(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "t"

    def fill(part: Path, text: str) -> None:
        if folder:
            part.mkdir()
            (part / "f").write_text(text)
        else:
            part.write_text(text)

    def content() -> str:
        return (target / "f" if folder else target).read_text()

    with atomic(target) as part:
        fill(part, "one")
    with pytest.raises(UserError), atomic(target) as part:
        fill(part, "half")
        raise UserError
    assert content() == "one" and os.listdir(tmp_path) == ["t"]
    with atomic(target) as part:
        fill(part, "two")
    assert content() == "two" and os.listdir(tmp_path) == ["t"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"file/model: cannot be made \(Not a directory\)"),
        atomic(tmp_path / "file/model/table"),
    ):
        pass


def test_an_earlier_folder_is_whole_until_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is killed while the old one is being removed leaves the new one."""
    target, removed = tmp_path / "model", []

    def killed(folder: Path, *_: object, **__: object) -> None:
        removed.append(sorted(os.listdir(folder)))
        raise KeyboardInterrupt

    for text in ("one", "two"):
        if text == "two":
            monkeypatch.setattr("retune.runtime.shutil.rmtree", killed)
        with contextlib.suppress(KeyboardInterrupt), atomic(target) as part:
            part.mkdir()
            (part / text).write_text(text)
    assert removed == [["one"]] and os.listdir(target) == ["two"]


def test_an_earlier_folder_stays_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace = tmp_path / "model", os.replace
    target.mkdir()
    (target / "one").touch()

    def failing(source: Path, place: Path) -> None:
        if ".part-" in source.name:
            raise OSError("no")
        replace(source, place)

    monkeypatch.setattr("retune.runtime.os.replace", failing)
    with pytest.raises(OSError, match="no"), atomic(target) as part:
        part.mkdir()
    assert os.listdir(tmp_path) == ["model"] and os.listdir(target) == ["one"]
