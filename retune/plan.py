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

from retune.config import Config, EmbedderConfig, EvaluateConfig, bounds
from retune.experiment import Experiment, run_of

ABOUT_QUERIES = ("query_", "examples", "icl_")  # beginnings of the embedder's keys that leave passages alone
TRAIN = "train"  # the collection of training texts; the others are named as their benchmarks
KINDS = {"train": "tuned", "merge": "merged"}  # of the models that are made here


@dataclass(frozen=True)
class Node:
    """An artifact of a run: a rule's name and its labels (model, collection, part)."""

    run: str
    rule: str
    labels: tuple[str, ...] = ()


def shard_name(index: int, count: int) -> str:
    return f"{index:02d}-of-{count:02d}"


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
        config, dump = self.runs[node.run], lambda section: section.model_dump(mode="json") if section else None
        seed = config.seed
        match node.rule, node.labels:
            case "demo", _:
                return {"settings": dump(config.demo), "seed": seed}
            case "ingest", _:
                return {"settings": dump(config.ingest), "seed": seed}
            case "config", _:
                return {"config": config.model_dump(mode="json", exclude={"variants", "cache_dir", "token"})}
            case "benchmark", (name,):
                of_measures = {"relevant_from": 1, "guard": False}  # what reading does not use
                return {"settings": dump(config.evaluate.benchmarks[name]) | of_measures, "name": name}
            case "split", _:
                return {"settings": dump(config.split), "embedder": self._tokenizer(config.embedder)}
            case "embed", (label, _, part):
                other = ("passage_",) if part == "queries" else ABOUT_QUERIES
                embedder = self.embedder(node.run, label)
                kept = {key: value for key, value in embedder.items() if not key.startswith(other)}
                heads = {} if node.labels[1] == TRAIN else {"heads": config.evaluate.stored_heads()}
                return {"settings": dump(config.embed) | heads, "embedder": kept}
            case "search", _:
                kept = ("pool", "retriever", "use_gpu_for_searching", "search_batch_size")
                used = {key: value for key, value in dump(config.mine).items() if key in kept}
                high = int(bounds(config.mine.range_for_sampling)[1])
                return {"settings": used | {"range_for_sampling": f"0-{high}"}}
            case "mine", _:
                # shards decide who searches, not what is found
                used = {"embedder": None, "shards": 1} | (
                    {} if config.mining_teacher else {"max_score_of_teacher": None}
                )
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
            case "weigh", _:
                models = [model for model, _ in self.merge_models(node.run)]
                # whichever model is the embedder's own, it is one of `models` or means nothing here
                embedder = dump(config.embedder) | {"model": "mixture", "sha256": None}
                return {"settings": dump(config.merge) | {"models": models}, "embedder": embedder, "seed": seed}
            case "merge", _:
                models = [model for model, _ in self.merge_models(node.run)]
                settings = {"models": models, "weights": config.merge.weights}
                return {"settings": settings, "revision": config.embedder.revision}
            case "evaluate", (_, label):
                return self._ranked(config.evaluate, label.partition("-")[2] or "dense", seed)
            case "metrics", _:
                levels = {name: config.evaluate.benchmarks[name].relevant_from for name in self.benchmarks(node.run)}
                return {
                    "cutoffs": config.evaluate.cutoffs, "models": self.judged(node.run), "seed": seed, "levels": levels,
                }  # fmt: skip
            case "gate", _:
                return {"settings": dump(config.evaluate.min_delta), "guards": self.guard_sets(node.run)}
            case "trec" | "leakage", _:
                return {}
            case "card", (stage,):
                return self._carded(node.run, stage)
            case "report", _:
                return {"settings": dump(config.report), "run": node.run, "guards": self.guard_sets(node.run)}
        raise KeyError(node.rule)

    def _ranked(self, settings: EvaluateConfig, head: str, seed: int) -> dict[str, Any]:
        """What a ranking by a head uses."""
        used = {"k": settings.k, "head": head}
        if head == "hybrid":
            used["weights"] = settings.head_weights.model_dump()
        if head == "sparse":  # no vector is searched for
            return used
        names = ("index_factory", "nprobe", "ef_search", "index_train_size")
        exact = settings.index_factory == "Flat"  # nothing is drawn then
        return used | {name: getattr(settings, name) for name in names} | {"seed": 0 if exact else seed}

    def _carded(self, run: str, stage: str) -> dict[str, Any]:
        """What a model's card tells of the config: what was set, where it made the model."""
        config = self.runs[run]
        made_by = {"seed", "embedder", "reranker", "ingest", "split", "mine", "score", "train", "merge"}
        left = set() if stage == "merge" else {"merge"}
        sections = config.model_dump(mode="json", exclude_defaults=True, include=made_by - left)
        found = {"kind": KINDS[stage], "name": f"{run} {KINDS[stage]}", "base": config.embedder.model}
        if stage == "merge":
            models = [config.embedder.model if model == "base" else model for model in config.merge.models]
            found |= {"models": models, "weights": config.merge.weights}
        return found | {"sections": sections}

    def _tokenizer(self, embedder: EmbedderConfig) -> dict[str, Any]:
        kept = ("model", "revision", "tokenizer_name", "trust_remote_code")
        found = {key: value for key, value in embedder.model_dump(mode="json").items() if key in kept}
        node = self.reference(embedder.model)
        return found | ({"model": self.path(node), "revision": None} if node else {})

    def parents(self, node: Node) -> list[Node]:
        """What an artifact is made from."""
        config, run = self.runs[node.run], node.run
        ingest, split = Node(run, "ingest"), Node(run, "split")
        match node.rule, node.labels:
            case "benchmark", _:
                return [Node(run, "demo")] if config.demo else []
            case "ingest", _:
                known = self.benchmarks(run) if config.ingest.exclude_benchmarks else []
                demo = [Node(run, "demo")] if config.demo else []
                return [*demo, *(Node(run, "benchmark", (name,)) for name in known)]
            case "leakage", _:
                return [ingest, *(Node(run, "benchmark", (name,)) for name in self.benchmarks(run))]
            case "split", _:
                return [n for n in (ingest, self.reference(config.embedder.model)) if n]
            case "embed", (label, collection, _):
                source = ingest if collection == TRAIN else Node(run, "benchmark", (collection,))
                return [n for n in (source, self.model_node(run, label)) if n]
            case "search", _:
                vectors = [self.mined_vectors(run)[0], *self.searched_texts(node)]
                return [ingest, *vectors, *([split] if config.mine.pool == "bin" else [])]
            case "mine", _:
                return [ingest, *self.mined_vectors(run), *([split] if config.mine.pool == "bin" else [])]
            case "fit", _:
                return self.unscored(run)
            case "scores", _:
                return [*self.unscored(run), *([Node(run, "fit")] if config.reranker.fit else [])]
            case "score", _:
                return [*self.unscored(run), *self.scored_parts(run)]
            case "train", _:
                bins = [split] if self.lengths_matter(node.run) else []
                return [n for n in (ingest, self.pairs(run), *bins, self.model_node(run, "base")) if n]
            case "weigh", _:
                made = [made for _, made in self.merge_models(run) if made]
                guards = [Node(run, "benchmark", (name,)) for name in self.guards(run)]
                return [*made, *([ingest] if config.merge.search else []), *guards]
            case "merge", _:
                made = [made for _, made in self.merge_models(run) if made]
                return [*made, *([Node(run, "weigh")] if self.weighs(run) else [])]
            case "evaluate", (benchmark, label):
                model = label.partition("-")[0]
                parts = [Node(run, "embed", (model, benchmark, part)) for part in self.parts(run)]
                return [Node(run, "benchmark", (benchmark,)), *parts]
            case "metrics", _:
                runs = [Node(run, "evaluate", (b, m)) for b in self.benchmarks(run) for m in self.judged(run)]
                return [*(Node(run, "benchmark", (b,)) for b in self.benchmarks(run)), *runs]
            case "card", (stage,):
                weighed = [Node(run, "weigh")] if stage == "merge" and self.weighs(run) else []
                measured = [Node(run, "metrics")] if self.benchmarks(run) else []
                return [Node(run, stage), ingest, self.pairs(run), *measured, *weighed]
            case "gate", _:
                return [Node(run, "metrics")]
            case "trec", (benchmark, _):
                return [Node(run, "benchmark", (benchmark,)), Node(run, "evaluate", node.labels)]
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
        settings = self.settings(node)
        if node.rule not in ("config", "ingest", "benchmark"):
            settings = self._without_paths(settings)
        parts = [node.rule, *node.labels[1:], json.dumps(settings, sort_keys=True)]
        if node.rule == "weigh":
            parts.append(str(self.runs[node.run].merge.examples))  # brought, wherever it lies
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
            case "evaluate" | "trec", (benchmark, _):
                return f"{base}/evaluate/{benchmark}"
            case "metrics" | "gate", _:
                return f"{base}/evaluate"
            case (("fit" | "scores"), _):
                return f"{base}/score"
            case "weigh", _:
                return f"{base}/merge"
            case "card", (stage,):
                return f"{base}/{stage}"
            case "search", _:
                return f"{base}/mine"
            case "config", _:
                return base
            case "leakage", _:
                return f"{base}/ingest"
        return f"{base}/{node.rule}"

    def _file(self, node: Node) -> str:
        match node.rule, node.labels:
            case "train" | "merge", _:
                return "model"
            case "fit", _:
                return "reranker"
            case "scores", (part,):
                return f"scores-{part}.parquet"
            case "search", (part,):
                return f"found-{part}.parquet"
            case "embed", (_, _, part):
                return f"{part}.parquet"
            case "evaluate", (_, label):
                return f"{label}.run.parquet"
            case "trec", (_, label):
                return f"{label}.trec"
            case "gate", _:
                return "gate.txt"
            case "leakage", _:
                return "leakage.parquet"
            case "metrics", _:
                return "metrics.parquet"
            case "report", _:
                return "index.html"
            case "config", _:
                return "config.yaml"
            case "weigh", _:
                return "weights.parquet"
            case "card", _:
                return "README.md"
            case "split", _:
                return "bins.parquet"
        return "pairs.parquet"
