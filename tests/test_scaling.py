"""The table of docs/scaling.md is what its formulas give, and the measured growth is computed as it says."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from retune.data import index, search

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark as a module; benchmarks import one another by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def test_the_documents_table_is_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = script("scaling", monkeypatch)
    document = (ROOT / "docs/scaling.md").read_text()
    for columns in (scaling.TIME, scaling.SPACE, scaling.SWITCH):
        assert scaling.table(columns, scaling.Setting()) in document


def test_the_documents_measured_constants_are_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = script("scaling", monkeypatch).MEASURED
    document = (ROOT / "docs/scaling.md").read_text()
    for name, stage in (("ingest", "ingest"), ("split", "split")):
        grown = float(next(line for line in document.splitlines() if line.startswith(f"| {stage} | 0")
                           or line.startswith(f"| {stage} | 1")).split(" | ")[4])  # fmt: skip
        assert measured[name] == pytest.approx(grown * 1e-6, rel=0.01)
    for told in ("141 bytes a text", "24 bytes a text", "69 bytes a text", "3.8 bytes a word", "0.4 GB/s", "45 ns"):
        assert told in document, told


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
    assert [scaling.shards(n) for n in (1e5, 1e7, 2e7, 8.8e7, 1e8, 1e9)] == [1, 1, 2, 9, 10, 99]


def test_hand_made_search_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 queries in batches of 300 are four, and each reads 0.208 GB twice."""
    scaling = script("scaling", monkeypatch)
    s = scaling.Setting(dim=100, queries=1000, depth=84, batch=300, tera=1, float32_tera=0.5, disk=0.5)
    assert scaling.reading(1e6, s) * 3600 == pytest.approx(2 * 4 * 0.208 / 0.5)
    assert scaling.merging(1e6, s) * 3600 == pytest.approx(45e-9 * 1000 * 100 * 16)
    assert scaling.on_gpu(1e6, s) * 3600 == pytest.approx(2 * 4 * 0.208 / 0.5)  # products take 0.4 s
    slow = scaling.Setting(**(vars(s) | {"float32_tera": 0.01}))
    assert scaling.on_gpu(1e6, slow) * 3600 == pytest.approx(20 + 0.072 + 4 * 0.208 / 0.5)
    # ten parts of ten million: each asks all 1,000 queries
    assert scaling.on_gpu(1e8, s) * 3600 == pytest.approx(2 * 4 * 2.08 / 0.5)
    assert scaling.mine(1e8, s) * 3600 == pytest.approx(680 + 180e-9 * 1000 * 84 * 10 + 20.8 / 0.5)
    assert scaling.held("ingest", 1e9, s) == pytest.approx(141.2)
    assert scaling.held("mine", 1e6, s) == pytest.approx(0.2 + 0.069 + 0.0008)
    assert scaling.held_in_search(1e6, s) == pytest.approx(0.2 + 0.268435456 + 0.003 + 0.0008)
    assert scaling.compressed(1e9, s) == pytest.approx(104)
    assert scaling.compressed(1e7, s) == pytest.approx(1.04)
    quick = scaling.Setting(dim=100, queries=1000, disk=0.5, core_tera=1e9)
    codes = 1000 * 64 * 1e7 / 16384 * 96 / 16e9
    assert scaling.indexed(1e7, quick) * 3600 == pytest.approx(codes + (2 + 1) * 2.08 / 0.5, rel=1e-3)


def test_a_search_reads_as_the_formula_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice for each batch; an index once to train, once to fill, and once for each batch."""
    recall = script("recall", monkeypatch)
    recall.make(tmp_path, 2000, 40, 16)
    read, blocks = [], search.blocks
    monkeypatch.setattr(search, "blocks", lambda *args: read.append(args) or blocks(*args))
    texts, queries = [tmp_path / "texts.parquet"], search.load(tmp_path / "queries.parquet")
    read.clear()
    search.top_k(queries, texts, 10, batch=10)
    assert len(read) == 2 * 4
    read.clear()
    monkeypatch.setattr(index, "BATCH", 10)
    ids = index.build(texts, "IVF4,Flat", nprobe=2).search(queries, 10)[1]
    assert len(read) == 2 + 4
    monkeypatch.setattr(index, "BATCH", 40)
    np.testing.assert_array_equal(index.build(texts, "IVF4,Flat", nprobe=2).search(queries, 10)[1], ids)


def test_recall_of_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recall = script("recall", monkeypatch)
    best = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    found = np.array([[2, 1, 9, -1], [5, 7, 6, 0]])
    assert recall.recalls(found, best, [2, 4]) == [(1 + 0.5) / 2, (2 / 4 + 3 / 4) / 2]
    recall.make(tmp_path, 1500, 30, 16)
    queries = search.load(tmp_path / "queries.parquet")
    told = recall.measure(queries, [tmp_path / "texts.parquet"], "IVF8,Flat", [1, 8], 20)
    assert told["texts"] == 1500 and told["queries"] == 30
    few, all_of_them = told["nprobe"][1], told["nprobe"][8]
    assert all_of_them[:2] == [1, 1] and few[1] < 1  # recall@10, recall@20


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
