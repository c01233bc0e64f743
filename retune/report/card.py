"""A model card in the Hugging Face form: what a model was made of, how it is used, what it is worth.

Metadata as YAML in front, then Markdown.  Knows facts alone: nothing of tables, stages or where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

MADE = {"tuned": "fine-tuned from", "merged": "a weighted sum of models, made from"}
RELATION = {"tuned": "finetune", "merged": "merge"}
HERE = "path/to/this/folder"  # where the card lies, for a reader who has it elsewhere
POOLING = {
    "cls": "the first token's vector",
    "mean": "the mean of the tokens' vectors",
    "last_token": "the last token's vector",
}


@dataclass(frozen=True)
class Data:
    """A dataset that a model was trained on."""

    name: str
    queries: int
    aside: int
    """Queries that were set aside, on which nothing was trained."""
    positives: int
    negatives: int


@dataclass(frozen=True)
class Value:
    """A measure of a model on a benchmark, with its 95% interval and its p-value against the base model."""

    benchmark: str
    model: str
    measure: str
    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Facts:
    """What a card says."""

    name: str
    kind: str
    """`tuned` or `merged`."""
    base: str
    hub_id: str | None
    """Of the base, where it is on the hub."""
    dim: int
    pooling: str | None
    normalize: bool
    max_length: int | None
    prompts: Mapping[str, str]
    """Of queries and documents."""
    settings: Mapping[str, Any]
    """Sections of the config that made it."""
    data: Sequence[Data] = ()
    mixture: Sequence[tuple[float, str]] = ()
    """(weight, model) of a merged model."""
    folder: str = "."
    """The model's, from where the card lies."""
    values: Sequence[Value] = field(default_factory=tuple)
    version: str = ""


def card(facts: Facts) -> str:
    """The whole card."""
    parts = [
        f"# {facts.name}",
        f"An embedding model, {MADE[facts.kind]} `{facts.base}`: queries and passages become vectors of {facts.dim} "
        "dimensions, and what belongs together lies near.",
        mixture(facts.mixture),
        _use(facts),
        _measured(facts),
        _data(facts.data),
        _settings(facts.settings),
        f"Made by retune {facts.version}.",
    ]
    return f"---\n{_metadata(facts)}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _metadata(facts: Facts) -> str:
    results = [
        EvalResult(
            task_type="information-retrieval", dataset_type=value.benchmark, dataset_name=value.benchmark,
            metric_type=value.measure.lower().replace("@", "_at_"), metric_name=value.measure,
            metric_value=round(value.value, 6),
        )
        for value in facts.values
        if value.model == facts.kind
    ]  # fmt: skip
    data = ModelCardData(
        library_name="sentence-transformers", pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "retrieval", facts.kind],
        base_model=facts.hub_id, model_name=facts.name, eval_results=results or None,
        **({"base_model_relation": RELATION[facts.kind]} if facts.hub_id else {}),
    )  # fmt: skip
    return data.to_yaml()


def mixture(parts: Sequence[tuple[float, str]]) -> str:
    """A table of (weight, model)."""
    return "\n".join(["| weight | model |", "|---|---|", *(f"| {w:.4g} | `{m}` |" for w, m in parts)]) if parts else ""


def _use(facts: Facts) -> str:
    where = PurePosixPath(HERE, facts.folder)
    query, document = facts.prompts.get("query", ""), facts.prompts.get("document", "")
    length = f", texts of up to {facts.max_length} tokens" if facts.max_length else ""
    scaled = ", scaled to length 1" if facts.normalize else ""
    similarity = "cosine" if facts.normalize else "dot product"
    vector = POOLING.get(facts.pooling, "what the model gives")
    lines = [
        "## Use", "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{where}")  # or its name, once it is on the hub',
        'queries = model.encode_query(["what is asked"])',
        'passages = model.encode_document(["a passage", "another one"])',
        "print(model.similarity(queries, passages))",
        "```",
        "",
        f"A vector is {vector}{scaled}; similarity is the {similarity}{length}.",
        "",
        "| | is put in front of the text |", "|---|---|",
        f"| a query | {_quoted(query)} |", f"| a passage | {_quoted(document)} |",
    ]  # fmt: skip
    return "\n".join(lines)


def _quoted(prompt: str) -> str:
    if not prompt:
        return "nothing"
    shown = prompt.replace("\n", "\\n").replace("|", "\\|")
    return f"`{shown}`"


def _measured(facts: Facts) -> str:
    if not facts.values:
        return ""
    blocks = [
        "## Measured",
        "Means over the queries, in brackets 95% bootstrap intervals; p of a paired test against base.",
    ]
    for benchmark in dict.fromkeys(value.benchmark for value in facts.values):
        own = [value for value in facts.values if value.benchmark == benchmark]
        measures = list(dict.fromkeys(value.measure for value in own))
        cells = {(value.model, value.measure): _cell(value) for value in own}
        rows = [
            [f"**{model}, this one**" if model == facts.kind else model, *(cells.get((model, m), "") for m in measures)]
            for model in dict.fromkeys(value.model for value in own)
        ]
        blocks.append(_table([benchmark, *measures], rows))
    return "\n\n".join(blocks)


def _cell(value: Value) -> str:
    interval = "" if value.low is None else f" [{value.low:.3f}, {value.high:.3f}]"
    p = "" if value.p is None else ", p < .001" if value.p < 0.001 else f", p = {value.p:.3f}".replace("0.", ".", 1)
    return f"{value.value:.4f}{interval}{p}"


def _data(data: Sequence[Data]) -> str:
    if not data:
        return ""
    rows = [[d.name, f"{d.queries:,}", f"{d.aside:,}", f"{d.positives:,}", f"{d.negatives:,}"] for d in data]
    return "## Data\n\n" + _table(["dataset", "queries", "of them set aside", "positives", "negatives"], rows)


def _settings(sections: Mapping[str, Any]) -> str:
    if not sections:
        return ""
    return "## Settings\n\n```yaml\n" + yaml.safe_dump(dict(sections), sort_keys=False, allow_unicode=True) + "```"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
