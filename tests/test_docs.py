"""What the documents say is true: commands exist, files are there, versions are the lock's."""

import importlib
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


def test_flags_in_the_pages_are_known() -> None:
    from retune.cli import STAGES

    blocks = [block for page in PAGES for block in re.findall(r"```\n(.*?)```", page.read_text(), re.S)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    named = [(found[1], line) for line in lines if (found := re.search(r"retune (\w+) +--", line))]
    calls = [(stage, line) for stage, line in named if stage in STAGES]
    assert len({stage for stage, _ in calls}) == len(STAGES)
    for stage, line in calls:
        known = {name for flag in importlib.import_module(f"retune.commands.{stage}").FLAGS for name in flag.names}
        asked = re.findall(r"--(\w+)", line.split("retune " + stage)[1])
        assert [flag for flag in asked if flag not in known] == [], line


def test_yaml_in_the_page_on_evaluation_is_valid() -> None:
    from retune.experiment import load

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        load({"embedder": {"model": "m"}, "ingest": {"train": "a.jsonl"}} | yaml.safe_load(block))


def test_the_yaml_of_the_readme_is_a_valid_config() -> None:
    from retune.experiment import load

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        load(yaml.safe_load(block))
