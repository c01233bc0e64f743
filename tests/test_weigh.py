"""Merging weights from examples and by search: by hand, by other means, and what is written down of them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny import tiny_bert
from toy import toy_tables

from retune import tables
from retune.cocktail import weigh
from retune.config import EmbedderConfig, SearchConfig
from retune.data import trial
from retune.data.devset import DevSet
from retune.experiment import ConfigError, load
from retune.model.embedder import Embedder
from retune.model.mixture import mix
from retune.plan import Node, Plan
from retune.report.merging import merging
from retune.runtime import UserError
from retune.stages.merge import merge
from retune.stages.weigh import by_examples, by_search, choose, grid

N = 24
EMBEDDER = EmbedderConfig(model="mixture")
EMBEDDERS = [EMBEDDER] * 2
ROWS = [
    {"query": "bar cost", "pos": ["bar cost din"], "neg": ["fun gelt", "hip lox lom"]},
    {"query": "mux gen", "pos": ["mux gen band"], "neg": ["bar cost din"]},
]


@pytest.fixture
def pair(tmp_path):
    return tiny_bert(tmp_path / "a", 1), tiny_bert(tmp_path / "b", 2)


@pytest.fixture
def aside(tmp_path):
    return toy_tables(tmp_path / "data", N, split=["dev" if i % 2 else "train" for i in range(N)])


def written(path: Path) -> list[dict]:
    return tables.read(path, "weights").to_pylist()


# ---- the grid, and the choice -------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 2, 4, 5, 10]))
def test_the_grid_is_whole(models, steps):
    found = grid(models, 1 / steps)
    assert len(found) == math.comb(steps + models - 1, models - 1) == len(set(map(tuple, found)))
    assert all(sum(one) == pytest.approx(1) and min(one) >= 0 for one in found)
    assert found[0] == [1.0] + [0.0] * (models - 1) and found[-1] == [0.0] * (models - 1) + [1.0]


def test_the_grid_of_two_by_hand():
    assert grid(2, 0.25) == [[1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 1]]
    assert grid(3, 0.5) == [[1, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [(0.005, 0), (0.01, 1), (0.05, 2), (1.0, 3)],
)
def test_the_best_mixture_that_loses_no_more_than_it_may(allowed, expected):
    """On dev .5 .6 .7 .7 .7; on guard sets at most 0, .01, .05, .2 and .2 less than the first."""
    dev, one, two = [0.5, 0.6, 0.7, 0.8, 0.8], [0.4, 0.39, 0.4, 0.2, 0.2], [0.9, 0.95, 0.85, 0.9, 0.9]
    rows = [
        {"mixture": mixture, "collection": name, "value": value}
        for mixture, values in enumerate(zip(dev, one, two, strict=True))
        for name, value in zip(("dev", "one", "two"), values, strict=True)
    ]
    assert choose(rows, allowed) == expected
    alone = [row for row in rows if row["collection"] == "dev"]
    assert choose(alone, 0) == 3  # no guard set; of equal ones the first


# ---- what mixtures are tried on -----------------------------------------------------------------


def test_a_guard_sets_queries_all_count(tmp_path, aside):
    guard = toy_tables(tmp_path / "guard", 8, seed=5, split=["test"] * 8)
    found = trial.collections(aside, {"held": guard}, seed=1, queries=100, passages=4)
    assert list(found) == ["dev", "held"]
    assert len(found["dev"].queries) == N // 2 and len(found["held"].queries) == 8
    assert tables.read(guard["queries"], "queries")["split"].to_pylist() == ["test"] * 8
    few = trial.collections(aside, {"held": guard}, seed=1, queries=3, passages=4)
    assert len(few["dev"].queries) == len(few["held"].queries) == 3


def test_nothing_set_aside_is_said(tmp_path):
    with pytest.raises(UserError, match=r"ingest\.dev_fraction set no query aside"):
        trial.collections(toy_tables(tmp_path), {}, seed=1, queries=9, passages=9)


def test_a_guard_set_without_a_passage_of_the_grade_that_counts_is_said(tmp_path, aside):
    guard = toy_tables(tmp_path / "guard", 8, split=["test"] * 8)
    with pytest.raises(UserError, match="held: no query has one of grade 2 or higher"):
        trial.collections(aside, {"held": guard}, {"held": 2}, seed=1, queries=9, passages=9)


@pytest.mark.parametrize(
    ("measure", "expected"), [("MRR@10", 0.75), ("Hit@1", 0.5), ("nDCG@10", (1 + 0.6309297536) / 2)]
)
def test_measures_by_hand(measure, expected):
    """The first query's positive comes first, the second's comes second, behind one that is as near but earlier."""

    class Fixed:
        def encode_texts(self, texts, kind, prompts=None):
            places = {"q": [1, 0], "r": [0, 1], "a": [1, 0], "b": [0, 1], "c": [0, 1]}
            return np.array([places[text] for text in texts], np.float32)

    collection = DevSet(
        ["q", "r"], [None, None], ["a", "b", "c"], np.array([0, 1]), np.array([0, 2]), np.ones(2, np.int8)
    )
    assert trial.value(Fixed(), collection, measure) == pytest.approx(expected)


# ---- search -------------------------------------------------------------------------------------


def ndcg_by_loops(folder: Path, collection: DevSet) -> float:
    """nDCG@10 through sentence-transformers, one relevant passage a query."""
    model = SentenceTransformer(str(folder), device="cpu")
    scores = model.encode(collection.queries) @ model.encode(collection.passages).T
    gains = []
    for row, column in zip(collection.rows, collection.columns, strict=True):
        rank = 1 + int((scores[row] > scores[row, column]).sum())
        gains.append(1 / math.log2(1 + rank) if rank <= 10 else 0.0)
    return float(np.mean(gains))


def test_search_measures_every_mixture_and_writes_it_down(tmp_path, pair, aside):
    guard = toy_tables(tmp_path / "guard", 8, seed=5, split=["test"] * 8)
    search = SearchConfig(step=0.5, passages=20, max_guard_loss=0.0)
    options = {"models": pair, "aside": aside, "guards": {"held": guard}, "settings": search, "embedder": EMBEDDER}
    out = tmp_path / "merge/weights.parquet"
    by_search(**options, seed=3, out=out)
    rows = written(out)
    assert [(row["mixture"], row["collection"]) for row in rows] == [
        (mixture, name) for mixture in range(3) for name in ("dev", "held")
    ]
    assert {row["measure"] for row in rows} == {"nDCG@10"} and [path.name for path in out.parent.iterdir()] == [
        out.name
    ]
    collections = trial.collections(aside, {"held": guard}, seed=3, queries=1000, passages=20)
    for row in rows:
        mix(pair, row["weights"], tmp_path / "mixed")
        expected = ndcg_by_loops(tmp_path / "mixed", collections[row["collection"]])
        assert row["value"] == pytest.approx(expected, abs=1e-9)
    assert len({row["value"] for row in rows if row["collection"] == "dev"}) > 1
    best = choose(rows, 0.0)
    assert {row["mixture"] for row in rows if row["chosen"]} == {best}
    assert json.loads(tables.metadata(out)["models"]) == [str(folder) for folder in pair]
    before = out.read_bytes()
    by_search(**options, seed=3, out=out)
    assert out.read_bytes() == before


def test_the_config_says_how_mixtures_are_read(tmp_path, pair, aside):
    values = []
    for query_instruction in (None, "fun gelt hip lox lom bar"):
        embedder = EMBEDDER.model_copy(update={"query_instruction": query_instruction})
        out = tmp_path / "weights.parquet"
        search = SearchConfig(step=0.5)
        by_search(models=pair, aside=aside, guards={}, settings=search, embedder=embedder, seed=3, out=out)
        values.append([row["value"] for row in written(out)])
    assert values[0] != values[1]


# ---- examples -----------------------------------------------------------------------------------


def test_weights_from_examples_are_the_functions(tmp_path, pair):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "weights.parquet"
    by_examples(models=pair, examples=tmp_path / "few.jsonl", temperature=0.5, embedders=EMBEDDERS, out=out)
    rows = written(out)
    assert [row["weights"] for row in rows[:2]] == [[1, 0], [0, 1]]
    assert [row["measure"] for row in rows] == ["loss", "loss", None] and [row["chosen"] for row in rows] == [0, 0, 1]
    powers = [math.exp(-row["value"] / 0.5) for row in rows[:2]]
    assert rows[2]["weights"] == pytest.approx([power / sum(powers) for power in powers])
    assert rows[2]["weights"] == weigh([str(folder) for folder in pair], "encoder", list(enumerate(ROWS)), 0.5)

    merge(models=pair, weights=out, out=tmp_path / "merged")
    name = "encoder.layer.0.output.dense.weight"
    one, two, found = (load_file(f / "model.safetensors")[name].double() for f in (*pair, tmp_path / "merged"))
    exact = rows[2]["weights"][0] * one + rows[2]["weights"][1] * two
    assert (found - exact).abs().max() < 1e-7


def test_a_bad_example_is_named_with_its_line(tmp_path, pair):
    (tmp_path / "few.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"query": "bar"}\n')
    with pytest.raises(UserError, match=r"few\.jsonl:2: pos: expected a list of strings, the column is missing"):
        by_examples(
            models=pair, examples=tmp_path / "few.jsonl", temperature=5, embedders=EMBEDDERS, out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_pooled_by_the_config(tmp_path, pair):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    losses = []
    for pooling in ("mean", "cls"):
        embedder = EMBEDDER.model_copy(update={"pooling": pooling})
        out = tmp_path / "weights.parquet"
        by_examples(models=pair, examples=tmp_path / "few.jsonl", temperature=5, embedders=[embedder] * 2, out=out)
        losses.append(written(out)[0]["value"])
    assert losses[0] != losses[1] and Embedder.load(pair[0]).card.pooling == "mean"


# ---- the report ---------------------------------------------------------------------------------


def test_the_report_tells_what_was_tried(tmp_path):
    rows = {
        "mixture": [0, 0, 1, 1, 2, 2], "weights": [[1, 0]] * 2 + [[0.5, 0.5]] * 2 + [[0, 1]] * 2,
        "collection": ["dev", "held"] * 3, "measure": ["nDCG@10"] * 6, "value": [0.1, 0.2, 0.31416, 0.4, 0.5, 0.6],
        "chosen": [False] * 2 + [True] * 2 + [False] * 2,
    }  # fmt: skip
    path = tmp_path / "weights.parquet"
    tables.write(path, "weights", rows, {"models": json.dumps(["<base>", "tuned"])})
    body = merging(path).body
    assert "0.5 × &lt;base&gt; + 0.5 × tuned" in body and '<td class="n">0.3142</td>' in body
    assert body.count("<svg") == 2 and body.count("<tr>") == 4 and "nDCG@10, held" in body


def test_the_report_of_weights_from_examples(tmp_path):
    rows = {
        "mixture": [0, 1, 2], "weights": [[1, 0], [0, 1], [0.6, 0.4]], "collection": ["examples"] * 2 + [None],
        "measure": ["loss", "loss", None], "value": [1.0, 2.0, None], "chosen": [False, False, True],
    }  # fmt: skip
    path = tmp_path / "weights.parquet"
    tables.write(path, "weights", rows, {"models": json.dumps(["base", "tuned"])})
    body = merging(path).body
    assert "0.6 × base + 0.4 × tuned" in body and "loss, examples" in body and "<svg" not in body


# ---- config and plan ----------------------------------------------------------------------------

RAW = {
    "name": "x",
    "embedder": {"model": "m", "query_instruction": "q: "},
    "ingest": {"train": "a.jsonl", "dev_fraction": 0.1},
    "merge": {"search": {"step": 0.25}},
    "evaluate": {"benchmarks": {"held": {"path": "held"}, "general": {"path": "general", "guard": True}}},
    "variants": {
        "plain": {"merge": {"search": None}},
        "few": {"merge": {"search": None, "examples": "few.jsonl"}},
        "warm": {"merge": {"search": None, "examples": "few.jsonl", "temperature": 1}},
        "same": {"report": {"examples": 2}},
        "unguarded": {"evaluate": {"benchmarks": {"general": {"guard": False}}}},
    },
}


def test_weights_that_are_found_come_before_merging():
    plan = Plan(load(RAW))
    weighed, merged = Node("x", "weigh"), Node("x", "merge")
    assert plan.path(weighed) == "results/x/merge/weights.parquet"
    assert set(plan.parents(weighed)) == {Node("x", "train"), Node("x", "ingest"), Node("x", "benchmark", ("general",))}
    assert weighed in plan.parents(merged)
    assert plan.settings(weighed)["settings"]["models"] == ["m", "results/x/train/model"]
    assert plan.settings(merged)["settings"] == {"models": ["m", "results/x/train/model"], "weights": None}
    assert Node("x.plain", "weigh") not in plan.parents(Node("x.plain", "merge")) and not plan.makes(
        Node("x.plain", "weigh")
    )
    assert plan.config("x.plain").merge.weights == [0.5, 0.5]
    assert Node("x", "ingest") not in plan.parents(Node("x.few", "weigh"))
    homes = {run: plan.path(Node(run, "merge")).split("/")[1] for run in plan.runs}
    assert homes == {run: run for run in plan.runs} | {"x.same": "x"}
    assert plan.path(Node("x.unguarded", "benchmark", ("general",))).startswith("results/x/")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"weights": [0.5, 0.5], "examples": "a"}, "weights, examples: expected one of them"),
        ({"weights": [0.5, 0.5], "search": {}}, "weights, search: expected one of them"),
        ({"examples": "a", "search": {}}, "examples, search: expected one of them"),
        ({"weights": [1]}, "expected one weight a model, found 1 for 2"),
        ({"search": {"step": 0.3}}, "expected one that goes into 1"),
        ({"search": {"measure": "nDCG"}}, "merge.search.measure: "),
        ({"models": ["base"], "search": {}}, "expected at least two models"),
    ],
)
def test_mistakes_in_the_config(section, message):
    with pytest.raises(ConfigError, match=message):
        load(RAW | {"merge": section, "variants": {}})


def test_search_needs_queries_that_are_set_aside():
    with pytest.raises(ConfigError, match=r"merge\.search: it needs queries that are set aside"):
        load(RAW | {"ingest": {"train": "a.jsonl"}, "variants": {}})


def test_the_resolved_config_is_a_config():
    for run in load(RAW).runs.values():
        again = load(run.model_dump(mode="json", exclude={"variants"})).runs["x"]
        assert again.merge == run.merge
