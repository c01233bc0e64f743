"""Sections on training and merging."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from retune.sections.base import Section, TrainingArgs
from retune.sections.lora import LoraKeys, Names


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


class TrainConfig(LoraKeys):
    train_group_size: Annotated[int, Field(ge=1)] = 8
    """Passages of a group: one positive, the others negatives."""
    temperature: Annotated[float, Field(gt=0)] = 0.02
    """Scores are divided by it before the softmax."""
    query_max_length: Annotated[int, Field(ge=3)] | None = None
    """Tokens of a query in training, at most; `embedder.query_max_length` where not given."""
    passage_max_length: Annotated[int, Field(ge=3)] | None = None
    """Tokens of a passage in training, at most; `embedder.passage_max_length` where not given. Less than there saves
    time where it is spent; the tuned model reads as much as before."""
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
    same_dataset_within_batch: bool = False
    """Batches of one dataset each, of the dataset's own `batch_size` where it has one; of half the usual size where it
    has none and its `type` is a symmetric one, as in FlagEmbedding."""
    same_length_within_batch: bool = False
    """Batches of one length bin each, see `split.length_list`."""
    small_threshold: Annotated[int, Field(ge=0)] = 0
    """Datasets (or bins) with fewer queries are put together, where batches are of one."""
    drop_threshold: Annotated[int, Field(ge=0)] = 0
    """What was put together is left out where it has still fewer queries."""
    no_duplicates_within_batch: bool = False
    """Queries of one text, or with a positive in common, go into different batches, as far as that can be."""
    shuffle_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the positives, of more than 100 characters, whose thirds change places; drawn anew each epoch."""
    max_tokens_per_batch: Annotated[int, Field(ge=16)] | None = None
    """Padded tokens of one forward pass; a training batch is cut into such chunks, sorted by length."""
    sub_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Texts of one forward pass, at most."""
    grad_cache: Literal["auto"] | bool = "auto"
    """Keep the activations of one chunk only and compute the others' again in the backward pass (GradCache): the same
    gradient, a third more to compute, and the memory of one chunk whatever the batch; chunks are
    smaller then. `auto`: where `max_tokens_per_batch` or `sub_batch_size` bounds a chunk; else only for what does not
    fit the free memory."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout during training; the checkpoint's own where not given. 0 saves a tenth of the time on a CPU."""
    dev_queries: Annotated[int, Field(ge=0)] = 500
    """At most so many of the queries that `ingest.dev_fraction` sets aside are searched for during training, by default
    ten times: the checkpoint with the best nDCG@10 becomes the model. 0: the last one."""
    dev_passages: Annotated[int, Field(ge=0)] = 2000
    """Passages, drawn with the seed, that they are searched in besides their positives."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations on the queries set aside without a better one."""
    continue_adapters: bool = False
    """With `use_lora`: go on training the adapters of `embedder.peft_path`, in place of new ones on a model into which
    those are folded; rank, alpha, dropout and modules are then theirs."""
    additional_special_tokens: Names | None = None
    """Tokens that the tokenizer learns. Their vectors start as the mean of all others; with `use_lora` they are
    trained only where the embedding layer is among `modules_to_save`. Such a model is not merged with its base."""
    save_merged_lora_model: bool = True
    """Fold trained adapters into the saved model and keep them in its folder `adapter`; `false` saves them alone, to be
    put on the base model whenever they are loaded, and not to be merged with it by `merge`."""
    fix_position_embedding: bool = False
    """Leave position embeddings as they are."""
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None
    """Lengths are padded to a multiple of it; what suits the hardware where not given."""
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
        for name in ("small_threshold", "drop_threshold"):
            if getattr(self, name) and not (self.same_dataset_within_batch or self.same_length_within_batch):
                raise ValueError(f"{name}: it counts only with same_dataset_within_batch or same_length_within_batch")
        if self.continue_adapters and not self.use_lora:
            raise ValueError("continue_adapters: expected `use_lora: true`")
        for name in ("use_self_distill", "fix_encoder"):
            if getattr(self, name) and not self.unified_finetuning:
                raise ValueError(f"{name}: it counts only with `unified_finetuning: true`")
        if self.fix_encoder and self.use_lora:
            raise ValueError("fix_encoder: adapters are a part of the encoder; leave it or use_lora out")
        if self.unified_finetuning and (self.use_mrl or "passage_to_query" in self.directions):
            raise ValueError("unified_finetuning: without use_mrl, and with directions query_to_passage alone")
        if self.knowledge_distillation and self.train_group_size == 1:
            raise ValueError("knowledge_distillation: a teacher compares passages, so train_group_size must exceed 1")
        return self


class SearchConfig(Section):
    step: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Weights are tried in steps of this; 1 must be a multiple of it."""
    measure: Annotated[str, Field(pattern=r"^(nDCG|MRR|Recall|MAP|P|Hit)@[1-9][0-9]*$")] = "nDCG@10"
    """What the queries that were set aside (`ingest.dev_fraction`) shall gain most of."""
    max_guard_loss: Annotated[float, Field(ge=0)] = 0.01
    """What each guard set (a benchmark with `guard: true`; its `relevant_from` holds) may lose of it, against the first
    of `models`. None may be called `dev`, as the queries that were set aside are."""
    queries: Annotated[int, Field(ge=1)] = 1000
    """Queries of the dev set and of each guard set at most, drawn with the seed."""
    passages: Annotated[int, Field(ge=1)] = 10000
    """Passages that they are searched in besides their positives, drawn with the seed."""

    @model_validator(mode="after")
    def _whole_steps(self) -> SearchConfig:
        if abs(1 / self.step - round(1 / self.step)) > 1e-6:
            raise ValueError(f"step: expected one that goes into 1, such as 0.1 or 0.25, found {self.step}")
        return self


class MergeConfig(Section):
    models: Annotated[list[str], Field(min_length=1)] = ["base", "tuned"]
    """`base`, `tuned`, folders, hub ids, `package:…` or `variant:<name>`. `embedder.revision` is that of `base`; a hub
    id here stands for its newest state."""
    weights: list[float] | None = None
    """One weight a model; equal ones where neither they nor `examples` nor `search` are given."""
    examples: str | None = None
    """A file of a few rows {query, pos, neg}: weights are softmax(−loss / temperature) of each model's loss on them
    (LM-Cocktail, arXiv:2311.13534)."""
    temperature: Annotated[float, Field(gt=0)] = 5.0
    """Of that: the higher, the more equal the weights."""
    search: SearchConfig | None = None
    """Try weights, and take those with which the queries that were set aside gain most."""

    @model_validator(mode="after")
    def _one_each(self) -> MergeConfig:
        given = [key for key in ("weights", "examples", "search") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]}, {given[1]}: expected one of them, both say what the weights are")
        if not given:
            self.weights = [1 / len(self.models)] * len(self.models)
        if self.weights is not None and len(self.models) != len(self.weights):
            raise ValueError(f"expected one weight a model, found {len(self.weights)} for {len(self.models)}")
        if self.search and len(self.models) < 2:
            raise ValueError("search: expected at least two models")
        return self
