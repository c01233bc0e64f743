"""Decoders as rerankers: language models whose next word is a score, and models read by layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retune.config import RerankerConfig
from retune.model import layerheads
from retune.model.adapters import fold
from retune.model.backbone import load_whole
from retune.model.checkpoint import read_json
from retune.model.layers import LayerScores, last_tokens
from retune.runtime import UserError

MERGE_AFTER = (8,)  # where the lightweight model merges tokens unless told otherwise


class Answers(nn.Module):
    """A language model's head that gives some tokens' logits at one position of each text, in float32.

    Attributes:
        head: the whole head, as it was. ids: the tokens, int64 [R].
        at: the positions, int64 [B], set before each forward: they do not come through the model.
    """

    def __init__(self, head: nn.Module, ids: Sequence[int]) -> None:
        super().__init__()
        self.head, self.at = head, None
        self.register_buffer("ids", torch.tensor(ids, device=head.weight.device), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, L, D] → [B, 1, R]."""
        state = hidden[torch.arange(len(self.at), device=hidden.device), self.at]  # [B, D]
        bias = getattr(self.head, "bias", None)
        logits = nn.functional.linear(
            state.float(), self.head.weight[self.ids].float(), None if bias is None else bias[self.ids].float()
        )  # [B, R]
        return logits[:, None]


def language_model(folder: Path, settings: RerankerConfig, dtype: torch.dtype) -> nn.Module:
    """The causal language model in `folder`, adapters folded in.

    Raises:
        UserError: for a checkpoint that is none, lacks weights, or needs code of its own that is not trusted.
    """
    from transformers import AutoModelForCausalLM

    _refuse_code(folder, settings)
    model = load_whole(AutoModelForCausalLM, folder, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    return fold(model, settings.peft_path)


def answering(folder: Path, settings: RerankerConfig, dtype: torch.dtype, ids: Sequence[int]) -> nn.Module:
    """A language model whose head gives the logits of the tokens `ids` alone, to be called through `answers`."""
    model = language_model(folder, settings, dtype)
    model.set_output_embeddings(Answers(model.get_output_embeddings(), ids))
    return model


def answers(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Logits of an `answering` model after each text's last token, float32 [B, R].

    What the model does to logits (scales, bounds) it does to these.  Padding is on the right: under
    causal attention no real token sees it, so the model gets no mask.
    """
    model.get_output_embeddings().at = last_tokens(input_ids, attention_mask)  # [B]
    return model(input_ids=input_ids, use_cache=False).logits[:, 0].float()


def save_answering(model: nn.Module, folder: Path) -> None:
    """Write an `answering` model with its whole head."""
    few = model.get_output_embeddings()
    model.set_output_embeddings(few.head)
    try:
        model.save_pretrained(folder)
    finally:
        model.set_output_embeddings(few)


def by_layers(
    folder: Path, settings: RerankerConfig, dtype: torch.dtype, yes: int, merging: bool, prompt_length: int
) -> nn.Module:
    """A decoder scored at `cutoff_layers`: with heads for its layers, by code of its own, or any plain one.

    Args:
        yes: the token whose row of the head is read, where the checkpoint has no heads for its layers.
        merging: whether tokens are merged on the way (lightweight).
        prompt_length: tokens after the passage.

    Returns:
        A module: input_ids, attention_mask, token_type_ids int64 [B, L] → float32 [B, K].
    """
    config = read_json(folder / "config.json")
    merge = (settings.compress_layers or MERGE_AFTER, settings.compress_ratio) if merging else ((), 1)
    if config.get("model_type") in layerheads.STANDARD:
        model, softcap = layerheads.load(folder, config, settings, dtype)
        cutoffs = _cutoffs(settings, layerheads.layers(config))
        vectors = [model.lm_head[place].linear_head.weight[0] for place in layerheads.places(config, cutoffs)]
        return LayerScores(model.model, torch.stack(vectors), cutoffs, softcap, *merge)
    model = language_model(folder, settings, dtype)
    if not _known(config):
        cutoffs = sorted(set(settings.cutoff_layers or [model.config.num_hidden_layers]))
        return RemoteScores(model, cutoffs, merging, *merge, prompt_length)
    cutoffs = _cutoffs(settings, range(1, model.config.num_hidden_layers + 1))
    row = model.get_output_embeddings().weight[yes] / getattr(model.config, "logits_scaling", 1)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return LayerScores(model.base_model, row.repeat(len(cutoffs), 1), cutoffs, softcap, *merge)


def _cutoffs(settings: RerankerConfig, possible: range) -> list[int]:
    """The layers to read, ascending; the last one where none is asked for."""
    cutoffs = sorted(set(settings.cutoff_layers or [possible[-1]]))
    wrong = [layer for layer in cutoffs if layer not in possible]
    if wrong:
        raise UserError(
            f"reranker.cutoff_layers: {settings.model} can be read at layers {possible[0]} to {possible[-1]}"
            f"{f' in steps of {possible.step}' if possible.step > 1 else ''}, not at {wrong[0]}"
        )
    return cutoffs


class RemoteScores(nn.Module):
    """A checkpoint whose own code reads it by layers: forward(..., cutoff_layers) → logits, a [B, L] for each.

    With merging, forward also takes compress_layer, compress_ratio, query_lengths (tokens before the
    passage) and prompt_lengths (after it), and its output has attention_masks, one for each layer.
    These are the arguments which BAAI's layerwise and lightweight models document.
    """

    def __init__(
        self, model: nn.Module, cutoffs: list[int], merging: bool, merge_after: Sequence[int], ratio: int,
        prompt_length: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.cutoffs, self.merging = model, cutoffs, merging
        self.merge = {"compress_layer": list(merge_after), "compress_ratio": ratio} if merging else {}
        self.prompt_length = prompt_length

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """input_ids, attention_mask, token_type_ids (1 at passage tokens) int64 [B, L] → float32 [B, K]."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        options = dict(self.merge)
        if self.merging:
            options["query_lengths"] = (mask.sum(1) - token_type_ids.sum(1) - self.prompt_length).tolist()
            options["prompt_lengths"] = [self.prompt_length] * len(input_ids)
        out = self.model(
            input_ids=input_ids, attention_mask=mask, output_hidden_states=True, cutoff_layers=self.cutoffs, **options
        )
        masks = out.attention_masks if self.merging else [mask] * len(out.logits)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        scores = [logits[rows, own.sum(1) - 1] for logits, own in zip(out.logits, masks, strict=True)]  # K × [B]
        return torch.stack(scores, 1).float()


def _known(config: dict[str, Any]) -> bool:
    """Whether transformers itself knows a checkpoint's kind of model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def _refuse_code(folder: Path, settings: RerankerConfig) -> None:
    """Raise a UserError where a checkpoint can only be run by its own code and that is not trusted."""
    config = read_json(folder / "config.json")
    if settings.trust_remote_code or _known(config):
        return
    if "auto_map" not in config:
        raise UserError(f"model {settings.model}: transformers knows no model of type {config.get('model_type')!r}")
    code = str(config["auto_map"].get("AutoModelForCausalLM", "code")).split("--")[-1].rsplit(".", 1)[0]
    raise UserError(
        f"model {settings.model}: only its own code ({code}.py) can run it; read that, and if you trust it, set "
        "reranker.trust_remote_code: true"
    )
