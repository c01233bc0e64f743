"""Which artifact of which run lies where, what it is made of, and which runs share it.

An artifact's key hashes its settings and the keys of what it is made from.  A variant's artifact
whose key equals that of an earlier run is that run's: its path is the earlier run's path.  So the
files of the whole experiment are known before anything runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set
from functools import lru_cache
from typing import Any

from retune.artifacts import places
from retune.artifacts.node import KINDS, TRAIN, Node, shard_name
from retune.artifacts.parents import parents
from retune.artifacts.settings import settings
from retune.config import Config
from retune.experiment import Experiment, run_of


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

    def searches(self, run: str) -> list[Node]:
        """The parts of the texts that are searched by jobs of their own; none where mining searches by itself."""
        shards = self.runs[run].mine.shards
        return [Node(run, "search", (shard_name(i, shards),)) for i in range(shards)] if shards > 1 else []

    def searched_texts(self, node: Node) -> list[Node]:
        """The text vectors of one such part."""
        index, count = map(int, node.labels[0].split("-of-"))
        files = self.mined_vectors(node.run)[1:]
        return files[len(files) * index // count : len(files) * (index + 1) // count]

    def parts(self, run: str) -> list[str]:
        """Names of an embedded collection's files."""
        shards = self.runs[run].embed.shards
        return ["queries", *(f"texts-{shard_name(i, shards)}" for i in range(shards))]

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
        return [Node(run, "scores", (shard_name(i, shards),)) for i in range(shards)]

    def lengths_matter(self, run: str) -> bool:
        """Whether training asks for the lengths of its queries' texts."""
        config = self.runs[run]
        return bool(config.split.drop_longer_than or config.train.same_length_within_batch)

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
        if label in ("tuned", "merged"):  # what the base is put together from is in it
            settings |= {"peft_path": None, "config_name": None, "tokenizer_name": None}
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

    def weighs(self, run: str) -> bool:
        """Whether a run's merging weights are found and not given."""
        merge = self.runs[run].merge
        return merge is not None and merge.weights is None

    def guards(self, run: str) -> list[str]:
        """Benchmarks that a search for merging weights must not lose."""
        config = self.runs[run]
        if not config.merge or not config.merge.search or not config.evaluate:
            return []
        return self.guard_sets(run)

    def guard_sets(self, run: str) -> list[str]:
        """Benchmarks that show what was lost elsewhere."""
        benchmarks = self.runs[run].evaluate.benchmarks if self.runs[run].evaluate else {}
        return [name for name, benchmark in benchmarks.items() if benchmark.guard]

    # ---- settings and dependencies --------------------------------------------------------------

    def settings(self, node: Node) -> dict[str, Any]:
        """The config values that a rule uses for this artifact, and no others; JSON-able."""
        return settings(self, node)

    def parents(self, node: Node) -> list[Node]:
        """What an artifact is made from."""
        return parents(self, node)

    def reported(self, run: str) -> list[Node]:
        """The artifacts that a report reads."""
        config = self.runs[run]
        found = [Node(run, "config"), Node(run, "ingest"), Node(run, "split")]
        found += [Node(run, rule) for rule in ("mine", "score", "train", "merge") if getattr(config, rule)]
        if config.score and config.reranker.fit:
            found.append(Node(run, "fit"))
        if config.evaluate and config.evaluate.benchmarks:
            found += [Node(run, "metrics"), Node(run, "leakage")]
        return found

    def targets(self) -> list[Node]:
        """Everything that the config asks for."""
        found = []
        for run, config in self.runs.items():
            found += [Node(run, "report")] if config.report else self.reported(run)
            found += [Node(run, "card", (stage,)) for stage in KINDS if self.makes_itself(run, stage)]
            found += [Node(run, "gate")] if self.makes(Node(run, "gate")) else []
            if config.evaluate and config.evaluate.trec:
                found += [Node(run, "trec", (b, m)) for b in self.benchmarks(run) for m in self.judged(run)]
        return found

    def makes_itself(self, run: str, stage: str) -> bool:
        """Whether a run makes a model of its own, and does not share another run's."""
        return getattr(self.runs[run], stage) is not None and self.home(Node(run, stage)) == run

    def _key(self, node: Node) -> str:
        above = self.parents(node)
        # The path of what is made here says whose it is, not what it is: the parents' keys say that.
        settings = _without(self.settings(node), {self.path(parent) for parent in above})
        parts = [node.rule, *node.labels[1:], json.dumps(settings, sort_keys=True)]
        if node.rule == "weigh":
            parts.append(str(self.runs[node.run].merge.examples))  # brought, wherever it lies
        parts += [self.key(parent) for parent in above]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

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
            case "evaluate" | "trec", (name, label):
                return name in collections and label in self.judged(node.run)
            case "gate", _:
                return bool(config.evaluate and config.evaluate.min_delta)
            case "metrics" | "leakage", _:
                return bool(self.benchmarks(node.run))
            case "weigh", _:
                return self.weighs(node.run)
            case "card", (stage,):
                return getattr(config, stage) is not None
            case "scores", _:
                return config.score is not None and node in self.scored_parts(node.run)
            case "search", _:
                return config.mine is not None and node in self.searches(node.run)
            case ("demo" | "mine" | "score" | "train" | "merge" | "report") as section, _:
                return getattr(config, section) is not None
        return True

    # ---- paths ----------------------------------------------------------------------------------

    def path(self, node: Node, file: str = "") -> str:
        """Where an artifact lies: in the folder of the first run that makes it."""
        return f"{self.folder(node)}/{file or places.file(node)}"

    def folder(self, node: Node) -> str:
        """The folder that it lies in."""
        within = places.folder(node)
        return f"results/{self.home(node)}" + (f"/{within}" if within else "")


def _without(value: Any, paths: Set[str]) -> Any:
    """A JSON value with the word "made" in place of each of these strings."""
    if isinstance(value, dict):
        return {key: _without(item, paths) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(item, paths) for item in value]
    return "made" if isinstance(value, str) and value in paths else value
