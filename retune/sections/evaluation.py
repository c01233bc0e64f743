"""Sections on what is measured and shown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from retune.sections.base import Name, Section


class BenchmarkConfig(Section):
    format: Literal["beir", "flag"] = "beir"
    """`beir`: queries and corpus as JSONL and judgments as TSV; `flag`: rows {query, pos, neg}."""
    path: str | None = None
    """A BEIR folder: queries.jsonl, corpus.jsonl, qrels/<split>.tsv."""
    queries: str | None = None
    """File of queries; for `flag` the rows {query, pos, neg}."""
    corpus: str | None = None
    """File of passages; for `flag` in addition to those of the rows."""
    qrels: str | None = None
    """File of judgments: query id, passage id, grade."""
    split: str = "test"
    """Names the judgments of a BEIR folder."""
    guard: bool = False
    """Shows whether general ability was lost; `merge.search` lets it lose no more than `max_guard_loss`."""

    @model_validator(mode="after")
    def _complete(self) -> BenchmarkConfig:
        if self.format == "beir" and not self.path and not (self.queries and self.corpus and self.qrels):
            raise ValueError("expected `path`, or `queries`, `corpus` and `qrels`")
        if self.format == "flag" and not self.queries:
            raise ValueError("expected `queries`: a file of rows {query, pos, neg}")
        return self

    def files(self) -> dict[str, str]:
        """The benchmark's files by role: queries, corpus and qrels (corpus is optional for `flag`)."""
        base = f"{self.path.rstrip('/')}/" if self.path else ""
        if self.format == "flag":
            found = {"queries": self.queries, "corpus": self.corpus}
        else:
            found = {
                "queries": self.queries or f"{base}queries.jsonl",
                "corpus": self.corpus or f"{base}corpus.jsonl",
                "qrels": self.qrels or f"{base}qrels/{self.split}.tsv",
            }
        return {role: path for role, path in found.items() if path}


class EvaluateConfig(Section):
    benchmarks: dict[Name, BenchmarkConfig] = Field(default_factory=dict)
    """{name: where its queries, passages and judgments are}."""
    k: Annotated[int, Field(ge=1)] = 100
    """Passages retrieved for a query."""
    cutoffs: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1, 10, 100]
    """The k of MRR@k, nDCG@k, Recall@k and the others."""
    models: list[Literal["base", "tuned", "merged"]] | None = None
    """Those that the config makes, where not given."""

    @model_validator(mode="after")
    def _within(self) -> EvaluateConfig:
        if max(self.cutoffs) > self.k:
            raise ValueError(f"cutoffs: expected at most k = {self.k}, found {max(self.cutoffs)}")
        return self


class ReportConfig(Section):
    examples: Annotated[int, Field(ge=0)] = 10
    """Queries shown that got better, and as many that got worse."""
