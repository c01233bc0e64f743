"""Sections on models: the embedder, and the reranker with its own training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from retune.sections.base import ExampleTemplate, Section, Template, TrainingArgs, WithBreaks, as_layers
from retune.sections.lora import LoraKeys


class ExampleConfig(Section):
    """A solved example for an in-context model."""

    instruct: str | None = None
    """Its instruction; that of the queries where not given."""
    query: str
    """Its query."""
    response: str
    """What answers it."""


class EmbedderConfig(Section):
    model: str
    """A folder, a hub id, `package:<python package>` or `variant:<name>`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Checksum that the model's `model.safetensors` must have."""
    peft_path: str | None = None
    """LoRA adapters, a folder or a hub id, that are folded into the model; see also `train.continue_adapters`."""
    config_name: str | None = None
    """A folder or a hub id whose `config.json` holds in place of the model's own."""
    tokenizer_name: str | None = None
    """A folder or a hub id whose tokenizer is used in place of the model's own."""
    family: Literal["encoder", "m3", "decoder", "icl"] | None = None
    """Kind of model; read from the checkpoint where not given."""
    pooling: Literal["cls", "mean", "last_token"] | None = None
    """How token vectors become one vector; read from the checkpoint where not given."""
    normalize: bool | None = None
    """Scale vectors to length 1; read from the checkpoint where not given."""
    query_instruction: str | None = None
    """Instruction of queries; read from the checkpoint's prompts where not given."""
    query_instruction_format: Template | None = None
    """Where the instruction (first) and the query (second) go; `\\n` is a line break. Where not given, as the
    checkpoint has it, else `{}{}`."""
    passage_instruction: str | None = None
    """Instruction of passages, likewise."""
    passage_instruction_format: Template | None = None
    """Where the instruction (first) and the passage (second) go, likewise."""
    examples: list[ExampleConfig] = []
    """Solved examples that an in-context model reads before every query."""
    examples_instruction_format: ExampleTemplate = "<instruct>{}\n<query>{}\n<response>{}"
    """Where an example's instruction, query and response go."""
    icl_suffix_str: WithBreaks | None = None
    """What an in-context model reads after every query; the checkpoint's own where not given, else `\\n<response>`."""
    query_max_length: Annotated[int, Field(ge=3)] | None = None
    """Tokens, special ones included; the checkpoint's own limit where not given."""
    passage_max_length: Annotated[int, Field(ge=3)] | None = None
    """Likewise."""
    truncate_dim: Annotated[int, Field(ge=1)] | None = None
    """Keep the first so many dimensions of each vector (Matryoshka), then normalise."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the hardware has it, float32 elsewhere."""
    use_flash_attn: bool = False
    """Compute attention by the package flash-attn: on GPUs and in 16 bits alone."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the checkpoint. Off unless you trust its authors."""


class FitConfig(LoraKeys):
    """Training of one's own cross-encoder, from an encoder, on the mined pairs."""

    max_queries: Annotated[int, Field(ge=1)] | None = None
    """Train on at most so many queries, drawn with the seed."""
    train_group_size: Annotated[int, Field(ge=2)] = 8
    """Passages of a group: one positive, the others negatives."""
    loss: Literal["listwise", "pointwise"] = "listwise"
    """`listwise`: cross entropy over a group; `pointwise`: binary cross entropy of each pair."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout during training; the checkpoint's own where not given."""
    dev_queries: Annotated[int, Field(ge=0)] = 0
    """Queries held back from the fit: the checkpoint with the best MRR on them becomes the model. 0: the last one."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations on the queries held back without a better one."""
    args: TrainingArgs = Field(default_factory=dict)
    """Any `transformers.TrainingArguments`."""


class RerankerConfig(Section):
    model: str
    """A folder, a hub id or `package:<python package>`; with `fit`, the encoder to start from."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Checksum that the model's `model.safetensors` must have."""
    family: Literal[
        "auto", "encoder-only-base", "decoder-only-base", "decoder-only-layerwise", "decoder-only-lightweight",
        "decoder-only-yes-no",
    ] = "auto"  # fmt: skip
    """How the model tells its score: a classifier's logit (`encoder-only-base`: bge-reranker-base and any CrossEncoder
    with one label), a language model's logit of "Yes" (`decoder-only-base`), the same at chosen layers (`-layerwise`),
    with tokens merged on the way (`-lightweight`), or the logit of "yes" less that of "no" (`-yes-no`:
    Qwen3-Reranker); `auto` asks the checkpoint."""
    peft_path: str | None = None
    """LoRA adapters, a folder or a hub id, that are folded into the model."""
    query_instruction: str | None = None
    """Instruction of queries; decoders read it after their `A: `, or where their chat template has its place."""
    query_instruction_format: Template = "{}{}"
    """Where the instruction (first) and the query (second) go."""
    passage_instruction: str | None = None
    """Instruction of passages."""
    passage_instruction_format: Template = "{}{}"
    """Where the instruction (first) and the passage (second) go."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of query, passage and special tokens together; only the passage is cut beyond `query_max_length`. The
    question that a decoder is asked comes on top; a chat template counts."""
    query_max_length: Annotated[int, Field(ge=3)] | None = None
    """Tokens of the query; three quarters of `max_length` where not given."""
    normalize: bool = False
    """Sigmoid of the score instead of the score, as a CrossEncoder with that activation gives it; of
    `decoder-only-yes-no` this is the probability of "yes"."""
    prompt: str | None = None
    """What a decoder is asked after query and passage; the family's own question where not given."""
    cutoff_layers: (
        Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(as_layers), Field(min_length=1)] | None
    ) = None
    """Layers whose scores are read (layerwise and lightweight); with several, their mean; the last where not given."""
    compress_ratio: Literal[1, 2, 4, 8] = 1
    """Passage tokens that are merged into one (lightweight)."""
    compress_layers: Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(as_layers)] | None = None
    """Layers after which passage tokens are merged (lightweight); 8 where not given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the hardware has it, float32 elsewhere."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the checkpoint. Off unless you trust its authors."""
    fit: FitConfig | None = None
    """Train this reranker first, from the encoder `model`, on the mined pairs."""
