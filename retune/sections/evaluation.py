"""Sections on what is measured and shown."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from retune.sections.base import Name, Section

HUB = "hub:"
REFERENCE = r"hub:[\w.-]+/[\w.-]+(@[\w./-]+)?(:.+)?"


def _reference(value: str | None) -> str | None:
    if value is not None and value.startswith(HUB) and not re.fullmatch(REFERENCE, value):
        raise ValueError("expected hub:<owner>/<name>, with @<revision> and then :<files> behind it where wanted")
    return value


Place = Annotated[str | None, AfterValidator(_reference)]


class BenchmarkConfig(Section):
    format: Literal["beir", "flag", "msmarco", "intel"] = "beir"
    """`beir`: queries {_id, text} and passages {_id, title, text} as JSONL, or either as a TSV of ids and texts, and
    judgments as TSV or in TREC's form. The others judge by text: `flag`: rows {query, pos, neg}; `msmarco`: rows
    {query, positive} and passages {content}, as FlagEmbedding's eval_msmarco has them; `intel`: rows {query, pos} and
    passages {context: [..]}."""
    path: Place = None
    """A BEIR folder: queries.jsonl, corpus.jsonl, qrels/<split>.tsv; or `hub:BeIR/<name>`, whose judgments are those of
    `hub:BeIR/<name>-qrels`. With a revision, `hub:BeIR/<name>@<revision>`, `qrels` names that of the judgments."""
    queries: Place = None
    """File of queries, or a data set on the hub: `hub:<owner>/<name>[@<revision>][:<files>]`, where `<files>` is a glob
    or a word that the files' paths hold; `split` where not given."""
    corpus: Place = None
    """File of passages, or a data set on the hub (its `train` where no files are named); for `flag` in addition to
    those of the rows."""
    qrels: Place = None
    """File of judgments: query id, passage id, grade; or query id, 0, passage id, grade (TREC)."""
    split: str = "test"
    """Names the judgments of a BEIR folder, or the queries on the hub."""
    relevant_from: Annotated[int, Field(ge=1)] = 1
    """Lowest grade that counts as relevant for all measures but nDCG, which takes the grades as they are: 2 for the
    passage judgments of TREC's Deep Learning tracks."""
    n_queries: Annotated[int, Field(ge=1)] | None = None
    """Queries that there must be, those without a positive judgment not counted; a mistake where there are others."""
    n_passages: Annotated[int, Field(ge=1)] | None = None
    """Passages that there must be, likewise."""
    guard: bool = False
    """Shows whether general ability is lost, instead of what is gained; see `evaluate.min_delta` and `merge.search`."""

    @model_validator(mode="after")
    def _complete(self) -> BenchmarkConfig:
        if self.format == "beir" and not self.path and not (self.queries and self.corpus and self.qrels):
            raise ValueError("expected `path`, or `queries`, `corpus` and `qrels`")
        if self.format == "flag" and not self.queries:
            raise ValueError("expected `queries`: a file of rows {query, pos, neg}")
        if self.format in ("msmarco", "intel") and not (self.queries and self.corpus):
            raise ValueError("expected `queries` and `corpus`")
        self._without_effect()
        return self

    def _without_effect(self) -> None:
        """Refuse a place that no file would be read from, and a hub's folder that does not say all that is needed."""
        if self.format != "beir":
            for key in ("path", "qrels"):
                if getattr(self, key):
                    raise ValueError(f"{key}: nothing is read from there with format {self.format}, only with beir")
        if not self.path:
            return
        if self.queries and self.corpus and self.qrels:
            raise ValueError("path: nothing is read from there beside `queries`, `corpus` and `qrels`")
        repository, _, files = self.path.removeprefix(HUB).partition(":")
        if self.path.startswith(HUB) and files:
            raise ValueError("path: a whole data set, without files; `queries`, `corpus` and `qrels` can name those")
        if self.path.startswith(HUB) and "@" in repository and not self.qrels:
            judged = f"{HUB}{repository.partition('@')[0]}-qrels@<revision>"
            raise ValueError(f"path: the judgments have a revision of their own; expected `qrels` too: {judged}")

    def files(self) -> dict[str, str]:
        """The benchmark's files by role: queries, corpus and qrels; a reference to the hub names its files."""
        if self.format != "beir":
            found, words = {"queries": self.queries, "corpus": self.corpus}, {"queries": self.split, "corpus": "train"}
        else:
            base = self.path.rstrip("/") if self.path else ""
            hub = base.startswith(HUB)
            found = {
                "queries": self.queries or (base if hub else f"{base}/queries.jsonl"),
                "corpus": self.corpus or (base if hub else f"{base}/corpus.jsonl"),
                "qrels": self.qrels or (f"{base}-qrels" if hub else f"{base}/qrels/{self.split}.tsv"),
            }
            words = {"queries": "queries", "corpus": "corpus", "qrels": self.split}
        return {role: _with_files(path, words[role]) for role, path in found.items() if path}


def _with_files(path: str, word: str) -> str:
    return f"{path}:{word}" if path.startswith(HUB) and ":" not in path.removeprefix(HUB) else path


class MinDeltaConfig(Section):
    """What a model must gain or keep: where it does not, the rule `gate` fails with the table in its message.

    Metrics and report stay."""

    measure: Annotated[str, Field(pattern=r"^(MRR|Recall|nDCG|MAP|P|Hit)@[1-9][0-9]*$")] = "nDCG@10"
    """Whose means over the queries are compared."""
    target: float = 0.0
    """Least difference to base on every benchmark without `guard: true`."""
    guard: float = 0.0
    """Least difference to base on every benchmark with `guard: true`; -0.01 allows a loss of .01."""
    models: list[Literal["tuned", "merged"]] | None = None
    """Those that must pass; the last of `evaluate.models` where not given."""


Ranker = Literal["dense", "sparse", "colbert", "hybrid", "dense+sparse"]


class SumWeights(Section):
    """Of each head's scores in `hybrid`, and in `dense+sparse`, which leaves colbert out."""

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
    index_factory: str = "Flat"
    """`Flat` is exact; any other faiss index, such as `IVF4096,Flat` or `HNSW32`, may miss passages."""
    nprobe: Annotated[int, Field(ge=1)] | None = None
    """Cells of an IVF index that a query looks into; faiss' own 1 where not given."""
    ef_search: Annotated[int, Field(ge=1)] | None = None
    """Candidates that a search in an HNSW index keeps."""
    index_train_size: Annotated[int, Field(ge=1)] | None = None
    """Vectors, drawn with the seed, that an index is trained on; 64 a cell, or at most 100,000, where not given."""

    min_delta: MinDeltaConfig | None = None
    """Off where not given."""
    trec: bool = False
    """Write each run in TREC's form as well, `<model>.trec` beside it."""

    heads: Annotated[list[Ranker], Field(min_length=1)] = ["dense"]
    """Who ranks: `dense` by vectors, `sparse` by the tokens' weights, `colbert` by the tokens' vectors among the `k`
    that dense ranks first, `hybrid` by their weighted sum among the first `k` of dense and of sparse, `dense+sparse` by
    the sum without colbert. All but dense need an M3 embedder; each is measured by itself, as `tuned-sparse` and so on.
    """
    head_weights: SumWeights = Field(default_factory=SumWeights)
    """How much each head counts in `hybrid` and `dense+sparse`."""

    def stored_heads(self) -> list[str]:
        """What of an embedder's heads the rankings need."""
        needed = {"sparse": {"sparse"}, "colbert": {"colbert"}}
        needed["hybrid"] = {head for head in ("sparse", "colbert") if getattr(self.head_weights, head)}
        needed["dense+sparse"] = needed["hybrid"] & {"sparse"}
        found = set().union(*(needed.get(ranker, set()) for ranker in self.heads))
        return [head for head in ("dense", "sparse", "colbert") if head == "dense" or head in found]

    @model_validator(mode="after")
    def _within(self) -> EvaluateConfig:
        if max(self.cutoffs) > self.k:
            raise ValueError(f"cutoffs: expected at most k = {self.k}, found {max(self.cutoffs)}")
        if self.min_delta and int(self.min_delta.measure.split("@")[1]) not in self.cutoffs:
            raise ValueError(f"min_delta: {self.min_delta.measure} is none of the cutoffs {self.cutoffs}")
        if len(set(self.heads)) < len(self.heads):
            raise ValueError("heads: one is named twice")
        if self.min_delta and "dense" not in self.heads:
            raise ValueError("min_delta: it compares models by dense, which is not in heads")
        return self


class ReportConfig(Section):
    examples: Annotated[int, Field(ge=0)] = 10
    """Queries shown that got better, and as many that got worse."""
