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
