"""Keys of low-rank adapters, shared by the sections that train a model."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from retune.sections.base import Section, as_list

Names = Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]


class LoraKeys(Section):
    use_lora: bool = False
    """Train low-rank adapters (LoRA, arXiv:2106.09685), and a reranker's new head, in place of all weights; what they
    have learnt is folded into the saved model."""
    lora_rank: Annotated[int, Field(ge=1)] = 32
    """Rank of the adapters."""
    lora_alpha: Annotated[float, Field(gt=0)] = 64
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout before the adapters."""
    target_modules: Names | None = None
    """Names of the layers that get adapters; all linear ones where not given."""
    modules_to_save: Names | None = None
    """Names of modules that are trained whole beside the adapters, such as `word_embeddings`."""
