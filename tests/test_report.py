"""The report: its numbers against hand-made tables, its markup, and what it says of guard sets, variants and costs."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reported import (
    EVIL,
    GUARDS,
    make_benchmark,
    make_metrics,
    make_run,
    make_training,
    write_costs,
    write_pairs,
    write_queries,
    write_texts,
)

from retune import tables
from retune.config import ReportConfig
from retune.data.funnel import Funnel
from retune.report.costs import costs, duration, jobs
from retune.report.measures import Difference, Metrics, difference, headline, verdicts
from retune.report.mining import share_above
from retune.report.page import cut, escape, signed, table
from retune.report.scatter import BUBBLES, bubbles
from retune.report.spread import bars, nice_step, quantiles
from retune.stages.report import report

VOID = {"meta", "link", "br", "img", "hr", "input"}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, str, dict]:
    folder = tmp_path_factory.mktemp("report")
    inputs = make_run(folder)
    out = folder / "out" / "index.html"
    report(run="demo", inputs=inputs, out=out, settings=ReportConfig(examples=4), guards=GUARDS)
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
    report(run="demo", inputs=inputs, out=tmp_path / "again.html", settings=ReportConfig(examples=4), guards=GUARDS)
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


def test_a_difference_that_cannot_be_read_is_none() -> None:
    values = {"base": {"value": 0.75061}, "tuned": {"value": 0.75048}, "merged": {"value": 0.74949}}
    p_values = {"base": None, "tuned": 0.99, "merged": 0.6}
    found = {
        name: p and Difference(values[name]["value"] - 0.75061, -0.014, 0.014, p, 297) for name, p in p_values.items()
    }
    said = verdicts("manuals", "nDCG@10", values, found)
    assert [text.partition(" (")[0] for text in said] == [
        "Tuning lowered nDCG@10 on manuals from 0.751 to 0.750",
        "Merging the tuned model with base lowered nDCG@10 on manuals from 0.751 to 0.749",
    ]
    values["tuned"]["value"] = 0.75055
    assert verdicts("manuals", "nDCG@10", values, found)[0].startswith(
        "Tuning left nDCG@10 on manuals at 0.751 (0.000,"
    )


def test_each_head_is_compared_with_base_by_the_same_head(tmp_path: Path) -> None:
    quality = {"base": 0.8, "tuned": 0.8, "base-dense+sparse": 0.2, "tuned-dense+sparse": 0.9}
    found = {"target": make_benchmark(tmp_path / "b", 3, quality, n=24)}
    inputs = make_training(tmp_path, 30) | {"metrics": make_metrics(tmp_path, found)}
    report(run="x", inputs=inputs, out=tmp_path / "x.html", settings=ReportConfig())
    text, metrics = (tmp_path / "x.html").read_text(), Metrics(inputs["metrics"])
    base, tuned = (metrics.mean("target", model, ("nDCG", 10))["value"] for model in list(quality)[2:])
    assert f"Tuning raised nDCG@10 of dense+sparse on target from {base:.3f} to {tuned:.3f} (" in text
    assert f"tuned-dense+sparse</span><b>{tuned:.3f}</b>" in text
    assert metrics.mean("target", "base-dense+sparse", ("nDCG", 10))["p_value"] is None
    assert "against base ranked by the same head." in text


def test_variant_is_compared_honestly(full) -> None:
    text = full[1]
    assert re.search(r"<b>demo.no-teacher</b> against <b>demo</b>, tuned, nDCG@10 on target: worse \(−0\.\d+", text)


def test_variants_stand_side_by_side_with_intervals_and_p(full) -> None:
    """base, which is the same for both runs, once; then each run's models."""
    _, text, inputs = full
    body = text[text.index('<section id="variants">') : text.index('<section id="queries">')]
    rows = [plain(row) for row in re.findall(r'<tr><th scope="row">(.*?)</tr>', body)]
    assert [row.split(" 0.")[0] for row in rows] == [
        "base", "demo tuned", "demo merged", "demo.no-teacher tuned", "demo.no-teacher merged",
    ]  # fmt: skip
    other = Metrics(inputs["variants"]["demo.no-teacher"]).mean("target", "tuned", ("MRR", 10))
    cells = f"{other['value']:.3f} [{other['low']:.3f}, {other['high']:.3f}] p "
    assert cells in rows[3] and "a significant loss" in rows[3]


def test_guard_sets_are_named_as_such_and_come_last(full) -> None:
    _, text, inputs = full
    titles = re.findall(r'<h3>(\w+) <span class="badge">guard set</span>', text)
    assert set(titles) == {"guard"} and len(titles) == 3  # result, metrics, queries
    body = headline(Metrics(inputs["metrics"], ["target"])).body
    assert [plain(title) for title in re.findall("<h3>.*?</h3>", body)] == ["guard", "target guard set"]
    assert body.index("on guard from") < body.index("on target from")
    assert "guard set" not in headline(Metrics(inputs["metrics"])).body


def test_every_query_is_in_the_plot(full) -> None:
    """Each bubble says how many it stands for; together they are all, above the line those that got better."""
    _, text, inputs = full
    metrics = Metrics(inputs["metrics"])
    before, after = (metrics.queries("target", model, ("nDCG", 10))[1] for model in ("base", "tuned"))
    drawn = text[text.index("60 queries, tuned against base") :]
    drawn = drawn[: drawn.index("</figure>")]
    change = np.sign(after - before)
    for name, sign in {"better": 1, "worse": -1, "the same": 0}.items():
        n = int((change == sign).sum())
        assert (f"{name}: {n}<" in drawn) == bool(n)
    titles = [html.unescape(title) for title in re.findall(r"<title>(.*?)</title>", drawn, re.S)]
    assert sum(int(found[1]) if (found := re.match(r"(\d+) queries, ", title)) else 1 for title in titles) == 60
    single = [title for title in titles if ": Which passage is on topic" in title]
    assert single
    for title in single:
        old, new, topic = re.match(r"(\d\.\d+) → (\d\.\d+): Which passage is on topic (\d+)\?", title).groups()
        assert (old, new) == (f"{before[int(topic)]:.3f}", f"{after[int(topic)]:.3f}")


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


# ---- the numbers --------------------------------------------------------------------------------


def test_bubbles_by_hand() -> None:
    before = np.array([0.0, 0.5, 0.5, 0.004, 1.0, 0.5])
    after = np.array([1.0, 0.5, 0.504, 1.0, 0.0, 0.5])
    found = [
        (one.sign, round(one.before, 6), round(one.after, 6), one.members.tolist()) for one in bubbles(before, after)
    ]
    assert found[:2] == [(0, 0.5, 0.5, [1, 5]), (1, 0.002, 1.0, [0, 3])]
    assert sorted(found[2:]) == [(-1, 1.0, 0.0, [4]), (1, 0.5, 0.504, [2])]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 9))
def test_bubbles_lose_no_query_and_are_not_too_many(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = rng.random(n), rng.random(n)
    found = bubbles(before, after)
    assert sorted(np.concatenate([one.members for one in found])) == list(range(n))
    assert len(found) <= max(BUBBLES, 2 * 21 * 21)  # the coarsest grid, above and below the diagonal
    for one in found:
        assert (np.sign(after - before)[one.members] == one.sign).all()
        assert one.before == pytest.approx(before[one.members].mean())


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


def test_memory_that_was_sampled_too_soon_is_not_shown(tmp_path: Path) -> None:
    """Rows as Snakemake writes them: of a job that was over before it was looked at, before it worked, and so on."""
    head = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
    measured = {
        "score": "0.1\t0:00:00" + "\tNA" * 8,
        "merge": "0.43\t0:00:00\t6.60\t12.24\t1.98\t3.19\t0.00\t0.00\t0.00\t0.00",
        "ingest": "0.87\t0:00:00\t48.44\t122.71\t28.24\t34.60\t0.00\t0.00\t0.00\t0.49",
        "metrics": "1.20\t0:00:01\t161.40\t1616.66\t144.71\t152.44\t0.00\t0.04\t41.60\t0.99",
        "train": "173.77\t0:02:53\t2697.52\t4853.15\t2675.33\t2685.76\t1.39\t0.14\t182.54\t317.73",
    }
    for name, row in measured.items():
        (tmp_path / f"{name}.tsv").write_text(head + row + "\n")
    found = {job.name: job.memory for job in jobs([tmp_path])}
    assert found == {"score": None, "merge": None, "ingest": None, "metrics": 161.4, "train": 2697.52}
    assert "7 MiB" not in costs([tmp_path]).body and "2.6 GiB" in costs([tmp_path]).body


def test_costs_of_later_folders_win(tmp_path: Path) -> None:
    for folder, seconds in (("main", 1.0), ("variant", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.tsv").write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:01\t-\n")
    (tmp_path / "main/mine.tsv").write_text("s\th:m:s\tmax_rss\n4\t0:00:04\t10.5\n")
    found = jobs([tmp_path / "main", tmp_path / "variant", tmp_path / "absent"])
    assert [tuple(job) for job in found] == [("mine", 4.0, 10.5), ("train", 2.0, None)]


def vectors(path: Path, n: int, first: int = 0) -> Path:
    with tables.writer(path, tables.embeddings_schema(2, "float16"), {"max_length": "16"}) as out:
        rows = np.zeros((n, 2), np.float16)
        out.write({"id": np.arange(first, first + n), "vector": tables.vector_array(rows)})
    return path


def test_a_variant_does_not_pay_for_stages_that_it_is_without(tmp_path: Path) -> None:
    inputs = mined_inputs(tmp_path) | {"costs": [tmp_path / "costs"], "config": tmp_path / "config.yaml"}
    write_costs(tmp_path / "costs", dict.fromkeys(("train", "fit", "scores.00-of-01", "score"), "2\t-\t-"))
    (tmp_path / "config.yaml").write_text("embedder: {model: org/model}\nscore: null\n")
    assert "1 job, 2.0 s of work in all." in written(tmp_path, inputs)
    (tmp_path / "config.yaml").write_text(
        "embedder: {model: org/a}\nscore: {batch_tokens: null}\nreranker: {model: org/b}\n"
    )
    text = written(tmp_path, inputs)
    assert "4 jobs, 8.0 s of work in all" in text
    assert "Base model org/a · 3 queries of notes, docs · teacher org/b" in plain(text)


def test_throughput_by_hand(tmp_path: Path) -> None:
    tables.write(tmp_path / "lengths.parquet", "lengths", {"text_id": range(5), "n_tokens": [10, 20, 30, 4, 6]})
    names = ["embed.base.texts-00-of-02", "embed.base.texts-01-of-02", "embed.base.queries", "embed.tuned.held.queries"]
    worked = {names[0]: vectors(tmp_path / "0.parquet", 2), names[1]: vectors(tmp_path / "1.parquet", 3, 2),
              names[2]: vectors(tmp_path / "q.parquet", 40), names[3]: tmp_path / "absent.parquet",
              "split": tmp_path / "lengths.parquet", "mine": tmp_path / "mining.parquet"}  # fmt: skip
    counts = Funnel()
    counts.add("queries", "mined_for", 30)
    counts.write(tmp_path / "mining.parquet", {})
    rows = [("train", "tokens_per_second", [None, 100.0, 300.0])]
    absent = {field.name: [None] * 3 for field in tables.TABLES["history"] if field.nullable}
    for name, column, values in rows:
        tables.write(tmp_path / f"{name}.parquet", "history", absent | {
            "step": [1, 2, 3], "epoch": [0.1, 0.2, 0.3], column: values})  # fmt: skip
    times = {names[0]: "2", names[1]: "2", names[2]: "5", names[3]: "100", "split": "0.5", "mine": "10", "train": "9",
             "merge": "1"}  # fmt: skip
    write_costs(tmp_path / "costs", {name: f"{seconds}\t-\t{1 + len(name)}" for name, seconds in times.items()})
    shown = costs([tmp_path / "costs"], worked, {"train": tmp_path / "train.parquet"})
    found = [[plain(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
             for row in re.findall(r'<tr><th scope="row">.*?</tr>', shown.body)]  # fmt: skip
    # the passages' tokens are cut at 16: 10 + 16 and 16 + 4 + 6 in 4 s; 45 texts in 9 s
    assert found == [
        ["split", "0.5 s", "6 MiB", "140 tokens/s"],
        ["embed 4 jobs", "1 min 49 s", "26 MiB", "5.0 texts/s 13 tokens/s"],
        ["mine", "10.0 s", "5 MiB", "3.0 queries/s"],
        ["train", "9.0 s", "6 MiB", "150 tokens/s"],
        ["merge", "1.0 s", "6 MiB", ""],
        ["all 8 jobs", "2 min 10 s", "26 MiB", ""],
    ]


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
