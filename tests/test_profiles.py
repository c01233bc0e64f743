"""Profiles name rules that exist, and the one that is loaded by itself leaves the others alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from snakemake.profiles import ProfileConfigFileParser

ROOT = Path(__file__).resolve().parents[1]
SCHEDULERS = ["slurm", "generic", "kubernetes"]
RULE = re.compile(r"^(?:use )?rule (?:\w+ as )?(\w+)(?: with)?:", re.M)
RULES = {name for file in (ROOT / "workflow/rules").glob("*.smk") for name in RULE.findall(file.read_text())}
LOCAL = {"config", "report"}  # they run where Snakemake does


def profile(name: str) -> dict[str, Any]:
    """What Snakemake reads; `set-threads` and the like as lists of `rule=value` and `rule:resource=value`."""
    with (ROOT / "profiles" / name / "config.yaml").open() as stream:
        return ProfileConfigFileParser().parse(stream)


def named(found: dict[str, Any]) -> set[str]:
    entries = [entry for key in ("set-threads", "set-resources", "groups") for entry in found.get(key, [])]
    return {re.split("[:=]", entry)[0] for entry in entries}


@pytest.mark.parametrize("name", ["default", *SCHEDULERS])
def test_rules_of_a_profile_exist(name: str) -> None:
    assert named(profile(name)) <= RULES - LOCAL


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_knows_memory_and_time_of_every_rule_and_grows_them(name: str) -> None:
    found = profile(name)
    asked = found["default-resources"] + found["set-resources"]
    sizes = [entry for entry in asked if re.search(r"(mem_mb|disk_mb|runtime)=", entry)]
    assert {re.split("=", entry)[0] for entry in found["default-resources"]} >= {"mem_mb", "runtime"}
    assert [entry for entry in sizes if not entry.endswith("* attempt")] == []
    assert int(found["retries"]) == 2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_agree(name: str) -> None:
    """On threads, memory and GPUs: they are the stages' needs, not the cluster's."""
    wanted, found = profile("slurm"), profile(name)
    assert found["set-threads"] == wanted["set-threads"]
    same = re.compile(r"(mem_mb|gpu)=")
    assert [e for e in found["set-resources"] if same.search(e)] == [
        e for e in wanted["set-resources"] if same.search(e)
    ]


@pytest.mark.parametrize("arguments", [["--profile", "profiles/slurm"], ["--profile=profiles/slurm"]])
def test_the_default_leaves_another_profile_alone(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    monkeypatch.setattr(sys, "argv", ["snakemake", "--cores", "4"])
    alone = profile("default")
    assert "split=256" in alone["set-threads"] and "mine:gpu=1" in alone["set-resources"]
    monkeypatch.setattr(sys, "argv", ["snakemake", *arguments])
    beside = profile("default")
    assert set(alone) - set(beside) == {"set-threads", "set-resources"}
    other = profile("slurm")
    assert {key: beside[key] for key in beside} == {key: other[key] for key in beside}  # what it does set is the same
