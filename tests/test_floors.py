"""Imports run downwards only, and the light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "config": 0, "tables": 0, "runtime": 0, "fingerprint": 0, "experiment": 0, "plan": 0, "reference": 0, "sections": 0,
    "processes": 0, "gpus": 0, "artifacts": 0,
    "model": 1, "objective": 1, "data": 2, "training": 2, "report": 2, "stages": 3,
    "commands": 4, "cli": 4, "__main__": 4, "cocktail": 4,
}  # fmt: skip
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "retune").rglob("*.py"))


def room(module: str) -> str:
    """`retune.model.engine` → `model`."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_downwards(path: Path) -> None:
    own = path.with_suffix("").parts[1]
    if own == "__init__":
        assert not {name for name in imports(path) if name.startswith("retune.")}
        return
    for name in imports(path):
        assert name.split(".")[0] != "snakemake", f"{path} knows Snakemake"
        if not name.startswith("retune.") or room(name) not in FLOORS:
            continue
        other = room(name)
        assert FLOORS[other] <= FLOORS[own], f"{path} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]})"
        if {own, other} == {"model", "objective"}:
            raise AssertionError(f"{path} imports {name}: model and objective never meet")
        if own == other == "stages" and path.name != "__init__.py":
            assert name in ("retune.stages", f"retune.stages.{path.stem}"), f"{path} imports {name}: stages never meet"


def test_every_module_has_a_floor() -> None:
    assert {path.with_suffix("").parts[1] for path in MODULES} - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize(
    "modules",
    ["retune.config, retune.experiment, retune.plan, retune.fingerprint, retune.data.files", "retune.stages.ingest"],
)
def test_stays_light(modules: str) -> None:
    code = f"import sys, {modules}; print([m for m in ('torch', 'transformers', 'faiss') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
