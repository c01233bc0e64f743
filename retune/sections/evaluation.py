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


class SumWeights(Section):
    """Of each head's scores in `hybrid`."""

    dense: float = 1.0
    sparse: float = 0.3
    colbert: float = 1.0


class EvaluateConfig(Section):
    benchmarks: dict[Name, BenchmarkConfig] = Field(default_factory=dict)
    """{name: where its queries, passages and judgments are}."""
    k: Annotated[int, Field(ge=1)] = 100
    """Passages retrieved for a query."""
    cutoffs: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1, 10, 100]
    """The k of MRR@k, nDCG@k, Recall@k and the others."""
    models: list[Literal["base", "tuned", "merged"]] | None = None
    """Those that the config makes, where not given."""

    heads: Annotated[list[Literal["dense", "sparse", "colbert", "hybrid"]], Field(min_length=1)] = ["dense"]
    """Who ranks: `dense` by vectors, `sparse` by the tokens' weights, `colbert` by the tokens' vectors among the `k`
    that dense ranks first, `hybrid` by their weighted sum among the first `k` of dense and of sparse. All but dense
    need an M3 embedder; each is measured by itself, as `tuned-sparse` and so on."""
    head_weights: SumWeights = Field(default_factory=SumWeights)
    """How much each head counts in `hybrid`."""

    def stored_heads(self) -> list[str]:
        """What of an embedder's heads the rankings need."""
        needed = {"sparse": {"sparse"}, "colbert": {"colbert"}}
        needed["hybrid"] = {head for head in ("sparse", "colbert") if getattr(self.head_weights, head)}
        found = set().union(*(needed.get(ranker, set()) for ranker in self.heads))
        return [head for head in ("dense", "sparse", "colbert") if head == "dense" or head in found]

    @model_validator(mode="after")
    def _within(self) -> EvaluateConfig:
        if max(self.cutoffs) > self.k:
            raise ValueError(f"cutoffs: expected at most k = {self.k}, found {max(self.cutoffs)}")
        if len(set(self.heads)) < len(self.heads):
            raise ValueError("heads: one is named twice")
        return self


class ReportConfig(Section):
    examples: Annotated[int, Field(ge=0)] = 10
    """Queries shown that got better, and as many that got worse."""
