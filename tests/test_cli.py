"""The command line: what it prints, and that mistakes are one line."""

import importlib
import json
from pathlib import Path

import pytest

from retune.cli import COMMANDS, STAGES, main


def test_check_prints_the_resolved_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("embedder: {model: m}\ningest: {train: a.jsonl}\nvariants: {cold: {train: {temperature: 1}}}\n")
    assert main(["check", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "# run\n" in shown and "# run.cold\n" in shown and "range_for_sampling: 10-210" in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "embedder: {model: m}\ningest: {train: a, tran: b}\n",
            ":2: ingest.tran: unknown key; did you mean ingest.train?",
        ),
        ("a: [", "not valid YAML"),
        ("- a\n", "expected a mapping of sections"),
    ],
)
def test_check_names_the_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert main(["check", str(file)]) == 1
    shown = capsys.readouterr().err
    assert message in shown and str(file) in shown and "Traceback" not in shown


def test_what_is_no_text_is_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "model.bin"):
        assert main(["check", str(path)]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith(f"error: {path}: ") and "expected a YAML file" in shown and shown.count("\n") == 1


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "no.yaml")]) == 1
    assert main(["summary", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert "no such file" in shown and "no metrics here" in shown


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert "embedder" in json.loads(capsys.readouterr().out)["properties"]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and all(f"    {name} " in shown or f"    {name}\n" in shown for name in COMMANDS)


def test_every_stage_is_a_module_with_flags() -> None:
    for name in STAGES:
        module = importlib.import_module(f"retune.commands.{name}")
        assert module.FLAGS and callable(module.run) and module.__doc__


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("retune.commands.mine.run", interrupted)
    assert main(["mine", "--input_file", "a", "--output_file", "b"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
