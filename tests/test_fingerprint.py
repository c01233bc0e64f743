"""Fingerprints cover what a script reaches, and nothing else."""

import shutil
from pathlib import Path

import pytest

from retune import fingerprint as module
from retune.fingerprint import fingerprint, reached

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "workflow/scripts"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the library and the scripts that a test may edit."""
    shutil.copytree(ROOT / "retune", tmp_path / "retune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "ROOT", tmp_path / "retune")
    return tmp_path


def prints(copy: Path) -> dict[str, str]:
    return {path.stem: fingerprint(path) for path in sorted((copy / "scripts").glob("*.py"))}


def changed(copy: Path, file: str, text: str) -> set[str]:
    before = prints(copy)
    with open(copy / file, "a") as stream:
        stream.write(text)
    after = prints(copy)
    return {name for name in before if before[name] != after[name]}


def test_an_edit_reaches_those_who_import_it(copy: Path) -> None:
    assert changed(copy, "retune/stages/mine.py", "\nA = 1\n") == {"mine"}
    assert changed(copy, "retune/objective/losses.py", "\nA = 1\n") == {"train", "fit", "weigh"}
    assert changed(copy, "retune/data/search.py", "\nA = 1\n") >= {"mine", "evaluate"}
    assert changed(copy, "scripts/embed.py", "\nA = 1\n") == {"embed"}


def test_comments_docstrings_and_values_change_nothing(copy: Path) -> None:
    assert changed(copy, "retune/stages/mine.py", "\n# a comment\n") == set()
    assert changed(copy, "retune/config.py", "\nA = 1\n") == set()
    text = (copy / "retune/tables.py").read_text()
    before = prints(copy)
    (copy / "retune/tables.py").write_text('"""Another docstring."""\n' + text.split('"""', 2)[2])
    assert prints(copy) == before


def test_versions_of_deciding_packages_count(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = prints(copy)
    monkeypatch.setattr(module, "_version", lambda package: "0" if package == "faiss-cpu" else "1")
    first = prints(copy)
    monkeypatch.setattr(module, "_version", lambda package: "9" if package == "faiss-cpu" else "1")
    second = prints(copy)
    assert {name for name in first if first[name] != second[name]} == {"mine", "evaluate", "search"}
    assert before["demo"] == first["demo"]


def test_reached_modules() -> None:
    found = reached(SCRIPTS / "mine.py")
    assert "retune.stages.mine" in found and "retune.data.search" in found
    assert "retune.objective.losses" not in found and "retune.config" not in found
