"""The config: typed sections, one source for defaults, schema and error messages.

A mistake is reported with the key's full path, what was expected and the nearest known key, and
all mistakes are reported at once.  Nothing here may import torch or transformers: a Snakefile is
parsed in a fraction of a second.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

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
from retune.sections.evaluation import BenchmarkConfig, EvaluateConfig, ReportConfig
from retune.sections.models import EmbedderConfig, ExampleConfig, FitConfig, RerankerConfig
from retune.sections.training import MergeConfig, TrainConfig

__all__ = [
    "NAME", "BenchmarkConfig", "Config", "DatasetConfig", "DemoConfig", "EmbedConfig", "EmbedderConfig",
    "EvaluateConfig", "ExampleConfig", "FitConfig", "IngestConfig", "MergeConfig", "MineConfig", "Name", "ReportConfig",
    "RerankerConfig", "ScoreConfig", "Section", "SplitConfig", "TrainConfig", "bounds",
]  # fmt: skip


class Config(Section):
    """One run: the main one, or a variant with its overrides applied."""

    name: Name = "run"
    """Of the experiment: `results/<name>/`."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Of every draw: dev split, sampling of negatives, data order, new heads."""
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

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        """What one section says must hold for the others."""
        if self.mine is not None and self.mine.max_score_of_teacher is not None:
            if self.reranker is None:
                raise ValueError("mine.max_score_of_teacher: expected a section `reranker` that names the teacher")
            if self.reranker.fit and self.score is None:
                raise ValueError("mine.max_score_of_teacher: a reranker that is fitted needs the section `score`")
        if self.reranker is None:
            if self.score is not None and "score" in self.model_fields_set:
                raise ValueError("score: expected a section `reranker` that names the teacher (or `score: null`)")
            self.score = None
        if self.train is None and self.merge is not None:
            if "tuned" in self.merge.models and "merge" in self.model_fields_set:
                raise ValueError("merge.models: `tuned` needs the section `train` (or `merge: null`)")
            self.merge = None
        made = ["base", *(["tuned"] if self.train else []), *(["merged"] if self.merge else [])]
        if self.evaluate is not None:
            if self.evaluate.models is None:
                self.evaluate.models = made
            for model in self.evaluate.models:
                if model not in made:
                    stage = {"tuned": "train", "merged": "merge"}[model]
                    raise ValueError(f"evaluate.models: `{model}` needs the section `{stage}`, which is off")
        return self

    @property
    def mining_teacher(self) -> RerankerConfig | None:
        """The reranker that filters candidates while they are mined.

        One that is fitted comes after mining, and where false negatives are relabelled or kept they must be mined
        first: then it is the stage score that treats them.
        """
        if self.mine is None or self.mine.max_score_of_teacher is None or self.reranker is None or self.reranker.fit:
            return None
        return self.reranker if self.score is None or self.score.false_negatives == "drop" else None
