"""Sections on data: what comes in, how it is split, embedded, mined and scored."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from retune.sections.base import Name, Paths, Section, Window, as_list
from retune.sections.evaluation import BenchmarkConfig
from retune.sections.models import EmbedderConfig


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
    """Kind of task of this dataset, where a row has none of its own: `only_1neg` takes one negative, `symmetric_class`
    none twice, `symmetric_sts` and `symmetric_clustering` read passages with the query's instruction."""
    in_batch_negatives: bool = True
    """Whether passages of other queries of a batch count as negatives; never for files or folders whose name ends in
    `no_in_batch_neg`."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Queries of a batch of this dataset, in each process, with `train.same_dataset_within_batch`; else
    `per_device_train_batch_size` counts, or half of it where the dataset's `type` is a symmetric one."""
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
    corpus: Annotated[list[str], BeforeValidator(as_list)] = Field(default_factory=list)
    """More passages to mine from: rows {"text"} (and "title"), or BEIR's corpus files."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`skip`: bad rows go to `rejected.parquet` with the reason, and the others on."""
    dev_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the queries that is set aside, never trained or mined on."""
    exclude_benchmarks: bool | Literal["queries"] = False
    """Leave out rows whose query is a query of a benchmark, or whose positive is a relevant passage of one, whatever
    their case and white space; they go to `rejected.parquet`. Negatives and passages of `corpus` that are relevant in a
    benchmark are left out by themselves. `queries`: only rows, and for the query's sake alone, where training and test
    share a corpus."""


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


Head = Literal["dense", "sparse", "colbert"]


class EmbedConfig(Section):
    shards: Annotated[int, Field(ge=1, le=99)] = 1
    """Files, and jobs, that a collection's texts are embedded in."""
    max_tokens_per_batch: Annotated[int, Field(ge=16)] | None = None
    """Padded tokens of a batch; found for the device and the model where not given."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored vectors."""
    heads: Annotated[list[Head], Field(min_length=1)] = ["dense"]
    """Of an M3 embedder, what is stored beside `dense`: `sparse`, the tokens' weights, and `colbert`, a vector for each
    token. What a benchmark needs is decided by `evaluate.heads`."""
    cache: bool = True
    """Take vectors of texts that the same model embedded before from `results/.vectors`, which links to results."""

    @field_validator("heads")
    @classmethod
    def _with_dense(cls, value: list[str]) -> list[str]:
        return [head for head in ("dense", "sparse", "colbert") if head == "dense" or head in value]


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
    """Drop candidates above (1 - margin) × the similarity of the query's positive, the least similar one where there
    are several (NV-Retriever, arXiv:2407.15831)."""
    absolute_margin: Annotated[float, Field(ge=0)] | None = None
    """Drop candidates above the similarity of the query's positive, the least similar one, less the margin."""
    max_score_of_teacher: float | None = None
    """Drop candidates that the reranker scores above the query's lowest scored positive by more than this; see
    `score.false_negatives`."""
    sampling: Literal["random", "top"] = "random"
    """`top`: the nearest candidates instead of a seeded draw."""
    pool: Literal["corpus", "bin"] = "corpus"
    """`bin`: only passages of the query's length bin."""
    retriever: Literal["dense", "bm25", "hybrid"] = "dense"
    """Who finds the candidates: vectors, words (then their similarity is the BM25 score), or both by reciprocal rank
    fusion (then it is that of the vectors)."""
    rrf_k: Annotated[int, Field(ge=1)] = 60
    """Constant of reciprocal rank fusion: a candidate's score is the sum of 1 / (rrf_k + rank)."""
    index_factory: str = "Flat"
    """`Flat` is exact; any other faiss index, such as `IVF1024,Flat` or `HNSW32`, trades exactness for speed."""
    nprobe: Annotated[int, Field(ge=1)] | None = None
    """Cells of an IVF index that a query looks into; faiss' own 1 where not given."""
    ef_search: Annotated[int, Field(ge=1)] | None = None
    """Candidates that a search in an HNSW index keeps."""
    index_train_size: Annotated[int, Field(ge=1)] | None = None
    """Vectors, drawn with the seed, that an index is trained on; 64 a cell, or at most 100,000, where not given."""
    use_gpu_for_searching: bool | None = None
    """Search on a GPU; where there is one, if not given."""
    search_batch_size: Annotated[int, Field(ge=1)] = 8192
    """Queries searched in one call."""
    shards: Annotated[int, Field(ge=1, le=99)] = 1
    """Jobs that an exact search by vectors is spread over, each with as many files of `embed.shards`, which is a
    multiple of it; what is found is the same."""
    keep_existing_neg: bool = False
    """Keep the negatives that came with the data, and mine those in addition."""
    on_shortage: Literal["random", "drop", "error"] = "random"
    """Where too few candidates are left: fill with random passages, drop the query, or stop."""


class ScoreConfig(Section):
    batch_tokens: Annotated[int, Field(ge=16)] | None = None
    """Padded tokens of a batch; found for the device and the model where not given."""
    shards: Annotated[int, Field(ge=1, le=99)] = 1
    """Jobs that the pairs are scored in."""
    false_negatives: Literal["drop", "relabel", "keep"] = "drop"
    """What becomes of negatives that `mine.max_score_of_teacher` tells: left out, made positives, or kept."""


class DemoConfig(Section):
    """The demo's raw data, made from the docstrings of installed Python packages, and for the guard set from manuals:
    the descriptions of packages and Python's language reference."""

    train_rows: Annotated[int, Field(ge=10)] = 4000
    """Training rows, drawn with the seed."""
    test_queries: Annotated[int, Field(ge=10)] = 500
    """Test queries, from packages that training never sees."""
    test_passages: Annotated[int, Field(ge=10)] = 2500
    """Passages that the test queries are searched in."""
    guard_queries: Annotated[int, Field(ge=10)] = 500
    """Queries of the guard set at most: headings of manuals."""
    guard_passages: Annotated[int, Field(ge=10)] = 1500
    """Passages of the guard set at most: what stands below the headings."""
    packages: list[str] | None = None
    """Packages whose docstrings are read; the standard library and what retune installs where not given."""
