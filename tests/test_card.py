"""Model cards: the hub's own reader takes them, and what they say is what the tables and the model say."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from tiny import tiny_bert
from toy import toy_tables

from retune import tables
from retune.experiment import load
from retune.plan import Node, Plan
from retune.report.card import Facts, Value, card
from retune.stages.card import card as stage

RAW = {
    "name": "x",
    "embedder": {"model": "BAAI/bge-small-en-v1.5", "query_instruction": "q: "},
    "ingest": {"train": "a.jsonl", "dev_fraction": 0.1},
    "train": {"temperature": 0.05, "args": {"learning_rate": 1e-5}},
    "evaluate": {"benchmarks": {"held": {"path": "held"}}},
    "variants": {
        "third": {"merge": {"weights": [0.7, 0.3]}},
        "shown": {"report": {"examples": 1}},
        "bare": {"merge": None, "evaluate": None, "embedder": {"model": "./here"}},
    },
}


def metrics(path: Path) -> Path:
    """Means of two models at cutoffs 5, 10 and 100, and a query's own value that is no mean."""
    rows = [
        {"model": model, "benchmark": "held", "measure": measure, "cutoff": cutoff, "query_id": query, "value": value,
         "low": None if query is not None else value - 0.01, "high": None if query is not None else value + 0.01,
         "p_value": 0.0004 if model == "tuned" and query is None else None}
        for model, value in (("base", 0.5), ("tuned", 0.61234))
        for measure in ("MRR", "nDCG", "Recall", "Hit")
        for cutoff in (5, 10, 100)
        for query in (None, 7)
    ]  # fmt: skip
    tables.write(path, "metrics", {name: [row[name] for row in rows] for name in rows[0]})
    return path


@pytest.fixture
def made(tmp_path) -> dict:
    model = tiny_bert(tmp_path / "train/model")
    prompts = {"prompts": {"query": "ask | it: ", "document": ""}}
    (model / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    found = toy_tables(tmp_path, 24, 3, split=["dev" if i < 4 else "train" for i in range(24)])
    plan = Plan(load(RAW))
    return {
        "kind": "tuned", "name": "x tuned", "model": model, "settings": plan.settings(Node("x", "card", ("train",))),
        "queries": found["queries"], "pairs": found["pairs"], "metrics": metrics(tmp_path / "metrics.parquet"),
        "weights": None, "out": tmp_path / "train/README.md",
    }  # fmt: skip


def test_the_hub_reads_the_metadata(made):
    stage(**made)
    data = ModelCard.load(made["out"]).data
    assert data.library_name == "sentence-transformers" and data.pipeline_tag == "sentence-similarity"
    assert data.base_model == "BAAI/bge-small-en-v1.5" and data.base_model_relation == "finetune"
    assert {"sentence-transformers", "feature-extraction", "tuned"} <= set(data.tags)
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert found == {("held", f"{name}"): 0.61234 for name in ("ndcg_at_10", "mrr_at_10", "recall_at_100")}


def test_what_it_says(made):
    stage(**made)
    text = made["out"].read_text()
    assert "fine-tuned from `BAAI/bge-small-en-v1.5`" in text and "vectors of 32 dimensions" in text
    assert "| toy | 24 | 4 | 24 | 72 |" in text
    assert "| **tuned, this one** | 0.6123 [0.602, 0.622], p < .001 |" in text
    assert "| base | 0.5000 [0.490, 0.510] |" in text and "nDCG@10" in text and "Hit@" not in text and "@5" not in text
    assert r"| a query | `ask \| it: ` |" in text and "| a passage | nothing |" in text
    assert "the mean of the tokens' vectors, scaled to length 1; similarity is the cosine, texts of up to 64" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["train"] == {"temperature": 0.05, "args": {"learning_rate": 1e-5}}
    assert settings["ingest"]["dev_fraction"] == 0.1 and "report" not in settings and "merge" not in settings
    before = made["out"].read_bytes()
    stage(**made)
    assert made["out"].read_bytes() == before


def test_its_way_to_load_the_model_runs(made):
    stage(**made)
    code = made["out"].read_text().split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(code.replace("path/to/this/folder", str(made["out"].parent)), found)
    assert found["queries"].shape == (1, 32) and found["passages"].shape == (2, 32)
    asked = SentenceTransformer(str(made["model"]), device="cpu").encode(["ask | it: what is asked"])
    assert abs(asked - found["queries"]).max() < 1e-6


def test_a_card_within_the_models_folder_names_that(made):
    stage(**made | {"out": made["model"] / "README.md"})
    code = (made["model"] / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert 'SentenceTransformer("path/to/this/folder")' in code
    found: dict = {}
    exec(code.replace("path/to/this/folder", str(made["model"])), found)
    assert found["queries"].shape == (1, 32)


def test_a_merged_model_tells_its_weights(made, tmp_path):
    plan = Plan(load(RAW))
    settings = plan.settings(Node("x.third", "card", ("merge",)))
    stage(**made | {"kind": "merged", "name": "x.third merged", "settings": settings, "metrics": None})
    text = made["out"].read_text()
    assert "| 0.7 | `BAAI/bge-small-en-v1.5` |\n| 0.3 | `results/x/train/model` |" in text and "## Measured" not in text
    assert ModelCard.load(made["out"]).data.base_model_relation == "merge"
    rows = {"mixture": [0, 1], "weights": [[1, 0], [0.25, 0.75]], "collection": ["dev"] * 2, "measure": ["nDCG@10"] * 2,
            "value": [0.1, 0.2], "chosen": [False, True]}  # fmt: skip
    tables.write(tmp_path / "weights.parquet", "weights", rows)
    weights = tmp_path / "weights.parquet"
    stage(**made | {"kind": "merged", "settings": settings | {"weights": None}, "weights": weights})
    assert "| 0.25 | `BAAI/bge-small-en-v1.5` |\n| 0.75 | `results/x/train/model` |" in made["out"].read_text()


def test_a_base_that_another_variant_makes_is_named_by_its_path():
    raw = RAW | {"variants": {"second": {"embedder": {"model": "variant:x"}}}}
    plan = Plan(load(raw))
    assert plan.settings(Node("x.second", "card", ("train",)))["base"] == "results/x/train/model"
    merged = plan.settings(Node("x.second", "card", ("merge",)))
    assert merged["models"] == ["results/x/train/model", "results/x.second/train/model"]


@pytest.mark.parametrize("base", ["package:some_model", "./here", "variant:hot", "models/a/b"])
def test_a_base_that_is_not_on_the_hub_is_no_link(made, base):
    stage(**made | {"settings": made["settings"] | {"base": base}})
    found = ModelCard.load(made["out"])
    assert found.data.base_model is None and f"`{base}`" in found.text


def test_values_without_an_interval_or_a_test():
    facts = Facts("n", "tuned", "b", None, 8, None, False, None, {}, {}, values=[Value("s", "tuned", "MRR@10", 0.5)])
    text = card(facts)
    assert "## Settings" not in text and "## Data" not in text
    assert "| **tuned, this one** | 0.5000 |" in text and "similarity is the dot product." in text


def test_every_model_that_is_made_gets_a_card_where_it_lies():
    plan = Plan(load(RAW))
    cards = [plan.path(node) for node in plan.targets() if node.rule == "card"]
    assert cards == [
        "results/x/train/README.md", "results/x/merge/README.md", "results/x.third/merge/README.md",
        "results/x.bare/train/README.md",
    ]  # fmt: skip
    assert Node("x", "metrics") in plan.parents(Node("x", "card", ("train",)))
    assert {node.rule for node in plan.parents(Node("x.bare", "card", ("train",)))} == {"train", "ingest", "mine"}
