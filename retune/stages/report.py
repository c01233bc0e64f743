"""Report: the tables of a run → one HTML page that opens anywhere, without a network or a script.

Chooses which sections there are; a stage that was off leaves its section out.  Each section's own
module in `retune.report` knows what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import retune
from retune.config import ReportConfig
from retune.report.corpus import data, teacher
from retune.report.costs import costs
from retune.report.examples import examples
from retune.report.measures import Metrics, headline, metrics_section
from retune.report.merging import merging
from retune.report.mining import mining
from retune.report.origins import origin
from retune.report.page import Html, Section, details, page, paragraph, plural, tag
from retune.report.spread import scan
from retune.report.training import curves, training
from retune.report.variants import variants
from retune.runtime import atomic, log

SOURCES = 3  # data sets named at the top
OFF = {"mine": ("search", "mine"), "score": ("fit", "scores", "score"), "merge": ("weigh", "merge")}
"""Rules that a run is without where a section is null; a variant lies beside a run that may have them."""
MINED = 20  # queries whose mined negatives are shown, where any examples are


def report(
    *, run: str, inputs: Mapping[str, Any], out: Path, settings: ReportConfig, guards: Sequence[str] = ()
) -> None:
    """Write the page `out`.

    Args:
        run: the run's name, shown as the title.
        inputs: paths by name: `texts`, `queries` (both needed), `pairs` (the most complete), `rejected`, `lengths`,
            `bins`, `mined`, `mining` (what mining wrote), `history`, `teacher_history`, `scoring` (counts), `metrics`,
            `weights` (of merging, where they were found), `config` (YAML); `benchmarks` {name: {texts, queries,
            pairs}}, `runs` {benchmark: {model: run}}, `variants` {run: metrics}, `leakage`, `costs` (folders with
            Snakemake's benchmark files; they need not be there), `worked` {job: table that its throughput is
            counted by; neither need these be there}.
        out: the HTML file.
        settings: how many queries are shown.
        guards: the benchmarks that show what was lost elsewhere.

    Raises:
        UserError: if a table is missing or not whole.
    """
    given = {name: value for name, value in inputs.items() if value}
    metrics = Metrics(given["metrics"], guards) if "metrics" in given else None
    sections = [
        headline(metrics) if metrics else None,
        metrics_section(metrics, _origins(given)) if metrics else None,
        variants(run, metrics, given["variants"]) if metrics and "variants" in given else None,
        _examples(metrics, given, settings.examples),
        data(given),
        mining(given, MINED if settings.examples else 0),
        _teacher(given),
        training(given["history"]) if "history" in given else None,
        merging(given["weights"]) if "weights" in given else None,
        _costs(given),
        _config(given["config"]) if "config" in given else None,
    ]
    found = [section for section in sections if section is not None]
    text = page(run, paragraph(_subtitle(given), css="soft"), found, f"retune {retune.__version__}")
    with atomic(out) as part:
        part.write_text(text, encoding="utf-8")
    log.info("report: %s, %d sections, %.0f kB", out, len(found), len(text) / 1000)


def _origins(given: Mapping[str, Any]) -> dict[str, Html]:
    return {name: origin(files) for name, files in given.get("benchmarks", {}).items()}


def _examples(metrics: Metrics | None, given: Mapping[str, Any], n: int) -> Section | None:
    if metrics is None or "runs" not in given or "benchmarks" not in given:
        return None
    return examples(metrics, given["runs"], given["benchmarks"], n)


def _teacher(given: Mapping[str, Any]) -> Section | None:
    if "pairs" not in given:
        return None
    history = curves(given["teacher_history"]) if "teacher_history" in given else None
    return teacher(given["pairs"], history, given.get("scoring"))


def _costs(given: Mapping[str, Any]) -> Section | None:
    histories = {"train": given.get("history"), "fit": given.get("teacher_history")}
    worked = {job: Path(path) for job, path in given.get("worked", {}).items()}
    config = _settings(given)
    without = [rule for section, rules in OFF.items() if config.get(section, "") is None for rule in rules]
    known = {rule: path for rule, path in histories.items() if path}
    return costs(_folders(given.get("costs", ())), worked, known, without)


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(Path(given["config"]).read_text(encoding="utf-8")) if "config" in given else {}


def _subtitle(given: Mapping[str, Any]) -> str:
    """Which model, which data, which teacher."""
    config = _settings(given)
    if not config:
        return "What was run, on which data, and what it gained."
    names = scan(given["queries"]).group_by("dataset", maintain_order=True).len().collect()
    data = ", ".join(names["dataset"][:SOURCES]) + (" and others" if len(names) > SOURCES else "")
    said = [
        f"Base model {config['embedder']['model']}",
        f"{plural(int(names['len'].sum()), 'query', 'queries')} of {data}",
    ]
    if config.get("score"):
        fitted = ", trained here" if config["reranker"].get("fit") else ""
        said.append(f"teacher {config['reranker']['model']}{fitted}")
    return " · ".join(said)


def _config(path: str | Path) -> Section:
    text = Path(path).read_text(encoding="utf-8")
    shown = Html(tag("pre", tag("code", text)))
    return Section("config", "Config", details("Everything that was set, defaults included", shown))


def _folders(value: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(value)] if isinstance(value, (str, Path)) else [Path(folder) for folder in value]
