"""Sections on training and merging."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from retune.sections.base import Section, TrainingArgs


class EnsembleWeights(Section):
    """Of each head's scores in their sum."""

    dense: float = 1.0
    sparse: float = 0.3
    colbert: float = 1.0


class LossWeights(Section):
    """Of each head's loss, and of that of the summed scores."""

    dense: Annotated[float, Field(ge=0)] = 1.0
    ensemble: Annotated[float, Field(ge=0)] = 1.0
    sparse: Annotated[float, Field(ge=0)] = 0.1
    colbert: Annotated[float, Field(ge=0)] = 1.0


class HeadWeights(Section):
    ensemble: EnsembleWeights = Field(default_factory=EnsembleWeights)
    """Of each head's scores in the ensemble."""
    loss: LossWeights = Field(default_factory=LossWeights)
    """Of the losses; their sum is divided by four."""


def _none_below_one(value: Any) -> Any:
    """FlagEmbedding's -1 means none."""
    return None if isinstance(value, int) and value < 1 else value


class TrainConfig(Section):
    train_group_size: Annotated[int, Field(ge=1)] = 8
    """Passages of a group: one positive, the others negatives."""
    temperature: Annotated[float, Field(gt=0)] = 0.02
    """Scores are divided by it before the softmax."""
    use_inbatch_neg: bool = True
    """Passages of the other queries of a batch count as negatives."""
    negatives_cross_device: bool = False
    """Passages of all processes count as in-batch negatives."""
    mask_false_negatives: Literal["ids", "margin"] | None = "ids"
    """`ids`: a passage never counts as an in-batch negative of a query where it is a positive of the query, or of one
    with the same text, or in the query's own group already. `margin`: nor where it scores too high, in addition."""
    false_negative_margin: float = -0.1
    """With `margin`: passages of other groups that are more similar to the query than its positive less this count for
    nothing. -0.1: those that exceed the positive by 0.1 (Qwen3 Embedding, arXiv:2506.05176)."""
    directions: Annotated[list[Literal["query_to_passage", "passage_to_query"]], Field(min_length=1)] = [
        "query_to_passage"
    ]
    """What InfoNCE tells apart: passages, given a query; queries, given a positive; with both, the mean."""
    use_mrl: bool = False
    """Matryoshka: the loss is the mean over those on the first `mrl_dims` dimensions (arXiv:2205.13147)."""
    mrl_dims: list[Annotated[int, Field(ge=1)]] = []
    """Numbers of dimensions for `use_mrl`, normalised where the model normalises; name the model's own too."""
    knowledge_distillation: bool = False
    """Learn from the teacher's scores (section `score`, or scores that came with the data)."""
    kd_loss_type: Literal["kl_div", "m3_kd_loss", "margin_mse"] = "kl_div"
    """`kl_div`: soft cross-entropy with the teacher on the group, plus InfoNCE; `m3_kd_loss`: each member of the group
    in turn against those after it and the in-batch negatives, weighted by the teacher; `margin_mse`: squared error of
    the margins between positive and negatives, of scores divided by the temperature (arXiv:2010.02666)."""
    info_nce_weight: Annotated[float, Field(ge=0)] | None = None
    """Of InfoNCE beside the teacher's loss; where not given, 1 with `kl_div` and 0 with the others."""
    max_tokens_per_batch: Annotated[int, Field(ge=16)] | None = None
    """Padded tokens of one forward pass; a training batch is cut into such chunks, sorted by length."""
    sub_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Texts of one forward pass, at most."""
    grad_cache: Literal["auto"] | bool = "auto"
    """Keep the activations of one chunk only and compute the others' again in the backward pass (GradCache): the same
    gradient, a third more to compute, and the memory of one chunk whatever the batch. `auto`: where
    `max_tokens_per_batch` or `sub_batch_size` bounds a chunk; else only for what does not fit the free memory."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout during training; the checkpoint's own where not given. 0 saves a tenth of the time on a CPU."""
    unified_finetuning: bool = False
    """Of an M3 embedder, train the heads sparse and colbert too, and the sum of all (arXiv:2402.03216); else dense
    alone, and the others are not saved."""
    use_self_distill: bool = False
    """With `unified_finetuning`, heads also learn from the sum of all."""
    self_distill_start_step: Annotated[int, Field(ge=-1)] = -1
    """The step after which they do."""
    fix_encoder: bool = False
    """With `unified_finetuning`, train the heads sparse and colbert alone."""
    colbert_dim: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_none_below_one)] = None
    """Dimensions of a new colbert head; the backbone's where not given."""
    head_weights: HeadWeights = Field(default_factory=HeadWeights)
    """With `unified_finetuning`, how much each head counts."""
    retrieval_use_examples: bool = True
    """Of an in-context embedder, queries of retrieval read 0 to 5 solved examples from their batch in training, as
    those of symmetric tasks always do."""
    example_query_max_len: Annotated[int, Field(ge=1)] = 64
    """Tokens of an example's query, its instruction included."""
    example_passage_max_len: Annotated[int, Field(ge=1)] = 96
    """Tokens of an example's answer."""
    nproc_per_node: Annotated[int, Field(ge=1)] = 1
    """Processes of torchrun; 1 needs no process group."""
    args: TrainingArgs = Field(default_factory=dict)
    """Any `transformers.TrainingArguments`, by its own name."""

    @model_validator(mode="after")
    def _objective_is_whole(self) -> TrainConfig:
        """Every part of the loss has something to work on."""
        if self.use_mrl and not self.mrl_dims:
            raise ValueError("use_mrl: expected mrl_dims, such as [768, 256, 64]")
        if self.mrl_dims and not self.use_mrl:
            raise ValueError("mrl_dims: they count only with `use_mrl: true`")
        for name in ("mrl_dims", "directions"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}: one is named twice")
        if "passage_to_query" in self.directions:
            if not self.use_inbatch_neg:
                raise ValueError("directions: passage_to_query needs other queries, so `use_inbatch_neg: true`")
            weight = self.info_nce_weight if self.info_nce_weight is not None else float(self.kd_loss_type == "kl_div")
            if self.knowledge_distillation and not weight:
                raise ValueError(f"directions: {self.kd_loss_type} comes without InfoNCE; set info_nce_weight above 0")
        for name in ("use_self_distill", "fix_encoder"):
            if getattr(self, name) and not self.unified_finetuning:
                raise ValueError(f"{name}: it counts only with `unified_finetuning: true`")
        if self.unified_finetuning and (self.use_mrl or "passage_to_query" in self.directions):
            raise ValueError("unified_finetuning: without use_mrl, and with directions query_to_passage alone")
        if self.knowledge_distillation and self.train_group_size == 1:
            raise ValueError("knowledge_distillation: a teacher compares passages, so train_group_size must exceed 1")
        return self


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
