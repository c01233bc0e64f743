"""What the documents say is true: commands exist, files are there, versions are the lock's."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return {name(line): line.split("==")[1] for line in lines if "==" in line}


def name(requirement: str) -> str:
    return re.split(r"[=<>\[; ]", requirement)[0].lower().replace("_", "-").replace(".", "-")


def test_the_lock_holds_every_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert [one for one in wanted if name(one) not in locked()] == []
    assert locked()["torch"] == "2.13.0"


@pytest.mark.parametrize("file", ["cpu.yaml", "cuda.yaml"])
def test_environments_have_the_locks_versions(file: str) -> None:
    found = yaml.safe_load((ROOT / "envs" / file).read_text())["dependencies"]
    pinned = next(item["pip"] for item in found if isinstance(item, dict))
    assert {name(one): one.split("==")[1] for one in pinned}.items() <= locked().items()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_commands_of_the_readme_are_known() -> None:
    """`make` targets, `retune` commands and configs that the pages name exist."""
    from retune.cli import COMMANDS

    text = "\n".join(page.read_text() for page in PAGES)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.M)) <= targets
    assert set(re.findall(r"(?:^|`)retune ([a-z]+)", text, re.M)) <= set(COMMANDS)
    assert [file for file in re.findall(r"configs/[a-z0-9-]+\.yaml", text) if not (ROOT / file).is_file()] == []


def test_the_yaml_of_the_readme_is_a_valid_config() -> None:
    from retune.experiment import load

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        load(yaml.safe_load(block))
