"""Sections on training and merging."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from retune.sections.base import Section, TrainingArgs


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
    nproc_per_node: Annotated[int, Field(ge=1)] = 1
    """Processes of torchrun on a node, one a GPU; 1 needs no process group."""
    nnodes: Annotated[int, Field(ge=1)] = 1
    """Nodes that train together, each with `nproc_per_node` processes; more than one need SLURM (`profiles/slurm`)."""
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
