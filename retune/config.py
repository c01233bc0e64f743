"""The config: typed sections, one source for defaults, schema and error messages.

A mistake is reported with the key's full path, what was expected and the nearest known key, and
all mistakes are reported at once.  Nothing here may import torch or transformers: a Snakefile is
parsed in a fraction of a second.
"""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
Name = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """A part of the config: unknown keys are mistakes, defaults are documented in the schema."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


def _window(value: Any) -> Any:
    """Accept `10-210` and `[10, 210]`; keep the written form `10-210`."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        value = f"{value[0]}-{value[1]}"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*", value)
        if not match:
            raise ValueError("expected two numbers such as 10-210")
        if float(match[1]) >= float(match[2]):
            raise ValueError(f"expected the smaller number first, found {value}")
        return value
    raise ValueError("expected two numbers such as 10-210")


Window = Annotated[str, BeforeValidator(_window)]


def bounds(window: str) -> tuple[float, float]:
    """The two numbers of a window such as `10-210`."""
    low, high = window.split("-")
    return float(low), float(high)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]


def _numbers(value: Any) -> Any:
    """YAML reads `1e-5` as a string; make it the number that was meant, at any depth."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value.strip()):
        return float(value)
    return value


TrainingArgs = Annotated[dict[str, Any], BeforeValidator(_numbers)]


def _two_places(value: str) -> str:
    if value.count("{}") != 2:
        raise ValueError("expected two places written {}: one for the instruction, one for the text")
    return value


Template = Annotated[str, AfterValidator(_two_places)]


class EmbedderConfig(Section):
    model: str
    """A folder, a hub id, `package:<python package>` or `variant:<name>`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Checksum that the model's `model.safetensors` must have."""
    family: Literal["encoder"] | None = None
    """Kind of model; read from the checkpoint where not given."""
    pooling: Literal["cls", "mean", "last_token"] | None = None
    """How token vectors become one vector; read from the checkpoint where not given."""
    normalize: bool | None = None
    """Scale vectors to length 1; read from the checkpoint where not given."""
    query_instruction: str | None = None
    """Instruction of queries; read from the checkpoint's prompts where not given."""
    query_instruction_format: Template = "{}{}"
    """Where the instruction (first) and the query (second) go."""
    passage_instruction: str | None = None
    """Instruction of passages, likewise."""
    passage_instruction_format: Template = "{}{}"
    """Where the instruction (first) and the passage (second) go."""
    query_max_length: Annotated[int, Field(ge=3)] | None = None
    """Tokens, special ones included; the checkpoint's own limit where not given."""
    passage_max_length: Annotated[int, Field(ge=3)] | None = None
    """Likewise."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the hardware has it, float32 elsewhere."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the checkpoint. Off unless you trust its authors."""


class FitConfig(Section):
    """Training of one's own cross-encoder, from an encoder, on the mined pairs."""

    max_queries: Annotated[int, Field(ge=1)] | None = None
    """Train on at most so many queries, drawn with the seed."""
    train_group_size: Annotated[int, Field(ge=2)] = 8
    """Passages of a group: one positive, the others negatives."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout during training; the checkpoint's own where not given."""
    args: TrainingArgs = Field(default_factory=dict)
    """Any `transformers.TrainingArguments`."""


class RerankerConfig(Section):
    model: str
    """A folder, a hub id or `package:<python package>`; with `fit`, the encoder to start from."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Checksum that the model's `model.safetensors` must have."""
    family: Literal["auto", "encoder-only-base"] = "auto"
    """`encoder-only-base`: a sequence classifier with one logit."""
    query_instruction: str | None = None
    """Instruction of queries."""
    query_instruction_format: Template = "{}{}"
    """Where the instruction (first) and the query (second) go."""
    passage_instruction: str | None = None
    """Instruction of passages."""
    passage_instruction_format: Template = "{}{}"
    """Where the instruction (first) and the passage (second) go."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of query, passage and special tokens together; only the passage is cut beyond `query_max_length`."""
    query_max_length: Annotated[int, Field(ge=3)] | None = None
    """Tokens of the query; three quarters of `max_length` where not given."""
    normalize: bool = False
    """Sigmoid of the logit instead of the logit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the hardware has it, float32 elsewhere."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the checkpoint. Off unless you trust its authors."""
    fit: FitConfig | None = None
    """Train this reranker first, from the encoder `model`, on the mined pairs."""


class DatasetConfig(Section):
    path: Paths
    """Files, folders or globs of JSONL (plain, .gz, .zst) or Parquet; for `beir` its folders."""
    format: Literal["rows", "beir"] = "rows"
    """`rows`: {query, pos, neg}; `beir`: a folder whose judgments, qrels/<split>.tsv, become pairs."""
    split: str = "train"
    """Names the judgments of a BEIR folder."""
    prompt: str | None = None
    """Instruction of this dataset's queries, where a row has none of its own."""
    type: str | None = None
    """Kind of task of this dataset, where a row has none of its own."""
    in_batch_negatives: bool = True
    """Whether passages of other queries of a batch count as negatives."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Kept in the table of queries, for training."""
    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Take at most so many rows: the first ones."""

    def files(self) -> list[str]:
        """Paths, folders and globs that are read."""
        if self.format == "rows":
            return self.path
        return [
            file for folder in self.path for file in BenchmarkConfig(path=folder, split=self.split).files().values()
        ]


def _datasets(value: Any) -> Any:
    """A path, a list of paths, or {dataset: path or options} → {dataset: options}."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and all(isinstance(path, str) for path in value):
        named: dict[str, Any] = {}
        for path in value:
            stem = re.sub(r"(\.jsonl|\.json|\.parquet)?(\.gz|\.zst)?$", "", path.rstrip("/").rsplit("/")[-1])
            stem = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-") or "train"
            name, count = stem, 2
            while name in named:
                name, count = f"{stem}_{count}", count + 1
            named[name] = {"path": [path]}
        return named
    if isinstance(value, dict):
        return {name: item if isinstance(item, dict) else {"path": item} for name, item in value.items()}
    raise ValueError("expected a path, a list of paths or a mapping of dataset names")


class IngestConfig(Section):
    train: Annotated[dict[Name, DatasetConfig], BeforeValidator(_datasets), Field(min_length=1)]
    """Files, folders, globs; a mapping gives a dataset its own options."""
    corpus: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
    """More passages to mine from: rows {"text"} (and "title"), or BEIR's corpus files."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`skip`: bad rows go to `rejected.parquet` with the reason, and the others on."""
    dev_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the queries that is set aside, never trained or mined on."""


class SplitConfig(Section):
    length_list: list[Annotated[int, Field(ge=0)]] = [0, 500, 1000, 2000, 3000, 4000, 5000, 6000, 7000]
    """Lower bounds of the bins, in tokens, rising."""
    drop_longer_than: Annotated[int, Field(ge=1)] | None = None
    """Queries whose longest text has more tokens are left out of training."""

    @field_validator("length_list")
    @classmethod
    def _rising(cls, value: list[int]) -> list[int]:
        if not value or any(a >= b for a, b in itertools.pairwise(value)):
            raise ValueError("expected rising numbers")
        return value


class EmbedConfig(Section):
    shards: Annotated[int, Field(ge=1, le=99)] = 1
    """Files, and jobs, that a collection's texts are embedded in."""
    max_tokens_per_batch: Annotated[int, Field(ge=16)] | None = None
    """Padded tokens of a batch; chosen for the device where not given."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored vectors."""


class MineConfig(Section):
    embedder: EmbedderConfig | None = None
    """Mine with another model than the one that is trained."""
    range_for_sampling: Window = "10-210"
    """Ranks (from 0, the second excluded) from which negatives are drawn."""
    negative_number: Annotated[int, Field(ge=1)] = 15
    """Negatives of a query."""
    similarity_range: Window | None = None
    """Keep candidates whose similarity lies within, for example 0.3-0.8."""
    relative_margin: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Drop candidates above (1 - margin) × the similarity of the query's positive (NV-Retriever, arXiv:2407.15831)."""
    absolute_margin: Annotated[float, Field(ge=0)] | None = None
    """Drop candidates above the similarity of the query's positive less the margin."""
    sampling: Literal["random", "top"] = "random"
    """`top`: the nearest candidates instead of a seeded draw."""
    pool: Literal["corpus", "bin"] = "corpus"
    """`bin`: only passages of the query's length bin."""
    search_batch_size: Annotated[int, Field(ge=1)] = 1024
    """Queries searched in one call."""
    keep_existing_neg: bool = False
    """Keep the negatives that came with the data, and mine those in addition."""
    on_shortage: Literal["random", "drop", "error"] = "random"
    """Where too few candidates are left: fill with random passages, drop the query, or stop."""


class ScoreConfig(Section):
    batch_tokens: Annotated[int, Field(ge=16)] | None = None
    """Padded tokens of a batch; chosen for the device where not given."""


class TrainConfig(Section):
    train_group_size: Annotated[int, Field(ge=1)] = 8
    """Passages of a group: one positive, the others negatives."""
    temperature: Annotated[float, Field(gt=0)] = 0.02
    """Scores are divided by it before the softmax."""
    use_inbatch_neg: bool = True
    """Passages of the other queries of a batch count as negatives."""
    negatives_cross_device: bool = False
    """Passages of all processes count as in-batch negatives."""
    mask_false_negatives: Literal["ids"] | None = "ids"
    """`ids`: a passage that is a positive of the query never counts as its in-batch negative."""
    knowledge_distillation: bool = False
    """Learn from the teacher's scores (section `score`, or scores that came with the data)."""
    kd_loss_type: Literal["kl_div"] = "kl_div"
    """`kl_div`: soft cross-entropy with the teacher on the group, plus InfoNCE."""
    max_tokens_per_batch: Annotated[int, Field(ge=16)] | None = None
    """Padded tokens of one forward pass; a training batch is cut into such chunks, sorted by length."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout during training; the checkpoint's own where not given. 0 saves a tenth of the time on a CPU."""
    nproc_per_node: Annotated[int, Field(ge=1)] = 1
    """Processes of torchrun; 1 needs no process group."""
    args: TrainingArgs = Field(default_factory=dict)
    """Any `transformers.TrainingArguments`, by its own name."""


class MergeConfig(Section):
    models: list[str] = ["base", "tuned"]
    """`base`, `tuned`, folders, hub ids, `package:…` or `variant:<name>`."""
    weights: list[float] = [0.5, 0.5]
    """One weight a model."""

    @model_validator(mode="after")
    def _one_each(self) -> MergeConfig:
        if len(self.models) != len(self.weights):
            raise ValueError(f"expected one weight a model, found {len(self.weights)} for {len(self.models)}")
        return self


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


class DemoConfig(Section):
    """The demo's raw data, made from the docstrings of installed Python packages."""

    train_rows: Annotated[int, Field(ge=10)] = 4000
    """Training rows, drawn with the seed."""
    test_queries: Annotated[int, Field(ge=10)] = 500
    """Test queries, from packages that training never sees."""
    test_passages: Annotated[int, Field(ge=10)] = 2500
    """Passages that the test queries are searched in."""
    packages: list[str] | None = None
    """Packages whose docstrings are read; the standard library and what retune installs where not given."""


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
