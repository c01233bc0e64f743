"""From vectors to a run, and from runs to a table of metrics and its summary."""

import subprocess
import sys

import numpy as np
import pytest
import yaml

from retune import tables
from retune.cli import main
from retune.data.significance import bootstrap_interval, randomisation_test
from retune.runtime import UserError
from retune.stages.evaluate import evaluate
from retune.stages.metrics import metrics, summary


def embeddings(path, vectors, ids=None, dtype="float32", model="a"):
    vectors = np.asarray(vectors, dtype)
    ids = np.arange(len(vectors)) if ids is None else np.asarray(ids)
    with tables.writer(path, tables.embeddings_schema(vectors.shape[1], dtype), {"model": model}) as out:
        out.write({"id": ids, "vector": tables.vector_array(vectors)})
    return path


def pairs(path, judged):
    """A table of pairs from (query, text, label)."""
    q, d, label = np.array(judged, np.int64).reshape(-1, 3).T
    none = [None] * len(q)
    columns = {"query_id": q, "text_id": d, "label": label.astype(np.int8), "origin": ["given"] * len(q)}
    tables.write(path, "pairs", columns | {"similarity": none, "score": none})
    return path


def run(path, ranked):
    """A run from {query: passages in order}."""
    rows = [(q, d, rank) for q, ids in ranked.items() for rank, d in enumerate(ids, 1)]
    q, d, rank = np.array(rows, np.int64).reshape(-1, 3).T
    tables.write(path, "run", {"query_id": q, "text_id": d, "rank": rank.astype(np.int32), "score": 1 / rank})
    return path


def measured(tmp_path, ranked, judged, cutoffs=(1, 10), seed=7):
    """The rows of the metrics of {(benchmark, model): run} against {benchmark: judgments}."""
    runs = {key: run(tmp_path / f"{'-'.join(key)}.parquet", value) for key, value in ranked.items()}
    files = {name: {"pairs": pairs(tmp_path / f"{name}.pairs.parquet", rows)} for name, rows in judged.items()}
    metrics(runs=runs, benchmarks=files, cutoffs=cutoffs, seed=seed, out=tmp_path / "metrics.parquet")
    return tables.read(tmp_path / "metrics.parquet", "metrics").to_pylist()


def random_runs(n=60, models=("base", "tuned")):
    rng = np.random.default_rng(0)
    ranked = {("b", m): {q: rng.permutation(30)[:20].tolist() for q in range(n)} for m in models}
    return ranked, {"b": [(q, d, 1) for q in range(n) for d in rng.choice(30, 2, replace=False)]}


# ---- evaluate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_run_is_the_exact_ranking(tmp_path, dtype):
    rng = np.random.default_rng(1)
    # small whole numbers: products are exact, and many are equal
    queries, texts = rng.integers(-3, 4, (9, 8)), rng.integers(-3, 4, (40, 8))
    shards = [
        embeddings(tmp_path / "t0.parquet", texts[:25], range(25), dtype),
        embeddings(tmp_path / "t1.parquet", texts[25:], range(25, 40), dtype),
    ]
    query_ids = [3, 1, 4, 15, 9, 2, 6, 5, 35]
    embedded = embeddings(tmp_path / "q.parquet", queries, query_ids, dtype)
    evaluate(queries=embedded, texts=shards, k=12, out=tmp_path / "run.parquet")
    expected = []
    for query_id, scores in zip(query_ids, queries @ texts.T, strict=True):
        order = sorted(range(40), key=lambda d: (-scores[d], d))[:12]
        expected += [(query_id, d, rank, float(scores[d])) for rank, d in enumerate(order, 1)]
    found = tables.read(tmp_path / "run.parquet", "run").to_pylist()
    assert [tuple(row.values()) for row in found] == expected


def test_fewer_passages_than_k(tmp_path):
    queries = embeddings(tmp_path / "q.parquet", np.eye(2))
    texts = embeddings(tmp_path / "t.parquet", [[1, 0], [0.5, 1], [0, 0]])
    evaluate(queries=queries, texts=[texts], k=10, out=tmp_path / "run.parquet")
    found = tables.read(tmp_path / "run.parquet", "run")
    assert found["text_id"].to_pylist() == [0, 1, 2, 1, 0, 2]
    assert found["rank"].to_pylist() == [1, 2, 3, 1, 2, 3]


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    queries = embeddings(tmp_path / "q.parquet", [[1, np.nan]])
    texts = embeddings(tmp_path / "t.parquet", np.eye(2))
    with pytest.raises(UserError, match=r"q\.parquet: a vector is not finite"):
        evaluate(queries=queries, texts=[texts], k=1, out=tmp_path / "run.parquet")
    assert not (tmp_path / "run.parquet").exists()


def test_vectors_of_two_models_are_refused(tmp_path):
    queries = embeddings(tmp_path / "q.parquet", np.eye(2), model="a")
    texts = embeddings(tmp_path / "t.parquet", np.eye(2), model="b")
    with pytest.raises(UserError, match=r"t\.parquet: embedded by model b"):
        evaluate(queries=queries, texts=[texts], k=1, out=tmp_path / "run.parquet")


# ---- metrics ------------------------------------------------------------------------------------


def test_rows_of_a_small_benchmark(tmp_path):
    ranked = {("b", "base"): {0: [5, 6], 1: [7, 8], 9: [1]}, ("b", "tuned"): {0: [6, 5], 1: [7, 8]}}
    rows = measured(tmp_path, ranked, {"b": [(0, 6, 1), (1, 8, 1), (1, 7, 0), (2, 5, 1)]})
    # query 9 has no judgment: no row; query 2 was judged and not retrieved for: 0
    mrr = {(r["model"], r["query_id"]): r["value"] for r in rows if (r["measure"], r["cutoff"]) == ("MRR", 10)}
    assert mrr == {
        ("base", None): pytest.approx(1 / 3), ("base", 0): 0.5, ("base", 1): 0.5, ("base", 2): 0.0,
        ("tuned", None): pytest.approx(1 / 2), ("tuned", 0): 1.0, ("tuned", 1): 0.5, ("tuned", 2): 0.0,
    }  # fmt: skip
    tuned = next(r for r in rows if (r["model"], r["measure"], r["cutoff"]) == ("tuned", "MRR", 10))
    assert tuned["query_id"] is None and tuned["p_value"] == 1.0  # of [.5, 0, 0] either sign is as extreme
    assert all(r["p_value"] is None for r in rows if r["model"] == "base" or r["query_id"] is not None)
    assert all((r["low"] is None) == (r["query_id"] is not None) for r in rows)


def test_queries_that_run_and_judgments_do_not_share_are_loud(tmp_path, caplog):
    ranked = {("b", "base"): {0: [5, 6], 9: [1]}, ("b", "tuned"): {0: [7], 1: [7], 2: [7]}}
    measured(tmp_path, ranked, {"b": [(0, 6, 1), (1, 8, 1), (2, 5, 1)]})
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        "b, base: 2 of 3 judged queries have no passage in the run and count as 0",
        "b, base: 1 queries of the run have no judgment and are left out",
        "b, tuned: 0 of 3 positives found",
    ]


def test_order_and_completeness(tmp_path):
    ranked, judged = random_runs(models=("base", "tuned", "merged"))
    ranked |= {("a", m): value for (_, m), value in list(ranked.items())}
    rows = measured(tmp_path, ranked, judged | {"a": judged["b"]})
    keys = [(r["benchmark"], r["model"], r["measure"], r["cutoff"], r["query_id"]) for r in rows]
    assert keys == [
        (benchmark, model, measure, cutoff, query)
        for benchmark in ("b", "a")
        for model in ("base", "tuned", "merged")
        for measure in ("MRR", "Recall", "nDCG", "MAP", "P", "Hit")
        for cutoff in (1, 10)
        for query in (None, *range(60))
    ]


@pytest.mark.parametrize("head", ["", "-sparse", "-dense+sparse"])
def test_means_intervals_and_p_values_are_those_of_the_query_rows(tmp_path, head):
    """A head's p-value is against base ranked by the same head."""
    models = ("base", "tuned") if not head else ("base", f"base{head}", "tuned", f"tuned{head}")
    rows = measured(tmp_path, *random_runs(models=models), seed=11)
    against = {r["model"] for r in rows if r["p_value"] is not None}
    assert against == {model for model in models if model.startswith("tuned")}

    def of(model, measure):
        mine = [r for r in rows if (r["model"], r["measure"], r["cutoff"]) == (model, measure, 10)]
        return mine[0], np.array([r["value"] for r in mine[1:]])[:, None]

    for measure in ("MRR", "Recall", "nDCG", "MAP", "P"):
        _, base = of(f"base{head}", measure)
        mean, tuned = of(f"tuned{head}", measure)
        low, high = bootstrap_interval(tuned, 11)
        found = (mean["value"], mean["low"], mean["high"], mean["p_value"])
        assert found == pytest.approx((tuned.mean(), low[0], high[0], randomisation_test(tuned - base, 11)[0]))
        assert mean["low"] < mean["value"] < mean["high"]


def test_no_base_no_p_value(tmp_path):
    rows = measured(tmp_path, *random_runs(models=("tuned", "merged")))
    assert {r["p_value"] for r in rows} == {None}
    assert {r["model"] for r in rows} == {"tuned", "merged"}


def test_same_input_same_bytes(tmp_path):
    ranked, judged = random_runs()
    measured(tmp_path, ranked, judged)
    first = (tmp_path / "metrics.parquet").read_bytes()
    measured(tmp_path, ranked, judged)
    assert (tmp_path / "metrics.parquet").read_bytes() == first


def test_ids_that_do_not_match_are_loud(tmp_path):
    ranked, judged = {("b", "base"): {0: [1, 2]}, ("b", "tuned"): {0: [2, 1]}}, {"b": [(0, 900, 1), (0, 901, 1)]}
    with pytest.raises(UserError, match=r"b\.pairs\.parquet: 0 of 2 positives found"):
        measured(tmp_path, ranked, judged)
    assert not (tmp_path / "metrics.parquet").exists()
    measured(tmp_path, ranked | {("b", "tuned"): {0: [900]}}, judged)  # a model that finds nothing is a result


def test_a_benchmark_without_positives_is_loud(tmp_path):
    with pytest.raises(UserError, match="no positive judgment"):
        measured(tmp_path, {("b", "base"): {0: [1]}}, {"b": [(0, 1, 0)]})


# ---- summary ------------------------------------------------------------------------------------


def test_summary_shows_every_model_within_a_hundred_columns(tmp_path):
    ranked, judged = random_runs(models=("base", "tuned", "merged"))
    rows = measured(tmp_path, ranked, judged, cutoffs=(1, 10, 100))
    text = summary(tmp_path / "metrics.parquet")
    title, head, *lines = text.splitlines()
    assert title == "b: 60 queries; mean [95% interval], p against base"
    assert head.split() == ["MRR@10", "nDCG@10", "Recall@100"]
    assert [line.split()[0] for line in lines] == ["base", "tuned", "merged"]
    assert max(map(len, text.splitlines())) <= 100
    tuned = next(r for r in rows if (r["model"], r["measure"], r["cutoff"]) == ("tuned", "MRR", 10))
    assert f"{tuned['value']:.4f} [{tuned['low']:.3f} {tuned['high']:.3f}] p=" in lines[1]
    assert " p" not in lines[0]
    assert summary(tmp_path / "metrics.parquet", ["b", "c"]).startswith("b (guard set): 60 queries; ")


def test_the_command_summary_says_what_is_a_guard_set(tmp_path, capsys):
    ranked, judged = random_runs(models=("base", "tuned"))
    for name, guard in (("run", True), ("run.other", False)):
        (tmp_path / name / "evaluate").mkdir(parents=True)
        measured(tmp_path / name / "evaluate", ranked, judged)
        kept = {"name": "run", "evaluate": {"benchmarks": {"b": {"path": "b", "guard": guard}}}}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(kept))
    assert main(["summary", str(tmp_path / "run")]) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if "queries" in line]
    assert [title.split(":")[0] for title in titles] == ["b (guard set)", "b"]


def test_evaluating_needs_no_torch():
    code = "import sys; import retune.stages.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
