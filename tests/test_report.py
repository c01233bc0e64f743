"""The report: its numbers against hand-made tables, its markup, and how a browser takes it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from retune import tables
from retune.config import ReportConfig
from retune.data.funnel import Funnel
from retune.report.costs import duration, jobs
from retune.report.measures import Metrics, difference
from retune.report.mining import share_above
from retune.report.page import cut, escape, signed, table
from retune.report.spread import bars, nice_step, quantiles
from retune.stages.metrics import metrics as write_metrics
from retune.stages.report import report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
EVIL = "<script>alert('x')</script> & \"quoted\" <b>bold</b>"
VOID = {"meta", "link", "br", "img", "hr", "input"}


# ---- a run, made up -----------------------------------------------------------------------------


def write_texts(path: Path, texts: list[str]) -> None:
    tables.write(path, "texts", {"text_id": range(len(texts)), "text": texts, "key": [None] * len(texts)})


def write_queries(path: Path, texts: list[str], dev: int = 0) -> None:
    n = len(texts)
    tables.write(path, "queries", {
        "query_id": range(n), "dataset": ["docs" if i % 3 else "notes" for i in range(n)], "text": texts,
        "key": [None] * n, "prompt": [None] * n, "type": [None] * n, "in_batch_negatives": [True] * n,
        "batch_size": [None] * n, "split": ["dev" if i < dev else "train" for i in range(n)],
        "source": [f"train.jsonl:{i + 1}" for i in range(n)],
    })  # fmt: skip


def write_pairs(path: Path, rows: list[tuple]) -> None:
    names = ("query_id", "text_id", "label", "origin", "similarity", "score")
    tables.write(path, "pairs", dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def write_run(path: Path, ranked: dict[int, list[int]]) -> None:
    rows = [(query, text, rank, 1.0 / rank) for query, found in ranked.items() for rank, text in enumerate(found, 1)]
    tables.write(
        path,
        "run",
        dict(zip(("query_id", "text_id", "rank", "score"), map(list, zip(*rows, strict=True)), strict=True)),
    )


def write_history(path: Path, steps: int) -> None:
    grid = range(10, 10 * steps + 1, 10)
    absent = {field.name: [None] * steps for field in tables.TABLES["history"] if field.nullable}
    tables.write(path, "history", absent | {
        "step": list(grid), "epoch": [step / 100 for step in grid], "loss": [3 * 0.97**i for i in range(steps)],
        "learning_rate": [2e-5 * (1 - i / steps) for i in range(steps)], "grad_norm": [1.0] * steps,
        "positive_similarity": [0.8] * steps, "negative_similarity": [0.3] * steps, "accuracy": [0.9] * steps,
        "tokens_per_second": [1e4] * steps, "padding": [0.05] * steps,
    })  # fmt: skip


def ranking(rng: np.random.Generator, n: int, own: int, good: float) -> list[int]:
    """Twelve of `n` passages, with a query's own one high up with probability `good`."""
    others = [int(i) for i in rng.permutation(n) if i != own][:11]
    others.insert(int(rng.integers(2) if rng.random() < good else rng.integers(3, 12)), own)
    return others


def make_benchmark(folder: Path, seed: int, quality: dict[str, float], n: int = 60) -> tuple[dict, dict]:
    """Tables and runs of a benchmark in which each query's passage has the query's number."""
    rng = np.random.default_rng(seed)
    files = {name: folder / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
    write_texts(files["texts"], [f"Passage {i} says a little about topic {i}. {EVIL}" for i in range(n)])
    write_queries(files["queries"], [f"Which passage is on topic {i}? {EVIL}" for i in range(n)])
    write_pairs(files["pairs"], [(i, i, 1, "given", None, None) for i in range(n)])
    runs = {model: folder / f"{model}.run.parquet" for model in quality}
    for model, good in quality.items():
        write_run(runs[model], {i: ranking(rng, n, i, good) for i in range(n)})
    return files, runs


def make_training(folder: Path, n: int = 300) -> dict[str, Path]:
    """Tables of ingest, split, mine and score."""
    rng = np.random.default_rng(7)
    files = {name: folder / f"{name}.parquet" for name in ("texts", "queries", "pairs", "rejected", "lengths", "bins")}
    write_texts(files["texts"], [f"Text {i}" for i in range(n)])
    write_queries(files["queries"], [f"Query {i}" for i in range(n)], dev=20)
    rows = []
    for i in range(n):
        rows.append((i, i, 1, "given", float(rng.normal(0.6, 0.1)), float(rng.normal(3, 1))))
        rows += [(i, int(j), 0, "mined" if j % 9 else "random", float(rng.normal(0.45, 0.08)), float(rng.normal(-2, 2)))
                 for j in rng.integers(0, n, 7)]  # fmt: skip
    write_pairs(files["pairs"], rows)
    reasons = ["pos: expected a list of strings, found a string"] * 3 + [f"query: empty {EVIL}"]
    tables.write(files["rejected"], "rejected", {
        "dataset": ["docs"] * 4, "source": [f"train.jsonl:{i}" for i in (17, 18, 90, 4)], "reason": reasons,
        "row": ["{}"] * 4,
    })  # fmt: skip
    tokens = np.minimum(rng.lognormal(4.3, 0.6, n), 900).astype(np.int32)
    tables.write(files["lengths"], "lengths", {"text_id": range(n), "n_tokens": tokens})
    bins = ["len-0-500" if t < 500 else "len-500-inf" for t in tokens]
    tables.write(files["bins"], "bins", {"query_id": range(n), "n_tokens": tokens, "length_bin": bins})
    return files


def make_metrics(folder: Path, found: dict[str, tuple[dict, dict]]) -> Path:
    out = folder / "metrics.parquet"
    runs = {(name, model): path for name, (_, paths) in found.items() for model, path in paths.items()}
    files = {name: tables_of for name, (tables_of, _) in found.items()}
    write_metrics(runs=runs, benchmarks=files, cutoffs=[1, 10, 100], seed=1, out=out)
    return out


def make_run(folder: Path) -> dict:
    """Inputs of a report with every section."""
    inputs: dict = make_training(folder)
    quality = {"base": 0.4, "tuned": 0.95, "merged": 0.7}
    found = {name: make_benchmark(folder / name, seed, quality) for seed, name in enumerate(("target", "guard"))}
    other = make_benchmark(folder / "other", 0, {"base": 0.4, "tuned": 0.45, "merged": 0.7})
    write_history(folder / "history.parquet", 50)
    write_history(folder / "teacher.parquet", 9)
    (folder / "costs").mkdir()
    for name, cells in {"train": "421.5\t0:07:01\t2210.4", "embed.base.queries": "8.1\t0:00:08\tNA",
                        "embed.base.texts-00-of-01": "31\t0:00:31\t900", "mine": "broken"}.items():  # fmt: skip
        (folder / f"costs/{name}.tsv").write_text(f"s\th:m:s\tmax_rss\n{cells}\n")
    (folder / "config.yaml").write_text(f"name: demo\n# {EVIL}\n")
    return inputs | {
        "history": folder / "history.parquet", "teacher_history": folder / "teacher.parquet",
        "metrics": make_metrics(folder, found), "benchmarks": {name: files for name, (files, _) in found.items()},
        "runs": {name: runs for name, (_, runs) in found.items()}, "config": folder / "config.yaml",
        "variants": {"demo.no-teacher": make_metrics(folder / "other", {"target": other})},
        "costs": [folder / "costs", folder / "absent"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, str, dict]:
    folder = tmp_path_factory.mktemp("report")
    inputs = make_run(folder)
    out = folder / "out" / "index.html"
    report(run="demo", inputs=inputs, out=out, settings=ReportConfig(examples=4))
    return out, out.read_text(encoding="utf-8"), inputs


# ---- the page -----------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Elements that are not closed in order, attributes that load something, ids and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, name: str, attributes: list) -> None:
        self.tags.append(name)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "src", "xlink:href", "srcset", "data", "action"):
                self.links.append(value)
            if key.startswith("on"):
                self.problems.append(f"{name} {key}")
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list) -> None:
        self.tags.append(name)

    def handle_endtag(self, name: str) -> None:
        if not self.open or self.open.pop() != name:
            self.problems.append(f"</{name}>")


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.problems
    assert not checker.open
    return checker


def test_page_is_whole_and_loads_nothing(full) -> None:
    _, text, _ = full
    found = checked(text)
    assert "script" not in found.tags
    assert all(link.startswith("#") or link == "data:," for link in found.links)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/)", text)
    assert len(set(found.ids)) == len(found.ids)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert text.count('<svg class="plot"') == text.count("</svg>") >= 8
    assert len(text) < 1_500_000


def test_every_section_is_there(full) -> None:
    found = checked(full[1])
    wanted = ["result", "metrics", "variants", "queries", "data", "mining", "teacher", "training", "run", "config"]
    assert [i for i in found.ids if i in wanted] == wanted


def test_texts_are_escaped(full) -> None:
    text = full[1]
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") > 10
    assert "<b>bold</b>" not in text


def test_plots_follow_the_scheme(full) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", full[1], re.S))
    assert "var(--tuned)" in drawn
    assert not re.findall(r"#0f0e..", drawn)
    colours = set(re.findall(r'(?:fill|stroke)="([^"]+)"', drawn)) - {"none", "transparent"}
    assert all(colour.startswith("var(--") for colour in colours), colours


def test_same_input_same_bytes(full, tmp_path: Path) -> None:
    _, text, inputs = full
    report(run="demo", inputs=inputs, out=tmp_path / "again.html", settings=ReportConfig(examples=4))
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_headline_says_what_the_metrics_say(full) -> None:
    text, metrics = full[1], Metrics(full[2]["metrics"])
    base, tuned = (metrics.mean("target", model, ("nDCG", 10)) for model in ("base", "tuned"))
    assert tuned["p_value"] < 0.001
    assert f"from {base['value']:.3f} to {tuned['value']:.3f} (+{tuned['value'] - base['value']:.3f}" in text
    assert '<b class="good">a significant gain</b>' in text


def test_no_gain_is_called_none(tmp_path: Path) -> None:
    folder = tmp_path
    training = make_training(folder, 30)
    found = {"target": make_benchmark(folder / "b", 3, {"base": 0.5, "tuned": 0.5}, n=24)}
    inputs = training | {"metrics": make_metrics(folder, found)}
    report(run="x", inputs=inputs, out=folder / "x.html", settings=ReportConfig())
    text = (folder / "x.html").read_text()
    assert "not a significant difference with 24 queries" in text
    assert "a significant gain" not in text


def test_each_head_is_compared_with_base_by_the_same_head(tmp_path: Path) -> None:
    quality = {"base": 0.8, "tuned": 0.8, "base-dense+sparse": 0.2, "tuned-dense+sparse": 0.9}
    found = {"target": make_benchmark(tmp_path / "b", 3, quality, n=24)}
    inputs = make_training(tmp_path, 30) | {"metrics": make_metrics(tmp_path, found)}
    report(run="x", inputs=inputs, out=tmp_path / "x.html", settings=ReportConfig())
    text, metrics = (tmp_path / "x.html").read_text(), Metrics(inputs["metrics"])
    base, tuned = (metrics.mean("target", model, ("nDCG", 10))["value"] for model in list(quality)[2:])
    assert f"Tuning raised nDCG@10 of dense+sparse on target from {base:.3f} to {tuned:.3f} (" in text
    assert f"tuned-dense+sparse · nDCG@10</span><b>{tuned:.3f}</b>" in text
    assert metrics.mean("target", "base-dense+sparse", ("nDCG", 10))["p_value"] is None
    assert "against base ranked by the same head." in text


def test_variant_is_compared_honestly(full) -> None:
    text = full[1]
    assert re.search(r"<b>demo.no-teacher</b> against <b>demo</b>, tuned, nDCG@10 on target: worse \(−0\.\d+", text)


def test_sections_without_tables_are_left_out(tmp_path: Path) -> None:
    made = make_training(tmp_path, 30)
    plain = [(i, i, 1, "given", None, None) for i in range(30)]
    write_pairs(made["pairs"], plain)
    inputs = {name: made[name] for name in ("texts", "queries", "pairs")} | {"costs": tmp_path / "absent"}
    report(run="small", inputs=inputs, out=tmp_path / "small.html", settings=ReportConfig())
    found = checked((tmp_path / "small.html").read_text())
    assert found.ids == ["data"]


def test_examples_are_the_extreme_queries(full) -> None:
    text, metrics = full[1], Metrics(full[2]["metrics"])
    _, before = metrics.queries("target", "base", ("nDCG", 10))
    _, after = metrics.queries("target", "tuned", ("nDCG", 10))
    change = after - before
    best = int(np.lexsort((np.arange(len(change)), -change))[0])
    first = re.search(r'<details class="example" open><summary><span class="change good">(.*?)</span>(.*?)\?', text)
    assert first[1] == signed(float(change[best]))
    assert first[2] == f"Which passage is on topic {best}"
    body = text[first.end() : text.index("</details>", first.end())]
    rank = int(pl.read_parquet(full[2]["runs"]["target"]["tuned"]).filter(
        pl.col("query_id") == best, pl.col("text_id") == best)["rank"][0])  # fmt: skip
    assert f"→ rank {rank}:" in body
    assert 'class="relevant"' in body


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_browser_opens_it_without_complaint(full, tmp_path: Path) -> None:
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--no-first-run", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--dump-dom", full[0].as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert 'id="config"' in done.stdout
    assert "CONSOLE" not in done.stderr


# ---- the numbers --------------------------------------------------------------------------------


def kinds(values: dict[str, list[float]]) -> pl.LazyFrame:
    rows = [(kind, value) for kind, each in values.items() for value in each]
    return pl.DataFrame(rows, schema=["kind", "x"], orient="row").lazy()


def test_bars_by_hand() -> None:
    found = bars(kinds({"a": [0.0, 0.1, 0.1, 3.9], "b": [2.05]}), "x", 0.0, 4.0, ["b", "a"])
    assert [(row["kind"], row["low"], row["high"], row["value"]) for row in found if row["value"]] == [
        ("b", 2.0, 2.1, 1.0), ("a", 0.0, 0.1, 0.25), ("a", 0.1, 0.2, 0.5), ("a", 3.9, 4.0, 0.25),
    ]  # fmt: skip
    assert len(found) == 2 * 41  # empty bins too, so that outlines touch the ground


def test_bars_agree_with_numpy() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    found = bars(kinds({"a": values.tolist()}), "x", values.min(), values.max(), ["a"])
    step = found[0]["high"] - found[0]["low"]
    edges = np.arange(np.floor(values.min() / step), np.floor(values.max() / step) + 2) * step
    counts, _ = np.histogram(values, edges)
    by_low = {round(low, 6): n / 2000 for low, n in zip(edges[:-1], counts, strict=True) if n}
    assert {round(row["low"], 6): row["value"] for row in found if row["value"]} == pytest.approx(by_low)


def test_quantiles_agree_with_numpy() -> None:
    values = np.random.default_rng(1).exponential(size=501)
    found = quantiles(kinds({"a": values.tolist()}), "x")["a"]
    assert (found["n"], found["max"]) == (501, values.max())
    assert [found[str(q)] for q in (0.05, 0.5, 0.95)] == pytest.approx(np.quantile(values, [0.05, 0.5, 0.95]))


@pytest.mark.parametrize(("width", "step"), [(0.011, 0.02), (0.02, 0.02), (0.3, 0.5), (22, 25), (0, 1.0), (6, 10)])
def test_nice_step(width: float, step: float) -> None:
    assert nice_step(width) == pytest.approx(step)


def test_difference_needs_the_same_queries() -> None:
    ids = np.arange(40)
    values = np.random.default_rng(2).random(40)
    assert difference((ids, values), (ids + 1, values)) is None
    found = difference((ids, values + 0.1), (ids, values))
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.real
    assert not difference((ids, values), (ids, values)).real


def test_costs_of_later_folders_win(tmp_path: Path) -> None:
    for folder, seconds in (("main", 1.0), ("variant", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.tsv").write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:01\t-\n")
    (tmp_path / "main/mine.tsv").write_text("s\th:m:s\tmax_rss\n4\t0:00:04\t10.5\n")
    found = jobs([tmp_path / "main", tmp_path / "variant", tmp_path / "absent"])
    assert [tuple(job) for job in found] == [("mine", 4.0, 10.5), ("train", 2.0, None)]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(4.21, "4.2 s"), (59.96, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_markup_of_texts() -> None:
    assert escape(EVIL).startswith("&lt;script&gt;")
    assert escape(escape("<")) == "&lt;"
    assert "&lt;i&gt;" in table(["<i>"], [["a"]])
    assert cut("one two three", 8) == "one two …"
    assert (signed(0.1), signed(-0.25), signed(-0.0001)) == ("+0.100", "−0.250", "0.000")


# ---- mining -------------------------------------------------------------------------------------


def write_mined(folder: Path, rows: list[tuple], ranks: list[int | None]) -> Path:
    names = ("query_id", "text_id", "label", "origin", "similarity", "score")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    tables.write(folder / "mined.parquet", "mined", columns | {"rank": ranks})
    return folder / "mined.parquet"


def mined_inputs(folder: Path) -> dict[str, Path]:
    """Three queries: one with a negative above its positive, one near to it, one far; and the counts of a run."""
    write_texts(folder / "texts.parquet", [f"Text {i} {EVIL}" for i in range(9)])
    write_queries(folder / "queries.parquet", [f"Query {i} {EVIL}" for i in range(3)])
    rows = [
        (0, 0, 1, "given", 0.5, None), (0, 3, 0, "mined", 0.75, None), (0, 4, 0, "random", 0.9, None),
        (1, 1, 1, "given", 0.5, None), (1, 5, 0, "mined", 0.48, None), (1, 6, 0, "mined", 0.25, None),
        (2, 2, 1, "given", 0.5, None), (2, 7, 0, "mined", 0.1, None), (2, 8, 0, "given", 0.99, None),
    ]  # fmt: skip
    mined = write_mined(folder, rows, [None, 12, None, None, 13, 14, None, 15, None])
    counts = Funnel()
    counts.add("candidates", "seen", 1000)
    for name, n in {"own": 30, "set_aside": 0, "relative_margin": 170, "not_drawn": 796}.items():
        counts.add("removed", name, n)
    counts.add("candidates", "chosen", 4)
    for name, n in {"mined_for": 3, "short": 1, "still_short": 0}.items():
        counts.add("queries", name, n)
    counts.add("random", "filled", 1)
    counts.write(folder / "mining.parquet", {
        "settings": '{"range_for_sampling": "10-210", "relative_margin": 0.05, "negative_number": 2}',
    })  # fmt: skip
    names = ("texts", "queries", "mining")
    return {name: folder / f"{name}.parquet" for name in names} | {"mined": mined, "pairs": mined}


def written(folder: Path, inputs: dict) -> str:
    report(run="x", inputs=inputs, out=folder / "x.html", settings=ReportConfig())
    text = (folder / "x.html").read_text()
    checked(text)
    return text


def plain(markup: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", markup).split())


def test_the_funnel_adds_up(tmp_path: Path) -> None:
    text = plain(written(tmp_path, mined_inputs(tmp_path)))
    assert "4 hard negatives mined for 3 queries. 1 of the queries (33.3%) had fewer candidates" in text
    assert "and got 1 random passage instead." in text
    assert (
        "candidates of rank 10-210 1,000 100.0% the query&#x27;s positives, and the query itself 30 970 97.0% "
        "positives of queries that were set aside 0 970 97.0% too near to the positive: relative_margin 0.05 170 800 "
        "80.0% not drawn: more than negative_number 2 796 4 0.4% chosen 4 0.4%"
    ) in text


def test_suspected_negatives_by_hand(tmp_path: Path) -> None:
    """0.75 and 0.48 are at least 95% of 0.5; random and given ones are not counted."""
    inputs = mined_inputs(tmp_path)
    assert share_above(inputs["mined"], "similarity", 0.05) == (2, 4)
    assert share_above(inputs["mined"], "similarity", 0.0, strict=True) == (1, 4)
    assert share_above(inputs["mined"], "score", 0.0) == (0, 0)
    text = written(tmp_path, inputs)
    assert "50.0% of the mined negatives (2) are suspected" in text
    boxes = re.findall(r'<details class="example">.*?</details>', text, re.S)
    assert [plain(box).split(" ", 1)[0] for box in boxes] == ["+0.250", "−0.020", "−0.400"]
    assert [box.count('class="suspected"') for box in boxes] == [1, 1, 0]
    assert "Positive, similarity 0.500: Text 0" in plain(boxes[0]) and "similarity 0.750, rank 12: Text 3" in plain(
        boxes[0]
    )
    assert EVIL not in text and "Text 4" not in boxes[0]


def test_what_the_teacher_made_of_mined_negatives(tmp_path: Path) -> None:
    inputs = mined_inputs(tmp_path)
    scored = [
        (0, 0, 1, "given", 0.5, 1.0), (0, 3, 1, "mined", 0.75, 4.0), (1, 1, 1, "given", 0.5, 1.0),
        (1, 6, 0, "mined", 0.25, 1.5), (2, 2, 1, "given", 0.5, 1.0), (2, 7, 0, "mined", 0.1, -2.0),
    ]  # fmt: skip
    write_pairs(tmp_path / "scored.parquet", scored)
    text = written(tmp_path, inputs | {"pairs": tmp_path / "scored.parquet"})
    assert "The teacher scores 50.0% of those that it has scored above the lowest positive." in text
    boxes = [plain(box) for box in re.findall(r'<details class="example">.*?</details>', text, re.S)]
    assert [box.split(" ", 1)[0] for box in boxes] == ["+0.500", "−3.000"]
    assert "similarity 0.250, rank 14, teacher 1.50: Text 6" in boxes[0]
    assert "similarity 0.480, rank 13, left out by the teacher: Text 5" in boxes[0]


def test_no_examples_are_shown_where_none_are_wanted(tmp_path: Path) -> None:
    inputs = mined_inputs(tmp_path)
    report(run="x", inputs=inputs, out=tmp_path / "x.html", settings=ReportConfig(examples=0))
    text = (tmp_path / "x.html").read_text()
    assert 'id="mining"' in text and "Query 0" not in text and "Text 3" not in text


def test_mining_without_its_counts_or_ranks(tmp_path: Path) -> None:
    """Results of an earlier version: the table of pairs alone."""
    inputs = mined_inputs(tmp_path)
    older = tables.read(inputs["mined"], "pairs")
    tables.write(tmp_path / "pairs.parquet", "pairs", older)
    text = written(
        tmp_path, {name: inputs[name] for name in ("texts", "queries")} | {"pairs": tmp_path / "pairs.parquet"}
    )
    assert "4 hard negatives mined, and 1 drawn at random where too few candidates were left." in text
    assert "similarity 0.750: Text 3" in plain(text) and "suspected" in text and "candidates of rank" not in text


def test_the_teacher_section_tells_what_became_of_false_negatives(tmp_path: Path) -> None:
    made = make_training(tmp_path)
    names = {"negatives": 400, "false negatives": 12, "queries without another negative": 1}
    made["scoring"] = tmp_path / "counts.parquet"
    columns = {"measure": ["drop"] * 3, "name": list(names), "value": [float(number) for number in names.values()]}
    tables.write(made["scoring"], "mining", columns)
    report(run="r", inputs=made, out=tmp_path / "index.html", settings=ReportConfig())
    text = (tmp_path / "index.html").read_text()
    assert "12 negatives of 400 scored above the lowest" in text and "mine.max_score_of_teacher: left out" in text
    assert "1 query had no other negative" in text
