"""The table of docs/scaling.md is what its formulas give, and the measured growth is computed as it says."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark as a module; benchmarks import one another by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def test_the_documents_table_is_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = script("scaling", monkeypatch)
    assert scaling.table(scaling.Setting()) in (ROOT / "docs/scaling.md").read_text()


def test_hand_made_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = script("scaling", monkeypatch)
    s = scaling.Setting(parameters=1e6, dim=100, tokens=10, query_tokens=5, queries=1000, tera=1, float32_tera=0.5)
    an_hour = 3600e12  # operations
    assert scaling.embed(1e6, s) == pytest.approx(2 * 1e6 * (1e7 + 5000) / an_hour)
    assert scaling.search(1e6, s) == pytest.approx(2 * 1e6 * 1000 * 100 / (an_hour / 2))
    assert scaling.scores(1e6, s) == pytest.approx(2e6 * 16_000 * 15 / an_hour)
    assert scaling.train(1e6, s) == pytest.approx(6e6 * 1000 * (5 + 80) / an_hour)
    assert scaling.vectors(1e6, s) == pytest.approx(0.208)
    assert scaling.queries(500, s) == 50
    assert [scaling.shards(n) for n in (1e5, 1e7, 2e7, 8.8e7, 1e9)] == [1, 1, 2, 16, 99]


def test_constants_of_measured_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = script("growth", monkeypatch)
    rows = [
        {"stage": stage, "texts": n, "seconds": 1 + 2e-5 * n, "cpu_seconds": 2 + 3e-5 * n, "gigabytes": 0.5 + 2e-8 * n}
        for stage in growth.STAGES
        for n in (1000, 10_000, 1_000_000)
    ]
    found = growth.constants(rows)
    assert [one["stage"] for one in found] == list(growth.STAGES)
    assert {(one["microseconds_a_text"], one["bytes_a_text"], one["exponent"]) for one in found} == {(30.0, 20.0, 0.57)}
    assert "| ingest | 2.0 s, 0.50 GB | 2.3 s, 0.50 GB | 32.0 s, 0.52 GB | 30.0 | 20.0 | 0.57 |" in growth.table(
        rows, found
    )


def test_every_stage_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a tiny size, in this process."""
    growth = script("growth", monkeypatch)
    monkeypatch.setattr(growth, "measure", lambda stage, folder: (getattr(growth, stage)(folder), (1.0, 2.0, 10**9))[1])
    rows = growth.grow(60, 20, tmp_path / "small") + growth.grow(120, 20, tmp_path / "large")
    assert [row["stage"] for row in rows] == [*growth.STAGES] * 2
    growth.plot(rows, tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").read_text().startswith("<svg")
