"""Paths, settings and sharing of artifacts, without Snakemake."""

import pytest

from retune.experiment import load
from retune.plan import TRAIN, Node, Plan

RAW = {
    "name": "x",
    "embedder": {"model": "m"},
    "reranker": {"model": "r", "fit": {}},
    "ingest": {"train": "a.jsonl"},
    "embed": {"shards": 2},
    "evaluate": {"benchmarks": {"b": {"path": "bench"}}},
    "variants": {
        "hot": {"train": {"temperature": 0.5}},
        "hotter": {"train": {"temperature": 0.5}, "report": {"examples": 3}},
        "again": {"mine": {"embedder": {"model": "variant:hot"}}},
        "longer": {"embedder": {"query_max_length": 99}},
        "bare": {"score": None, "merge": None},
    },
}


@pytest.fixture
def plan() -> Plan:
    return Plan(load(RAW))


def path(plan: Plan, run: str, rule: str, *labels: str) -> str:
    return plan.path(Node(run, rule, labels))


def test_paths_of_the_contract(plan: Plan) -> None:
    assert path(plan, "x", "mine") == "results/x/mine/pairs.parquet"
    assert path(plan, "x", "score") == "results/x/score/pairs.parquet"
    assert path(plan, "x", "train") == "results/x/train/model"
    assert path(plan, "x", "merge") == "results/x/merge/model"
    assert path(plan, "x", "embed", "base", TRAIN, "texts-00-of-02") == "results/x/embed/base/texts-00-of-02.parquet"
    assert path(plan, "x", "evaluate", "b", "tuned") == "results/x/evaluate/b/tuned.run.parquet"
    assert path(plan, "x", "metrics") == "results/x/evaluate/metrics.parquet"
    assert path(plan, "x", "report") == "results/x/report/index.html"


def test_a_variant_shares_what_is_equal(plan: Plan) -> None:
    assert path(plan, "x.hot", "mine") == path(plan, "x", "mine")
    assert path(plan, "x.hot", "score") == path(plan, "x", "score")
    assert path(plan, "x.hot", "train") == "results/x.hot/train/model"
    assert path(plan, "x.hotter", "train") == "results/x.hot/train/model"  # equal to an earlier variant
    assert path(plan, "x.hotter", "evaluate", "b", "merged") == "results/x.hot/evaluate/b/merged.run.parquet"
    assert path(plan, "x.hotter", "report") == "results/x.hotter/report/index.html"
    assert path(plan, "x.hot", "evaluate", "b", "base") == path(plan, "x", "evaluate", "b", "base")
    assert path(plan, "x.bare", "train") == "results/x.bare/train/model"  # other pairs, so another model


def test_a_longer_query_leaves_the_texts_vectors_alone(plan: Plan) -> None:
    assert path(plan, "x.longer", "embed", "base", TRAIN, "texts-00-of-02").startswith("results/x/")
    assert path(plan, "x.longer", "embed", "base", TRAIN, "queries").startswith("results/x.longer/")
    assert path(plan, "x.longer", "mine").startswith("results/x.longer/")


def test_a_second_round_mines_with_the_tuned_model(plan: Plan) -> None:
    node = Node("x.again", "embed", ("miner", TRAIN, "queries"))
    assert plan.settings(node)["embedder"]["model"] == "results/x.hot/train/model"
    assert Node("x.hot", "train") in plan.parents(node)
    assert path(plan, "x.again", "mine") == "results/x.again/mine/pairs.parquet"


def test_what_the_base_is_put_together_from_is_in_the_tuned_model() -> None:
    others = {"peft_path": "adapters", "config_name": "c", "tokenizer_name": "t"}
    plan = Plan(load(RAW | {"embedder": {"model": "m"} | others, "merge": None, "variants": {}}))
    base, tuned = plan.embedder("x", "base"), plan.embedder("x", "tuned")
    assert {key: base[key] for key in others} == others and base["model"] == "m"
    assert {key: tuned[key] for key in others} == dict.fromkeys(others) and tuned["model"] == "results/x/train/model"
    assert plan.settings(Node("x", "train"))["embedder"] == base
    assert plan.settings(Node("x", "split"))["embedder"]["tokenizer_name"] == "t"


def test_models_of_other_experiments_are_told_apart_by_their_paths() -> None:
    """They lie under results/ too, but are made elsewhere: nothing but the path says which one it is."""
    others = {name: {"embedder": {"model": f"results/{name}/train/model"}} for name in ("one", "two")}
    plan = Plan(load(RAW | {"variants": others}))
    for node in (("mine",), ("train",), ("embed", "base", TRAIN, "queries"), ("evaluate", "b", "base")):
        assert path(plan, "x.one", *node).startswith("results/x.one/")
        assert path(plan, "x.two", *node).startswith("results/x.two/")
    assert path(plan, "x.two", "ingest").startswith("results/x/")


def test_stages_that_are_off_have_no_targets(plan: Plan) -> None:
    rules = {node.rule for node in plan.reported("x.bare")}
    assert not rules & {"merge", "score", "fit"}
    assert plan.models("x.bare") == ["base", "tuned"]
    assert plan.pairs("x.bare").rule == "mine"


def test_rules_get_their_own_settings_only(plan: Plan) -> None:
    assert set(plan.settings(Node("x", "mine"))) == {"settings", "reranker", "seed"}
    embed = plan.settings(Node("x", "embed", ("base", TRAIN, "queries")))
    assert not [key for key in embed["embedder"] if key.startswith("passage_")]
    assert "temperature" not in str(plan.settings(Node("x", "score")))


def test_the_seed_reaches_what_draws(plan: Plan) -> None:
    other = Plan(load(RAW | {"seed": 1}))
    for rule in ("ingest", "mine", "fit", "train", "metrics"):
        labels = ()
        assert plan.key(Node("x", rule, labels)) != other.key(Node("x", rule, labels)), rule


def test_words_alone_need_no_vectors() -> None:
    plan = Plan(load(RAW | {"variants": {"words": {"mine": {"retriever": "bm25"}}, "both": {"mine": {"rrf_k": 1}}}}))
    assert plan.mined_vectors("x.words") == []
    assert {node.rule for node in plan.parents(Node("x.words", "mine"))} == {"ingest"}
    assert [node.labels for node in plan.mined_vectors("x.both")] == [("base", TRAIN, part) for part in plan.parts("x")]
    assert len({path(plan, run, "mine") for run in ("x", "x.words", "x.both")}) == 3


def test_a_ready_teacher_is_a_part_of_mining_and_one_that_is_fitted_is_not() -> None:
    def runs(reranker: dict, **score) -> Plan:
        variants = {"other": {"reranker": {"max_length": 99}}, "strict": {"mine": {"max_score_of_teacher": -1}}}
        mine = {"mine": {"max_score_of_teacher": 0.5}, "variants": variants} | ({"score": score} if score else {})
        return Plan(load(RAW | {"reranker": {"model": "r"} | reranker} | mine))

    ready, fitted, relabelled = runs({}), runs({"fit": {}}), runs({}, false_negatives="relabel")
    assert ready.settings(Node("x", "mine"))["reranker"]["model"] == "r"
    assert path(ready, "x.other", "mine").startswith("results/x.other/")
    assert path(ready, "x.strict", "mine").startswith("results/x.strict/")
    for plan in (fitted, relabelled):  # the threshold, too, is the score stage's
        assert plan.settings(Node("x", "mine"))["reranker"] is None
        assert path(plan, "x.other", "mine") == path(plan, "x.strict", "mine") == path(plan, "x", "mine")


def test_batches_of_one_length_wait_for_the_bins() -> None:
    plan = Plan(load(RAW | {"variants": {"even": {"train": {"same_length_within_batch": True}}}}))
    parents = {run: {node.rule for node in plan.parents(Node(run, "train"))} for run in ("x", "x.even")}
    assert "split" in parents["x.even"] and "split" not in parents["x"]


def test_training_data_depends_on_benchmarks_only_where_those_are_kept_out() -> None:
    plan = Plan(load(RAW | {"variants": {"clean": {"ingest": {"exclude_benchmarks": True}}}}))
    assert plan.parents(Node("x", "ingest")) == []
    assert plan.parents(Node("x.clean", "ingest")) == [Node("x.clean", "benchmark", ("b",))]
    assert path(plan, "x.clean", "ingest").startswith("results/x.clean/")
    assert path(plan, "x.clean", "benchmark", "b") == path(plan, "x", "benchmark", "b")
    assert path(plan, "x", "leakage") == "results/x/ingest/leakage.parquet"
    assert path(plan, "x.clean", "leakage") == "results/x.clean/ingest/leakage.parquet"


def test_the_lowest_relevant_grade_measures_again_but_reads_nothing_again() -> None:
    other = Plan(load(RAW | {"evaluate": {"benchmarks": {"b": {"path": "bench", "relevant_from": 2}}}}))
    plan = Plan(load(RAW))
    assert plan.key(Node("x", "benchmark", ("b",))) == other.key(Node("x", "benchmark", ("b",)))
    assert plan.key(Node("x", "metrics")) != other.key(Node("x", "metrics"))


def test_an_index_for_evaluation_depends_on_the_seed_and_an_exact_search_does_not() -> None:
    def key(**changed) -> str:
        evaluate = RAW["evaluate"] | {key: value for key, value in changed.items() if key != "seed"}
        plan = Plan(load(RAW | {"evaluate": evaluate, "seed": changed.get("seed", 0)}))
        return str(plan.settings(Node("x", "evaluate", ("b", "base"))))

    assert key() == key(seed=1)
    assert key(index_factory="HNSW8") != key(index_factory="HNSW8", seed=1)
