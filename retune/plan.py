"""Which artifact of which run lies where, what it is made of, and which runs share it.

An artifact's key hashes its settings and the keys of what it is made from.  A variant's artifact
whose key equals that of an earlier run is that run's: its path is the earlier run's path.  So the
files of the whole experiment are known before anything runs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from retune.config import Config, EmbedderConfig
from retune.experiment import Experiment, run_of

ABOUT_QUERIES = ("query_", "examples", "icl_")  # beginnings of the embedder's keys that leave passages alone
TRAIN = "train"  # the collection of training texts; the others are named as their benchmarks


@dataclass(frozen=True)
class Node:
    """An artifact of a run: a rule's name and its labels (model, collection, part)."""

    run: str
    rule: str
    labels: tuple[str, ...] = ()


class Plan:
    """Paths, settings and dependencies of every artifact of an experiment."""

    def __init__(self, experiment: Experiment) -> None:
        self.runs, self.main = experiment.runs, experiment.name
        self.key = lru_cache(None)(self._key)
        self.home = lru_cache(None)(self._home)

    # ---- what a run is made of ------------------------------------------------------------------

    def config(self, run: str) -> Config:
        return self.runs[run]

    def miner(self, run: str) -> str:
        """Label of the model that mines."""
        return "miner" if self.runs[run].mine.embedder else "base"

    def mined_vectors(self, run: str) -> list[Node]:
        """The vectors that mining searches: queries, then texts by shard; words alone (bm25) need none."""
        if self.runs[run].mine.retriever == "bm25":
            return []
        return [Node(run, "embed", (self.miner(run), TRAIN, part)) for part in self.parts(run)]

    def parts(self, run: str) -> list[str]:
        """Names of an embedded collection's files."""
        shards = self.runs[run].embed.shards
        return ["queries", *(f"texts-{i:02d}-of-{shards:02d}" for i in range(shards))]

    def pairs(self, run: str) -> Node:
        """The most complete table of pairs of a run."""
        config = self.runs[run]
        return Node(run, "score" if config.score else "mine" if config.mine else "ingest")

    def unscored(self, run: str) -> list[Node]:
        """What the teacher reads: texts and queries, and the pairs."""
        return [Node(run, "ingest"), Node(run, "mine" if self.runs[run].mine else "ingest")]

    def scored_parts(self, run: str) -> list[Node]:
        """The parts in which pairs are scored."""
        shards = self.runs[run].score.shards
        return [Node(run, "scores", (f"{i:02d}-of-{shards:02d}",)) for i in range(shards)]

    def mined_scores(self, config: Config) -> bool:
        """Whether mining has asked the teacher already, so that the scores in the pairs are its own."""
        return config.mining_teacher is not None

    def models(self, run: str) -> list[str]:
        return list(self.runs[run].evaluate.models) if self.runs[run].evaluate else []

    def judged(self, run: str) -> list[str]:
        """Names of what is measured: a model, by a head that is not dense `<model>-<head>`."""
        heads = self.runs[run].evaluate.heads if self.runs[run].evaluate else []
        return [model if head == "dense" else f"{model}-{head}" for model in self.models(run) for head in heads]

    def benchmarks(self, run: str) -> list[str]:
        return list(self.runs[run].evaluate.benchmarks) if self.runs[run].evaluate else []

    def variants(self) -> list[str]:
        return list(self.runs)[1:]

    # ---- models ---------------------------------------------------------------------------------

    def embedder(self, run: str, label: str) -> dict[str, Any]:
        """Settings of the embedder behind a label; a model made here is named by its path."""
        config = self.runs[run]
        section = config.mine.embedder if label == "miner" and config.mine.embedder else config.embedder
        node = self.model_node(run, label)
        settings = section.model_dump(mode="json")
        return settings if node is None else settings | {"model": self.path(node), "revision": None, "sha256": None}

    def model_node(self, run: str, label: str) -> Node | None:
        """The artifact that a model label stands for; None for one that is not made here."""
        config = self.runs[run]
        if label == "tuned":
            return Node(run, "train")
        if label == "merged":
            return Node(run, "merge")
        section = config.mine.embedder if label == "miner" and config.mine.embedder else config.embedder
        return self.reference(section.model)

    def reference(self, model: str) -> Node | None:
        """The artifact behind `variant:<name>`; None for a folder, a hub id or a package."""
        if not model.startswith("variant:"):
            return None
        return Node(run_of(model.removeprefix("variant:"), self.main), "train")

    def merge_models(self, run: str) -> list[tuple[str, Node | None]]:
        """(reference or path, artifact) of the models that a run merges."""
        found = []
        for model in self.runs[run].merge.models:
            node = self.model_node(run, model) if model in ("base", "tuned") else self.reference(model)
            reference = self.runs[run].embedder.model if model == "base" else model
            found.append((self.path(node) if node else reference, node))
        return found

    # ---- settings and dependencies --------------------------------------------------------------

    def settings(self, node: Node) -> dict[str, Any]:
        """The config values that a rule uses for this artifact, and no others; JSON-able."""
        config, dump = self.runs[node.run], lambda section: section.model_dump(mode="json") if section else None
        seed = config.seed
        match node.rule, node.labels:
            case "demo", _:
                return {"settings": dump(config.demo), "seed": seed}
            case "ingest", _:
                return {"settings": dump(config.ingest), "seed": seed}
            case "config", _:
                return {"config": config.model_dump(mode="json", exclude={"variants"})}
            case "benchmark", (name,):
                return {"settings": dump(config.evaluate.benchmarks[name]), "name": name}
            case "split", _:
                return {"settings": dump(config.split), "embedder": self._tokenizer(config.embedder)}
            case "embed", (label, _, part):
                other = ("passage_",) if part == "queries" else ABOUT_QUERIES
                embedder = self.embedder(node.run, label)
                kept = {key: value for key, value in embedder.items() if not key.startswith(other)}
                heads = {} if node.labels[1] == TRAIN else {"heads": config.evaluate.stored_heads()}
                return {"settings": dump(config.embed) | heads, "embedder": kept}
            case "mine", _:
                used = {"embedder": None} | ({} if config.mining_teacher else {"max_score_of_teacher": None})
                return {"settings": dump(config.mine) | used, "reranker": dump(config.mining_teacher), "seed": seed}
            case "fit", _:
                return {"reranker": dump(config.reranker), "seed": seed}
            case "scores", _:
                settings = dump(config.reranker) | {"fit": None}
                if config.reranker.fit:
                    settings |= {"model": self.path(Node(node.run, "fit")), "revision": None, "sha256": None}
                used = {"false_negatives": "keep"}  # what is not used here
                return {
                    "settings": dump(config.score) | used,
                    "reranker": settings,
                    "only_missing": self.mined_scores(config),
                }
            case "score", _:
                margin = config.mine.max_score_of_teacher if config.mine else None
                action = config.score.false_negatives if margin is not None else "keep"
                return {"margin": margin, "false_negatives": action, "only_missing": self.mined_scores(config)}
            case "train", _:
                limit = config.split.drop_longer_than
                return {
                    "settings": dump(config.train), "embedder": self.embedder(node.run, "base"), "seed": seed,
                    "drop_longer_than": limit,
                }  # fmt: skip
            case "merge", _:
                return {
                    "settings": dump(config.merge) | {"models": [model for model, _ in self.merge_models(node.run)]},
                    "revision": config.embedder.revision,
                }
            case "evaluate", (_, label):
                head = label.partition("-")[2] or "dense"
                weights = config.evaluate.head_weights.model_dump() if head == "hybrid" else None
                return {"k": config.evaluate.k, "head": head, "weights": weights}
            case "metrics", _:
                return {"cutoffs": config.evaluate.cutoffs, "models": self.judged(node.run), "seed": seed}
            case "report", _:
                return {"settings": dump(config.report), "run": node.run}
        raise KeyError(node.rule)

    def _tokenizer(self, embedder: EmbedderConfig) -> dict[str, Any]:
        kept = ("model", "revision", "trust_remote_code")
        found = {key: value for key, value in embedder.model_dump(mode="json").items() if key in kept}
        node = self.reference(embedder.model)
        return found | ({"model": self.path(node), "revision": None} if node else {})

    def parents(self, node: Node) -> list[Node]:
        """What an artifact is made from."""
        config, run = self.runs[node.run], node.run
        ingest, split = Node(run, "ingest"), Node(run, "split")
        match node.rule, node.labels:
            case "ingest" | "benchmark", _:
                return [Node(run, "demo")] if config.demo else []
            case "split", _:
                return [n for n in (ingest, self.reference(config.embedder.model)) if n]
            case "embed", (label, collection, _):
                source = ingest if collection == TRAIN else Node(run, "benchmark", (collection,))
                return [n for n in (source, self.model_node(run, label)) if n]
            case "mine", _:
                return [ingest, *self.mined_vectors(run), *([split] if config.mine.pool == "bin" else [])]
            case "fit", _:
                return self.unscored(run)
            case "scores", _:
                return [*self.unscored(run), *([Node(run, "fit")] if config.reranker.fit else [])]
            case "score", _:
                return [*self.unscored(run), *self.scored_parts(run)]
            case "train", _:
                bins = [split] if config.split.drop_longer_than else []
                return [n for n in (ingest, self.pairs(run), *bins, self.model_node(run, "base")) if n]
            case "merge", _:
                return [made for _, made in self.merge_models(run) if made]
            case "evaluate", (benchmark, label):
                model = label.partition("-")[0]
                parts = [Node(run, "embed", (model, benchmark, part)) for part in self.parts(run)]
                return [Node(run, "benchmark", (benchmark,)), *parts]
            case "metrics", _:
                runs = [Node(run, "evaluate", (b, m)) for b in self.benchmarks(run) for m in self.judged(run)]
                return [*(Node(run, "benchmark", (b,)) for b in self.benchmarks(run)), *runs]
            case "report", _:
                return self.reported(run)
        return []

    def reported(self, run: str) -> list[Node]:
        """The artifacts that a report reads."""
        config = self.runs[run]
        found = [Node(run, "config"), Node(run, "ingest"), Node(run, "split")]
        found += [Node(run, rule) for rule in ("mine", "score", "train", "merge") if getattr(config, rule)]
        if config.score and config.reranker.fit:
            found.append(Node(run, "fit"))
        if config.evaluate and config.evaluate.benchmarks:
            found.append(Node(run, "metrics"))
        return found

    def targets(self) -> list[Node]:
        """Everything that the config asks for."""
        found = []
        for run, config in self.runs.items():
            found += [Node(run, "report")] if config.report else self.reported(run)
        return found

    def _key(self, node: Node) -> str:
        settings = self.settings(node)
        if node.rule not in ("config", "ingest", "benchmark"):
            settings = self._without_paths(settings)
        parts = [node.rule, *node.labels[1:], json.dumps(settings, sort_keys=True)]
        parts += [self.key(parent) for parent in self.parents(node)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _without_paths(self, value: Any) -> Any:
        """Paths of what is made here say whose it is, not what it is: the parents' keys say that."""
        if isinstance(value, dict):
            return {key: self._without_paths(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._without_paths(item) for item in value]
        return "made" if isinstance(value, str) and value.startswith("results/") else value

    def _home(self, node: Node) -> str:
        for run in self.runs:
            if run == node.run:
                return run
            other = Node(run, node.rule, node.labels)
            if self.makes(other) and self.key(other) == self.key(node):
                return run
        return node.run

    def makes(self, node: Node) -> bool:
        """Whether the node's run has such an artifact at all."""
        config = self.runs[node.run]
        collections = [TRAIN, *self.benchmarks(node.run)]
        match node.rule, node.labels:
            case "fit", _:
                return bool(config.score and config.reranker.fit)
            case "benchmark", (name,):
                return name in collections
            case "embed", (label, collection, part):
                known = ["base", *self.models(node.run), *(["miner"] if config.mine and config.mine.embedder else [])]
                return label in known and collection in collections and part in self.parts(node.run)
            case "evaluate", (name, label):
                return name in collections and label in self.judged(node.run)
            case "metrics", _:
                return bool(self.benchmarks(node.run))
            case "scores", _:
                return config.score is not None and node in self.scored_parts(node.run)
            case ("demo" | "mine" | "score" | "train" | "merge" | "report") as section, _:
                return getattr(config, section) is not None
        return True

    # ---- paths ----------------------------------------------------------------------------------

    def path(self, node: Node, file: str = "") -> str:
        """Where an artifact lies: in the folder of the first run that makes it."""
        return f"{self.folder(node)}/{file or self._file(node)}"

    def folder(self, node: Node) -> str:
        base = f"results/{self.home(node)}"
        match node.rule, node.labels:
            case "demo", _:
                return f"{base}/raw"
            case "benchmark", (name,):
                return f"{base}/ingest/{name}"
            case "embed", (label, collection, _):
                return f"{base}/embed/{label}" + ("" if collection == TRAIN else f"/{collection}")
            case "evaluate", (benchmark, _):
                return f"{base}/evaluate/{benchmark}"
            case "metrics", _:
                return f"{base}/evaluate"
            case (("fit" | "scores"), _):
                return f"{base}/score"
            case "config", _:
                return base
        return f"{base}/{node.rule}"

    def _file(self, node: Node) -> str:
        match node.rule, node.labels:
            case "train" | "merge", _:
                return "model"
            case "fit", _:
                return "reranker"
            case "scores", (part,):
                return f"scores-{part}.parquet"
            case "embed", (_, _, part):
                return f"{part}.parquet"
            case "evaluate", (_, label):
                return f"{label}.run.parquet"
            case "metrics", _:
                return "metrics.parquet"
            case "report", _:
                return "index.html"
            case "config", _:
                return "config.yaml"
            case "split", _:
                return "bins.parquet"
        return "pairs.parquet"
