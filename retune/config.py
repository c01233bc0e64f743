"""The config: typed sections, one source for defaults, schema and error messages.

A mistake is reported with the key's full path, what was expected and the nearest known key, and
all mistakes are reported at once.  Nothing here may import torch or transformers: a Snakefile is
parsed in a fraction of a second.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from retune.sections.base import NAME, Name, Section, bounds
from retune.sections.data import (
    DatasetConfig,
    DemoConfig,
    EmbedConfig,
    IngestConfig,
    MineConfig,
    ScoreConfig,
    SplitConfig,
)
from retune.sections.evaluation import BenchmarkConfig, EvaluateConfig, MinDeltaConfig, ReportConfig
from retune.sections.models import EmbedderConfig, ExampleConfig, FitConfig, RerankerConfig
from retune.sections.training import MergeConfig, SearchConfig, TrainConfig

__all__ = [
    "NAME", "BenchmarkConfig", "Config", "DatasetConfig", "DemoConfig", "EmbedConfig", "EmbedderConfig",
    "EvaluateConfig", "ExampleConfig", "FitConfig", "IngestConfig", "MergeConfig", "MinDeltaConfig", "MineConfig",
    "Name", "ReportConfig", "RerankerConfig", "ScoreConfig", "SearchConfig", "Section", "SplitConfig", "TrainConfig",
    "bounds",
]  # fmt: skip


class Config(Section):
    """One run: the main one, or a variant with its overrides applied."""

    name: Name = "run"
    """Of the experiment: `results/<name>/`."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Of every draw: dev split, sampling of negatives, data order, new heads."""
    cache_dir: str | None = None
    """Folder of models downloaded from the hub; the hub's own where not given. No result depends on it."""
    token: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
    """Name of the environment variable that holds the hub's token; `HF_TOKEN` where not given."""
    environment: Literal["cpu", "cuda"] = "cpu"
    """Which of `envs/` the jobs get under `--sdm conda`."""
    demo: DemoConfig | None = None
    """Make the demo's raw data in `results/<name>/raw`."""
    embedder: EmbedderConfig
    reranker: RerankerConfig | None = None
    ingest: IngestConfig
    split: SplitConfig = Field(default_factory=SplitConfig)
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    mine: MineConfig | None = Field(default_factory=MineConfig)
    score: ScoreConfig | None = Field(default_factory=ScoreConfig)
    """On where there is a `reranker`."""
    train: TrainConfig | None = Field(default_factory=TrainConfig)
    merge: MergeConfig | None = Field(default_factory=MergeConfig)
    evaluate: EvaluateConfig | None = Field(default_factory=EvaluateConfig)
    report: ReportConfig | None = Field(default_factory=ReportConfig)
    variants: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """{name: overrides of any key}; what equals an earlier variant is shared with it."""

    @field_validator("token")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        if value and value.startswith("hf_"):  # as the hub's tokens do
            raise ValueError(
                "expected the name of an environment variable, found a token: its value would be in results/"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        """What one section says must hold for the others."""
        if self.mine is not None and self.mine.max_score_of_teacher is not None:
            if self.reranker is None:
                raise ValueError("mine.max_score_of_teacher: expected a section `reranker` that names the teacher")
            if self.reranker.fit and self.score is None:
                raise ValueError("mine.max_score_of_teacher: a reranker that is fitted needs the section `score`")
        self._check_shards()
        if self.reranker is None:
            if self.score is not None and "score" in self.model_fields_set:
                raise ValueError("score: expected a section `reranker` that names the teacher (or `score: null`)")
            self.score = None
        if self.train is not None and self.train.continue_adapters and not self.embedder.peft_path:
            raise ValueError("train.continue_adapters: expected embedder.peft_path, the adapters to go on from")
        if self.train is None and self.merge is not None:
            if "tuned" in self.merge.models and "merge" in self.model_fields_set:
                raise ValueError("merge.models: `tuned` needs the section `train` (or `merge: null`)")
            self.merge = None
        if self.merge is not None and (reason := self._unmergeable()):
            if "merge" in self.model_fields_set:
                raise ValueError(f"merge.models: {reason}; set `merge: null`")
            self.merge = None
        if self.merge is not None and self.merge.search and not self.ingest.dev_fraction:
            raise ValueError("merge.search: it needs queries that are set aside; set ingest.dev_fraction above 0")
        if self.ingest.exclude_benchmarks and not (self.evaluate and self.evaluate.benchmarks):
            raise ValueError("ingest.exclude_benchmarks: expected benchmarks in the section `evaluate`")
        made = ["base", *(["tuned"] if self.train else []), *(["merged"] if self.merge else [])]
        if self.evaluate is not None:
            if "train" in self.evaluate.benchmarks:
                raise ValueError("evaluate.benchmarks.train: the training texts are called so; expected another name")
            self._check_guards()
            if self.evaluate.models is None:
                self.evaluate.models = made
            for model in self.evaluate.models:
                if model not in made:
                    stage = {"tuned": "train", "merged": "merge"}[model]
                    raise ValueError(f"evaluate.models: `{model}` needs the section `{stage}`, which is off")
            _complete_gate(self.evaluate)
        return self

    def _check_guards(self) -> None:
        """A search for merging weights tells guard sets by name from the queries that were set aside."""
        dev = self.evaluate.benchmarks.get("dev")
        if self.merge is not None and self.merge.search and dev is not None and dev.guard:
            raise ValueError(
                "evaluate.benchmarks.dev: merge.search calls the queries that are set aside so; expected another name "
                "for a guard set"
            )

    def _unmergeable(self) -> str | None:
        """Why the models of `merge` have no weights to be summed up one by one; None where they have."""
        if "tuned" in self.merge.models and self.train.use_lora and not self.train.save_merged_lora_model:
            return "`tuned` is adapters alone (train.save_merged_lora_model: false)"
        if "base" in self.merge.models and self.embedder.peft_path:
            return "of `base`, adapters (embedder.peft_path) are not merged"
        if {"base", "tuned"} <= set(self.merge.models) and self.train.additional_special_tokens:
            return "`tuned` has tokens (train.additional_special_tokens) that `base` has not"
        return None

    def _check_shards(self) -> None:
        """A search in parts is exact, by vectors, and of whole files of vectors."""
        mine = self.mine
        if mine is None or mine.shards == 1:
            return
        if mine.retriever == "bm25" or mine.index_factory != "Flat":
            raise ValueError(
                "mine.shards: only an exact search by vectors is cut; set it to 1, or see mine.index_factory"
            )
        if self.embed.shards % mine.shards:
            raise ValueError(
                f"mine.shards: expected a divisor of embed.shards, {self.embed.shards}, found {mine.shards}"
            )

    @property
    def mining_teacher(self) -> RerankerConfig | None:
        """The reranker that filters candidates while they are mined.

        One that is fitted comes after mining, and where false negatives are relabelled or kept they must be mined
        first: then it is the stage score that treats them.
        """
        if self.mine is None or self.mine.max_score_of_teacher is None or self.reranker is None or self.reranker.fit:
            return None
        return self.reranker if self.score is None or self.score.false_negatives == "drop" else None


def _complete_gate(evaluate: EvaluateConfig) -> None:
    """Which models `min_delta` is for, where it does not say; raises a ValueError where it can compare nothing."""
    gate = evaluate.min_delta
    if gate is None:
        return
    others = [model for model in evaluate.models if model != "base"]
    if "base" not in evaluate.models or not others:
        raise ValueError("evaluate.min_delta: expected `base` and another model in evaluate.models")
    if not evaluate.benchmarks:
        raise ValueError("evaluate.min_delta: expected a benchmark to compare models on")
    if gate.models is None:
        gate.models = others[-1:]
    if lost := [model for model in gate.models if model not in others]:
        raise ValueError(f"evaluate.min_delta.models: `{lost[0]}` is not in evaluate.models")
