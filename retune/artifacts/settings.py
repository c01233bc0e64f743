"""The config values that an artifact is made with, and no others: a function for each rule, JSON-able.

What a rule does not use is left out, or given the same value whatever the config says: an edit of it must not make the
artifact again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from retune.artifacts.node import KINDS, TRAIN, Node
from retune.config import bounds

if TYPE_CHECKING:
    from retune.plan import Plan

Settings = dict[str, Any]
ABOUT_QUERIES = ("query_", "examples", "icl_")  # beginnings of the embedder's keys that leave passages alone


def settings(plan: Plan, node: Node) -> Settings:
    """The config values that a rule uses for this artifact."""
    return OF[node.rule](plan, node)


def _dump(section: BaseModel | None) -> Settings | None:
    return section.model_dump(mode="json") if section else None


def _nothing(plan: Plan, node: Node) -> Settings:
    return {}


def _config(plan: Plan, node: Node) -> Settings:
    without = {"variants", "cache_dir", "token"}
    return {"config": plan.config(node.run).model_dump(mode="json", exclude=without)}


def _demo(plan: Plan, node: Node) -> Settings:
    config = plan.config(node.run)
    return {"settings": _dump(config.demo), "seed": config.seed}


# ---- what users bring ---------------------------------------------------------------------------


def _ingest(plan: Plan, node: Node) -> Settings:
    config = plan.config(node.run)
    levels = _levels(plan, node.run) if config.ingest.exclude_benchmarks is True else {}
    return {"settings": _dump(config.ingest), "seed": config.seed, "levels": levels}


def _leakage(plan: Plan, node: Node) -> Settings:
    return {"levels": _levels(plan, node.run)}


def _levels(plan: Plan, run: str) -> dict[str, int]:
    """Lowest grade of a relevant passage, by benchmark."""
    return {name: plan.config(run).evaluate.benchmarks[name].relevant_from for name in plan.benchmarks(run)}


def _benchmark(plan: Plan, node: Node) -> Settings:
    [name] = node.labels
    of_measures = {"relevant_from": 1, "guard": False}  # what reading does not use
    return {"settings": _dump(plan.config(node.run).evaluate.benchmarks[name]) | of_measures, "name": name}


def _split(plan: Plan, node: Node) -> Settings:
    config = plan.config(node.run)
    kept = ("model", "revision", "tokenizer_name", "trust_remote_code")
    tokenizer = {key: value for key, value in _dump(config.embedder).items() if key in kept}
    made = plan.reference(config.embedder.model)
    if made:
        tokenizer |= {"model": plan.path(made), "revision": None}
    return {"settings": _dump(config.split), "embedder": tokenizer}


# ---- vectors, negatives, scores -----------------------------------------------------------------


def _embed(plan: Plan, node: Node) -> Settings:
    config, (label, collection, part) = plan.config(node.run), node.labels
    other = ("passage_",) if part == "queries" else ABOUT_QUERIES
    embedder = plan.embedder(node.run, label)
    kept = {key: value for key, value in embedder.items() if not key.startswith(other)}
    heads = {} if collection == TRAIN else {"heads": config.evaluate.stored_heads()}
    return {"settings": _dump(config.embed) | heads, "embedder": kept}


def _search(plan: Plan, node: Node) -> Settings:
    mine = plan.config(node.run).mine
    kept = ("pool", "retriever", "use_gpu_for_searching", "search_batch_size")
    used = {key: value for key, value in _dump(mine).items() if key in kept}
    high = int(bounds(mine.range_for_sampling)[1])
    return {"settings": used | {"range_for_sampling": f"0-{high}"}}


def _mine(plan: Plan, node: Node) -> Settings:
    config = plan.config(node.run)
    used = {"embedder": None, "shards": 1}  # shards decide who searches, not what is found
    if not config.mining_teacher:
        used["max_score_of_teacher"] = None
    return {"settings": _dump(config.mine) | used, "reranker": _dump(config.mining_teacher), "seed": config.seed}


def _fit(plan: Plan, node: Node) -> Settings:
    config = plan.config(node.run)
    return {"reranker": _dump(config.reranker), "seed": config.seed}


def _scores(plan: Plan, node: Node) -> Settings:
    config = plan.config(node.run)
    reranker = _dump(config.reranker) | {"fit": None}
    if config.reranker.fit:
        reranker |= {"model": plan.path(Node(node.run, "fit")), "revision": None, "sha256": None}
    used = {"false_negatives": "keep"}  # what is not used here
    return {
        "settings": _dump(config.score) | used, "reranker": reranker, "only_missing": plan.mined_scores(config),
    }  # fmt: skip


def _score(plan: Plan, node: Node) -> Settings:
    config = plan.config(node.run)
    margin = config.mine.max_score_of_teacher if config.mine else None
    action = config.score.false_negatives if margin is not None else "keep"
    return {"margin": margin, "false_negatives": action, "only_missing": plan.mined_scores(config)}


# ---- models -------------------------------------------------------------------------------------


def _train(plan: Plan, node: Node) -> Settings:
    config = plan.config(node.run)
    return {
        "settings": _dump(config.train), "embedder": plan.embedder(node.run, "base"), "seed": config.seed,
        "drop_longer_than": config.split.drop_longer_than,
    }  # fmt: skip


def _weigh(plan: Plan, node: Node) -> Settings:
    """`embedder` is how mixtures and models are read, but for what is base's alone, which `own` has for each model."""
    config = plan.config(node.run)
    merge, benchmarks = config.merge, config.evaluate.benchmarks if config.evaluate else {}
    models = [model for model, _ in plan.merge_models(node.run)]
    base = plan.embedder(node.run, "base")
    parts = ("config_name", "tokenizer_name")  # elsewhere: a mixture has its own
    own = {key: base[key] for key in ("revision", *(() if merge.search else parts))}
    graded = merge.search and not merge.search.measure.startswith("nDCG")  # which takes the grades as they are
    return {
        "settings": _dump(merge) | {"models": models}, "seed": config.seed,
        "embedder": base | dict.fromkeys(("revision", "sha256", "peft_path", *parts)) | {"model": "mixture"},
        "own": [own if name == "base" else {} for name in merge.models],
        "levels": {name: benchmarks[name].relevant_from for name in plan.guards(node.run)} if graded else {},
    }  # fmt: skip


def _merge(plan: Plan, node: Node) -> Settings:
    config = plan.config(node.run)
    models = [model for model, _ in plan.merge_models(node.run)]
    settings = {"models": models, "weights": config.merge.weights}
    of_base = plan.embedder(node.run, "base")["revision"]  # of its repository, and of no other
    return {"settings": settings, "revisions": [of_base if name == "base" else None for name in config.merge.models]}


def _card(plan: Plan, node: Node) -> Settings:
    """What a model's card tells of the config: what was set, where it made the model."""
    config, [stage] = plan.config(node.run), node.labels
    made_by = {"seed", "embedder", "reranker", "ingest", "split", "mine", "score", "train", "merge"}
    left = set() if stage == "merge" else {"merge"}
    sections = config.model_dump(mode="json", exclude_defaults=True, include=made_by - left)
    made = plan.reference(config.embedder.model)  # a name of the config's means nothing outside the run: its path does
    base = plan.path(made) if made else config.embedder.model
    found = {"kind": KINDS[stage], "name": f"{node.run} {KINDS[stage]}", "base": base}
    if stage == "merge":
        models = [model for model, _ in plan.merge_models(node.run)]
        found |= {"models": models, "weights": config.merge.weights}
    return found | {"sections": sections}


# ---- what is measured and told ------------------------------------------------------------------


def _evaluate(plan: Plan, node: Node) -> Settings:
    """What a ranking by a head uses."""
    config = plan.config(node.run)
    evaluate, head = config.evaluate, node.labels[1].partition("-")[2] or "dense"
    used = {"k": evaluate.k, "head": head}
    if head in ("hybrid", "dense+sparse"):
        used["weights"] = evaluate.head_weights.model_dump()
    if head == "sparse":  # no vector is searched for
        return used
    names = ("index_factory", "nprobe", "ef_search", "index_train_size")
    exact = evaluate.index_factory == "Flat"  # nothing is drawn then
    return used | {name: getattr(evaluate, name) for name in names} | {"seed": 0 if exact else config.seed}


def _metrics(plan: Plan, node: Node) -> Settings:
    config = plan.config(node.run)
    return {
        "cutoffs": config.evaluate.cutoffs, "models": plan.judged(node.run), "seed": config.seed,
        "levels": _levels(plan, node.run),
    }  # fmt: skip


def _gate(plan: Plan, node: Node) -> Settings:
    evaluate = plan.config(node.run).evaluate
    return {"settings": _dump(evaluate.min_delta), "guards": plan.guard_sets(node.run)}


def _report(plan: Plan, node: Node) -> Settings:
    return {"settings": _dump(plan.config(node.run).report), "run": node.run, "guards": plan.guard_sets(node.run)}


OF: dict[str, Callable[[Plan, Node], Settings]] = {
    "config": _config, "demo": _demo, "ingest": _ingest, "benchmark": _benchmark, "split": _split, "embed": _embed,
    "search": _search, "mine": _mine, "fit": _fit, "scores": _scores, "score": _score, "train": _train,
    "weigh": _weigh, "merge": _merge, "card": _card, "evaluate": _evaluate, "metrics": _metrics, "gate": _gate,
    "trec": _nothing, "leakage": _leakage, "report": _report,
}  # fmt: skip
"""By rule."""
