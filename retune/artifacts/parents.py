"""What an artifact is made from: a function for each rule that reads another's result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from retune.artifacts.node import TRAIN, Node

if TYPE_CHECKING:
    from retune.plan import Plan


def parents(plan: Plan, node: Node) -> list[Node]:
    """The artifacts that a rule reads for this one."""
    return OF[node.rule](plan, node) if node.rule in OF else []


def _benchmark(plan: Plan, node: Node) -> list[Node]:
    return [Node(node.run, "demo")] if plan.config(node.run).demo else []


def _ingest(plan: Plan, node: Node) -> list[Node]:
    run, config = node.run, plan.config(node.run)
    known = _benchmarks(plan, run) if config.ingest.exclude_benchmarks else []
    return [*([Node(run, "demo")] if config.demo else []), *known]


def _leakage(plan: Plan, node: Node) -> list[Node]:
    return [Node(node.run, "ingest"), *_benchmarks(plan, node.run)]


def _split(plan: Plan, node: Node) -> list[Node]:
    model = plan.reference(plan.config(node.run).embedder.model)
    return _there(Node(node.run, "ingest"), model)


def _embed(plan: Plan, node: Node) -> list[Node]:
    label, collection, _ = node.labels
    source = Node(node.run, "ingest") if collection == TRAIN else Node(node.run, "benchmark", (collection,))
    return _there(source, plan.model_node(node.run, label))


def _search(plan: Plan, node: Node) -> list[Node]:
    queries = plan.mined_vectors(node.run)[0]
    return [Node(node.run, "ingest"), queries, *plan.searched_texts(node), *_bins_of_mining(plan, node.run)]


def _mine(plan: Plan, node: Node) -> list[Node]:
    return [Node(node.run, "ingest"), *plan.mined_vectors(node.run), *_bins_of_mining(plan, node.run)]


def _fit(plan: Plan, node: Node) -> list[Node]:
    return plan.unscored(node.run)


def _scores(plan: Plan, node: Node) -> list[Node]:
    fitted = plan.config(node.run).reranker.fit
    return [*plan.unscored(node.run), *([Node(node.run, "fit")] if fitted else [])]


def _score(plan: Plan, node: Node) -> list[Node]:
    return [*plan.unscored(node.run), *plan.scored_parts(node.run)]


def _train(plan: Plan, node: Node) -> list[Node]:
    run = node.run
    bins = Node(run, "split") if plan.lengths_matter(run) else None
    return _there(Node(run, "ingest"), plan.pairs(run), bins, plan.model_node(run, "base"))


def _weigh(plan: Plan, node: Node) -> list[Node]:
    run = node.run
    aside = [Node(run, "ingest")] if plan.config(run).merge.search else []
    guards = [Node(run, "benchmark", (name,)) for name in plan.guards(run)]
    return [*_merged(plan, run), *aside, *guards]


def _merge(plan: Plan, node: Node) -> list[Node]:
    return [*_merged(plan, node.run), *([Node(node.run, "weigh")] if plan.weighs(node.run) else [])]


def _evaluate(plan: Plan, node: Node) -> list[Node]:
    benchmark, label = node.labels
    model = label.partition("-")[0]
    parts = [Node(node.run, "embed", (model, benchmark, part)) for part in plan.parts(node.run)]
    return [Node(node.run, "benchmark", (benchmark,)), *parts]


def _metrics(plan: Plan, node: Node) -> list[Node]:
    run = node.run
    runs = [Node(run, "evaluate", (b, m)) for b in plan.benchmarks(run) for m in plan.judged(run)]
    return [*_benchmarks(plan, run), *runs]


def _card(plan: Plan, node: Node) -> list[Node]:
    run, [stage] = node.run, node.labels
    weighed = [Node(run, "weigh")] if stage == "merge" and plan.weighs(run) else []
    measured = [Node(run, "metrics")] if plan.benchmarks(run) else []
    return [Node(run, stage), Node(run, "ingest"), plan.pairs(run), *measured, *weighed]


def _gate(plan: Plan, node: Node) -> list[Node]:
    return [Node(node.run, "metrics")]


def _trec(plan: Plan, node: Node) -> list[Node]:
    return [Node(node.run, "benchmark", node.labels[:1]), Node(node.run, "evaluate", node.labels)]


def _report(plan: Plan, node: Node) -> list[Node]:
    return plan.reported(node.run)


OF: dict[str, Callable[[Plan, Node], list[Node]]] = {
    "benchmark": _benchmark, "ingest": _ingest, "leakage": _leakage, "split": _split, "embed": _embed,
    "search": _search, "mine": _mine, "fit": _fit, "scores": _scores, "score": _score, "train": _train,
    "weigh": _weigh, "merge": _merge, "evaluate": _evaluate, "metrics": _metrics, "card": _card, "gate": _gate,
    "trec": _trec, "report": _report,
}  # fmt: skip
"""By rule; the others read what users bring, or the config alone."""


def _there(*nodes: Node | None) -> list[Node]:
    return [node for node in nodes if node]


def _benchmarks(plan: Plan, run: str) -> list[Node]:
    return [Node(run, "benchmark", (name,)) for name in plan.benchmarks(run)]


def _bins_of_mining(plan: Plan, run: str) -> list[Node]:
    return [Node(run, "split")] if plan.config(run).mine.pool == "bin" else []


def _merged(plan: Plan, run: str) -> list[Node]:
    """The models that are made here, of those which a run merges."""
    return [made for _, made in plan.merge_models(run) if made]
