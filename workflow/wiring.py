"""What each rule of a run reads, gets and runs: the plan, asked with a job's wildcards.

The rules hold no logic; it is here, where it can be tested.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from store import stored_files, stored_weights

from retune.data.files import deciding, expand
from retune.experiment import ConfigError, load
from retune.fingerprint import fingerprint
from retune.plan import TRAIN as TRAIN  # for the rules
from retune.plan import Node, Plan
from retune.runtime import UserError, use_hub
from retune.sections.evaluation import HUB

SCRIPTS = Path(__file__).resolve().parent / "scripts"
TRIED = ("texts", "queries", "pairs")  # tables that mixtures are tried on


def wire(config: Mapping[str, Any], files: Iterable[Any], stored: bool = False) -> Wiring:
    """The wiring of a config; a config with mistakes ends the process with one line for each.

    Args:
        stored: inputs and results lie in an object store, and not here.
    """
    shown = [os.path.relpath(file) if Path(file).is_relative_to(Path.cwd()) else str(file) for file in files]
    try:
        wiring = Wiring(Plan(load(config, shown)), stored)
        wiring.check_files()
        wiring.use_hub()
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    return wiring


def code(script: str) -> str:
    """Fingerprint of a rule's script and of the library modules that it reaches."""
    return fingerprint(SCRIPTS / f"{script}.py")


class Wiring:
    """Functions of wildcards, for the rules of one experiment."""

    def __init__(self, plan: Plan, stored: bool = False) -> None:
        self.plan = plan
        self.weights, self.expand = (stored_weights, stored_files) if stored else (deciding, _expand)
        names = [name for run in plan.runs for name in plan.benchmarks(run)]
        self.runs = "|".join(map(re.escape, plan.runs))
        self.benchmarks = "|".join(map(re.escape, dict.fromkeys(names))) or "none"
        self.environment = f"../../envs/{plan.config(plan.main).environment}.yaml"

    def use_hub(self) -> None:
        """Have every job find the hub's cache and token in its environment: no result depends on them.

        Raises:
            UserError: if the variable that the config names for the token is not there.
        """
        config = self.plan.config(self.plan.main)
        if config.token and not os.environ.get(config.token):
            raise ConfigError([f"token: there is no environment variable {config.token}"])
        use_hub(config.cache_dir, os.environ[config.token] if config.token else None)

    # ---- any rule -------------------------------------------------------------------------------

    def targets(self) -> list[str]:
        return [self.plan.path(node) for node in self.plan.targets()]

    def settings(self, rule: str, *labels: str) -> Callable[[Any], dict[str, Any]]:
        """The config values of a job's artifact; a label is the name of a wildcard, or stands for itself."""
        return lambda wildcards: self.plan.settings(
            Node(wildcards.run, rule, tuple(getattr(wildcards, label, label) for label in labels))
        )

    def portable(self, rule: str, *labels: str) -> Callable[[Any], dict[str, Any]]:
        """`settings` without the path of a model that is an input: its content counts, in any workflow."""
        settings, files = self.settings(rule, *labels), self.model("model", more=False)

        def found(wildcards: Any) -> dict[str, Any]:
            job = settings(wildcards)
            return job | {"embedder": job["embedder"] | {"model": "input"}} if files(wildcards) else job

        return found

    def made(self, rule: str, file: str = "", *labels: str) -> Callable[[Any], str]:
        """Path of another artifact of the same run; labels are names of wildcards."""
        return lambda wildcards: self.plan.path(
            Node(wildcards.run, rule, tuple(getattr(wildcards, label) for label in labels)), file
        )

    # ---- files that users bring -----------------------------------------------------------------

    def check_files(self) -> None:
        """Raise one UserError that names every path of the config which leads nowhere."""
        problems = []
        for run in self.plan.runs:
            for key, patterns in self._raw(run).items():
                try:
                    self.expand(patterns, key)
                except UserError as error:
                    problems.append(str(error))
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))

    def _raw(self, run: str) -> dict[str, Sequence[str]]:
        """Paths and patterns of raw files, by the key that names them."""
        config = self.plan.config(run)
        found = {f"ingest.train.{name}.path": dataset.files() for name, dataset in config.ingest.train.items()}
        found["ingest.corpus"] = config.ingest.corpus
        if config.merge and config.merge.examples:
            found["merge.examples"] = [config.merge.examples]
        for name in self.plan.benchmarks(run):
            files = config.evaluate.benchmarks[name].files().values()
            found[f"evaluate.benchmarks.{name}"] = [file for file in files if not file.startswith(HUB)]
        return found

    def training_files(self, wildcards: Any) -> list[str]:
        raw = {key: files for key, files in self._raw(wildcards.run).items() if key.startswith("ingest.")}
        return [file for key, patterns in raw.items() for file in self.expand(patterns, key)]

    def benchmark_files(self, wildcards: Any) -> list[str]:
        key = f"evaluate.benchmarks.{wildcards.benchmark}"
        return self.expand(self._raw(wildcards.run)[key], key)

    # ---- models ---------------------------------------------------------------------------------

    def model(self, label: str, more: bool = True) -> Callable[[Any], list[str]]:
        """What a job that loads a model must wait for; `label` may be the name of a wildcard.

        Args:
            more: adapters, config and tokenizer from elsewhere as well.
        """

        def files(wildcards: Any) -> list[str]:
            name = getattr(wildcards, label, label)
            node, embedder = self.plan.model_node(wildcards.run, name), self.plan.embedder(wildcards.run, name)
            own = [self.plan.path(node)] if node else self.weights(embedder["model"])
            others = [embedder[key] for key in ("peft_path", "config_name", "tokenizer_name") if more and embedder[key]]
            return own + [file for other in others for file in self.weights(other)]

        return files

    def encoder(self, wildcards: Any) -> list[str]:
        """The checkpoint that a reranker's own training starts from, or that a ready one is."""
        reranker = self.plan.config(wildcards.run).reranker
        return self.weights(reranker.model) + (self.weights(reranker.peft_path) if reranker.peft_path else [])

    def teacher(self, wildcards: Any) -> list[str]:
        fitted = self.plan.config(wildcards.run).reranker.fit
        return [self.plan.path(Node(wildcards.run, "fit"))] if fitted else self.encoder(wildcards)

    def mining_teacher(self, wildcards: Any) -> list[str]:
        """The ready reranker that filters while mining, where there is one."""
        return self.encoder(wildcards) if self.plan.config(wildcards.run).mining_teacher else []

    def merged(self, wildcards: Any) -> list[str]:
        found = []
        for reference, node in self.plan.merge_models(wildcards.run):
            found += [reference] if node else self.weights(reference)
        return found

    def weighed_examples(self, wildcards: Any) -> list[str]:
        examples = self.plan.config(wildcards.run).merge.examples
        return self.expand([examples], "merge.examples") if examples else []

    def weighed_aside(self, wildcards: Any) -> dict[str, str]:
        """The tables with the queries that were set aside, where weights are searched by them."""
        if not self.plan.config(wildcards.run).merge.search:
            return {}
        return {name: self.plan.path(Node(wildcards.run, "ingest"), f"{name}.parquet") for name in TRIED}

    def weighed_guards(self, wildcards: Any) -> dict[str, dict[str, str]]:
        """{guard set: {table: path}}."""
        nodes = {name: Node(wildcards.run, "benchmark", (name,)) for name in self.plan.guards(wildcards.run)}
        return {name: {t: self.plan.path(node, f"{t}.parquet") for t in TRIED} for name, node in nodes.items()}

    def weighed_tables(self, wildcards: Any) -> list[str]:
        return [*_paths(self.weighed_aside(wildcards)), *_paths(self.weighed_guards(wildcards))]

    def merging_weights(self, wildcards: Any) -> str | list[str]:
        """The table of merging weights, where they are found and not given."""
        run = wildcards.run
        return self.plan.path(Node(run, "weigh")) if self.plan.weighs(run) else []

    def training(self, resource: str) -> Callable[[Any], int | str | None]:
        """What a training job asks for: a GPU a process; on several nodes, as many of them, with one task on each."""

        def asked(wildcards: Any) -> int | str | None:
            settings = self.plan.config(wildcards.run).train
            if settings.nnodes == 1:  # which SLURM must be told: it spreads GPUs over nodes where that starts sooner
                return {"gpu": settings.nproc_per_node, "nodes": 1}.get(resource)
            return {
                "gres": f"gpu:{settings.nproc_per_node}",  # of each node
                "nodes": settings.nnodes, "tasks": settings.nnodes, "tasks_per_gpu": 0,  # a task has all of its node's
                "mpi": "srun",  # the job starts its tasks itself
            }.get(resource)  # fmt: skip

        return asked

    def training_threads(self, share: int) -> Callable[[Any], int]:
        """A share of a machine's threads for each of its GPUs that training asks for."""
        return lambda wildcards: share * self.plan.config(wildcards.run).train.nproc_per_node

    # ---- tables ---------------------------------------------------------------------------------

    def embedded_table(self, wildcards: Any) -> str:
        """The texts or queries that a part's vectors are made from."""
        name = getattr(wildcards, "benchmark", None)
        source = Node(wildcards.run, "benchmark", (name,)) if name else Node(wildcards.run, "ingest")
        return self.plan.path(source, "queries.parquet" if wildcards.part == "queries" else "texts.parquet")

    def mined_vectors(self, wildcards: Any) -> list[str]:
        return [self.plan.path(node) for node in self.plan.mined_vectors(wildcards.run)]

    def searched_queries(self, wildcards: Any) -> str:
        return self.mined_vectors(wildcards)[0]

    def searched_texts(self, wildcards: Any) -> list[str]:
        part = Node(wildcards.run, "search", (wildcards.shard,))
        return [self.plan.path(node) for node in self.plan.searched_texts(part)]

    def found(self, wildcards: Any) -> list[str]:
        return [self.plan.path(node) for node in self.plan.searches(wildcards.run)]

    def mined_lengths(self, wildcards: Any) -> list[str]:
        if self.plan.config(wildcards.run).mine.pool != "bin":
            return []
        return [self.plan.path(Node(wildcards.run, "split"), file) for file in ("lengths.parquet", "bins.parquet")]

    def unscored_pairs(self, wildcards: Any) -> str:
        return self.plan.path(Node(wildcards.run, "mine" if self.plan.config(wildcards.run).mine else "ingest"))

    def scored_parts(self, wildcards: Any) -> list[str]:
        return [self.plan.path(node) for node in self.plan.scored_parts(wildcards.run)]

    def pairs(self, wildcards: Any) -> str:
        return self.plan.path(self.plan.pairs(wildcards.run))

    def bins(self, wildcards: Any) -> str | list[str]:
        needed = self.plan.lengths_matter(wildcards.run)
        return self.plan.path(Node(wildcards.run, "split"), "bins.parquet") if needed else []

    def judgments(self, wildcards: Any) -> str | list[str]:
        """The positives of the queries set aside, where training is watched by them."""
        config = self.plan.config(wildcards.run)
        watched = config.ingest.dev_fraction and config.train.dev_queries
        return self.plan.path(Node(wildcards.run, "ingest"), "pairs.parquet") if watched else []

    def benchmark_vectors(self, wildcards: Any) -> list[str]:
        labels = (wildcards.judged.partition("-")[0], wildcards.benchmark)
        return [self.plan.path(Node(wildcards.run, "embed", (*labels, p))) for p in self.plan.parts(wildcards.run)]

    def judged_runs(self, wildcards: Any) -> dict[str, dict[str, str]]:
        """{benchmark: {model: path of its run}}."""
        run = wildcards.run
        return {
            name: {model: self.plan.path(Node(run, "evaluate", (name, model))) for model in self.plan.judged(run)}
            for name in self.plan.benchmarks(run)
        }

    def benchmark_tables(self, wildcards: Any) -> dict[str, dict[str, str]]:
        """{benchmark: {table: path}}."""
        return {
            name: {
                table: self.plan.path(Node(wildcards.run, "benchmark", (name,)), f"{table}.parquet")
                for table in ("texts", "queries", "pairs")
            }
            for name in self.plan.benchmarks(wildcards.run)
        }

    def benchmark_table_files(self, wildcards: Any) -> list[str]:
        return _paths(self.benchmark_tables(wildcards))

    def excluded(self, wildcards: Any) -> dict[str, dict[str, str]]:
        """Tables of the benchmarks whose queries and passages are kept out of the training data."""
        return self.benchmark_tables(wildcards) if self.plan.config(wildcards.run).ingest.exclude_benchmarks else {}

    def excluded_files(self, wildcards: Any) -> list[str]:
        return _paths(self.excluded(wildcards))

    def judged_files(self, wildcards: Any) -> list[str]:
        return [*_paths(self.judged_runs(wildcards)), *_paths(self.benchmark_tables(wildcards))]

    # ---- cards ----------------------------------------------------------------------------------

    def carded_model(self, wildcards: Any) -> str:
        return self.plan.path(Node(wildcards.run, wildcards.stage))

    def carded_weights(self, wildcards: Any) -> str | list[str]:
        return self.merging_weights(wildcards) if wildcards.stage == "merge" else []

    def measured(self, wildcards: Any) -> str | list[str]:
        """The table of metrics, where anything is measured."""
        run = wildcards.run
        return self.plan.path(Node(run, "metrics")) if self.plan.benchmarks(run) else []

    # ---- report ---------------------------------------------------------------------------------

    def reported(self, wildcards: Any) -> dict[str, Any]:
        """What the report reads, by name; what the config switches off is absent."""
        plan, run = self.plan, wildcards.run
        config = plan.config(run)
        found: dict[str, Any] = {
            name: plan.path(Node(run, "ingest"), f"{name}.parquet") for name in ("texts", "queries", "rejected")
        }
        found |= {name: plan.path(Node(run, "split"), f"{name}.parquet") for name in ("lengths", "bins")}
        found |= {"pairs": plan.path(plan.pairs(run)), "config": plan.path(Node(run, "config"))}
        if config.mine:
            mine = Node(run, "mine")
            found |= {"mined": plan.path(mine), "mining": plan.path(mine, "mining.parquet")}
        if config.train:
            found["history"] = plan.path(Node(run, "train"), "history.parquet")
        if plan.weighs(run):
            found["weights"] = plan.path(Node(run, "weigh"))
        if config.score:
            found["scoring"] = plan.path(Node(run, "score"), "counts.parquet")
        if config.score and config.reranker.fit:
            found["teacher_history"] = plan.path(Node(run, "fit"), "history.parquet")
        if plan.benchmarks(run):
            found |= {"metrics": plan.path(Node(run, "metrics")), "runs": self.judged_runs(wildcards)}
            found["benchmarks"] = self.benchmark_tables(wildcards)
            found["leakage"] = plan.path(Node(run, "leakage"))
        others = [other for other in plan.runs if other != run and plan.benchmarks(other)]
        return found | {"variants": {other: plan.path(Node(other, "metrics")) for other in others}}

    def reported_files(self, wildcards: Any) -> list[str]:
        merged = [self.plan.path(Node(wildcards.run, "merge"))] if self.plan.config(wildcards.run).merge else []
        return _paths(self.reported(wildcards)) + merged

    def gated_report(self, wildcards: Any) -> list[str]:
        return [self.plan.path(Node(wildcards.run, "report"))] if self.plan.config(wildcards.run).report else []

    def costs(self, wildcards: Any) -> list[str]:
        """Folders of what the jobs cost: the main run's, whose stages are shared, and the run's own."""
        return list(dict.fromkeys(f"benchmarks/{run}" for run in (self.plan.main, wildcards.run)))

    def worked(self, wildcards: Any) -> dict[str, str]:
        """{job: the table that says how much it did}, by the name of the job's benchmark file."""
        plan, run = self.plan, wildcards.run
        config = plan.config(run)
        found = {"ingest": plan.path(Node(run, "ingest"), "queries.parquet")}
        found["split"] = plan.path(Node(run, "split"), "lengths.parquet")
        if config.mine:
            found["mine"] = plan.path(Node(run, "mine"), "mining.parquet")
            found |= {f"embed.{node.labels[0]}.{node.labels[2]}": plan.path(node) for node in plan.mined_vectors(run)}
        if config.score:
            found |= {f"scores.{node.labels[0]}": plan.path(node) for node in plan.scored_parts(run)}
        for name in plan.benchmarks(run):
            found[f"ingest.{name}"] = plan.path(Node(run, "benchmark", (name,)), "texts.parquet")
            embedded = {(model, part): plan.path(Node(run, "embed", (model, name, part)))
                        for model in plan.models(run) for part in plan.parts(run)}  # fmt: skip
            found |= {f"embed.{model}.{name}.{part}": path for (model, part), path in embedded.items()}
            found |= {f"evaluate.{name}.{judged}": embedded[judged.partition("-")[0], "queries"]
                      for judged in plan.judged(run)}  # fmt: skip
        return found


def _expand(patterns: Sequence[str], key: str) -> list[str]:
    """Files behind patterns; one that a rule makes, under results/, need not be there yet."""
    produced = [pattern for pattern in patterns if pattern.startswith("results/")]
    brought = [pattern for pattern in patterns if pattern not in produced]
    return produced + [str(file) for file in (expand(brought, key) if brought else [])]


def _paths(value: Any) -> list[str]:
    """All paths of a nested mapping, in order."""
    return [path for item in value.values() for path in _paths(item)] if isinstance(value, dict) else [value]
