"""The families of rerankers: for each a frame (how a pair becomes tokens), a loader and a readout.

| family | score of a pair | known by |
|---|---|---|
| encoder-only-base | the logit of a classifier with one label | bge-reranker-base, -large, -v2-m3; CrossEncoder |
| decoder-only-base | the logit of "Yes" after a question | bge-reranker-v2-gemma |
| decoder-only-layerwise | the same, or a head's, at chosen layers | bge-reranker-v2-minicpm-layerwise |
| decoder-only-lightweight | the same, with the passage's tokens merged | bge-reranker-v2.5-gemma2-lightweight |
| decoder-only-yes-no | logit of "yes" less that of "no", after a chat template | Qwen3-Reranker |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from retune.config import RerankerConfig
from retune.model import chat, decoders, frames, layerheads
from retune.model.adapters import fold
from retune.model.backbone import load_classifier
from retune.model.checkpoint import read_json
from retune.model.engine import Tokenizer
from retune.model.frames import Frame
from retune.runtime import UserError, log

QUESTION = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
SHORT_QUESTION = "Predict whether passage B contains an answer to query A."


@dataclass(frozen=True)
class Source:
    """What a family is loaded from; `fresh`: an encoder that gets a new head, to be trained."""

    folder: Path
    tokenizer: Tokenizer
    settings: RerankerConfig
    dtype: torch.dtype
    fresh: bool = False


@dataclass(frozen=True)
class Family:
    """`frame` and `load` make frame and backbone from a source; `read` is (backbone, batch) → scores float32 [B].

    A batch is input_ids, attention_mask (or None) and token_type_ids (or None), int64 [B, L], padded on the
    right.  `save` writes the backbone.  `keys` are the settings which mean something to this family and
    not to all.
    """

    frame: Callable[[Source], Frame]
    load: Callable[[Source, Frame], nn.Module]
    read: Callable[[nn.Module, Tensor, Tensor | None, Tensor | None], Tensor]
    save: Callable[[nn.Module, Path], None]
    keys: tuple[str, ...] = ()


# ---- classifiers --------------------------------------------------------------------------------


def _pair_frame(source: Source) -> Frame:
    return chat.frame(source.tokenizer, source.folder, source.settings)


def _classifier(source: Source, _: Frame) -> nn.Module:
    trusted = source.settings.trust_remote_code
    model = fold(load_classifier(source.folder, source.dtype, trusted, source.fresh), source.settings.peft_path)
    if model.config.pad_token_id is None:  # a decoder finds its last token by it
        model.config.pad_token_id = source.tokenizer.hf.pad_token_id
    return model


def _label_logit(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, types: Tensor | None) -> Tensor:
    segments = {} if types is None else {"token_type_ids": types}
    return model(input_ids=input_ids, attention_mask=attention_mask, **segments).logits[:, 0].float()


def _save_classifier(model: nn.Module, folder: Path) -> None:
    # sentence-transformers reads the activation of its predictions from here
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    model.save_pretrained(folder)


# ---- decoders that are asked a question ---------------------------------------------------------


def _question_frame(source: Source, prompt: str, mark_passage: bool = False) -> Frame:
    asked = prompt if source.settings.prompt is None else source.settings.prompt
    frame = frames.question(source.tokenizer, asked, mark_passage)
    own = {"query": source.settings.query_instruction, "passage": source.settings.passage_instruction}
    # an instruction that is the letter itself, as the incumbent takes it, is not said twice
    heads = {kind: "" if (own[kind] or "").startswith(head.strip()) else head for kind, head in frame.heads.items()}
    return replace(frame, heads=heads)


def _yes(source: Source) -> int:
    return chat.token(source.tokenizer, "Yes")


def _answering(source: Source, _: Frame) -> nn.Module:
    return decoders.answering(source.folder, source.settings, source.dtype, [_yes(source)])


def _yes_logit(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, types: Tensor | None) -> Tensor:
    return decoders.answers(model, input_ids, attention_mask)[:, 0]


def _by_layers(merging: bool) -> Callable[[Source, Frame], nn.Module]:
    def load(source: Source, frame: Frame) -> nn.Module:
        after = len(frame.parts[2])
        return decoders.by_layers(source.folder, source.settings, source.dtype, _yes(source), merging, after)

    return load


def _mean_of_layers(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, types: Tensor | None) -> Tensor:
    return model(input_ids, attention_mask, types).mean(1)


def _no_saving(model: nn.Module, folder: Path) -> None:
    raise UserError("reranker.family: a model that is read by layers can score, but not be saved")


# ---- decoders with a chat template --------------------------------------------------------------


def _chat_frame(source: Source) -> Frame:
    if "LogitScore" in chat.modules(source.folder):
        return chat.frame(source.tokenizer, source.folder, source.settings)
    return chat.qwen3_frame(source.tokenizer, source.settings)


def _yes_no(source: Source, _: Frame) -> nn.Module:
    ids = chat.answer_ids(source.tokenizer, source.folder)
    return decoders.answering(source.folder, source.settings, source.dtype, ids)


def _difference(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, types: Tensor | None) -> Tensor:
    logits = decoders.answers(model, input_ids, attention_mask)  # [B, 1 or 2]
    return logits[:, 0] - logits[:, 1] if logits.shape[1] == 2 else logits[:, 0]


FAMILIES: dict[str, Family] = {
    "encoder-only-base": Family(_pair_frame, _classifier, _label_logit, _save_classifier),
    "decoder-only-base": Family(
        lambda source: _question_frame(source, QUESTION), _answering, _yes_logit, decoders.save_answering, ("prompt",)
    ),
    "decoder-only-layerwise": Family(
        lambda source: _question_frame(source, QUESTION), _by_layers(False), _mean_of_layers, _no_saving,
        ("prompt", "cutoff_layers"),
    ),
    "decoder-only-lightweight": Family(
        lambda source: _question_frame(source, SHORT_QUESTION, True), _by_layers(True), _mean_of_layers, _no_saving,
        ("prompt", "cutoff_layers", "compress_ratio", "compress_layers"),
    ),
    "decoder-only-yes-no": Family(_chat_frame, _yes_no, _difference, decoders.save_answering),
}  # fmt: skip


def detect(source: Source) -> str:
    """The family that the config names, or the checkpoint shows.

    Raises:
        UserError: for a CrossEncoder with modules that are not known here.
    """
    settings, config = source.settings, read_json(source.folder / "config.json")
    if source.fresh and settings.family == "auto":
        return "encoder-only-base"
    name = settings.family if settings.family != "auto" else _shown(source, config)
    for key in ("prompt", "cutoff_layers", "compress_ratio", "compress_layers"):
        if getattr(settings, key) != type(settings).model_fields[key].default and key not in FAMILIES[name].keys:
            log.warning("reranker.%s: means nothing to %s, which is of the family %s", key, settings.model, name)
    return name


def _shown(source: Source, config: dict) -> str:
    kinds = chat.modules(source.folder)
    architecture = (config.get("architectures") or [""])[0]
    if "LogitScore" in kinds:
        return "decoder-only-yes-no"
    if config.get("model_type") == "cost_wise_gemma" or "compress_ratio" in config or "CostWise" in architecture:
        return "decoder-only-lightweight"
    if config.get("model_type") in layerheads.STANDARD or "LayerWise" in architecture:
        return "decoder-only-layerwise"
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "encoder-only-base"
    qwen = re.search(r"qwen3[-_.]reranker", f"{source.settings.model} {source.folder}", re.IGNORECASE)
    return "decoder-only-yes-no" if qwen else "decoder-only-base"


def family(source: Source) -> tuple[str, Frame, nn.Module]:
    """Name, frame and backbone of the reranker in a source; the backbone has no device yet.

    Raises:
        UserError: for a checkpoint that is no reranker, or not one of the family asked for.
    """
    name = detect(source)
    if source.tokenizer.fast is None:
        raise UserError(f"model {source.settings.model}: a reranker needs a fast tokenizer (tokenizer.json)")
    applied = chat.activation(source.folder)
    if applied not in (None, "Identity", "Sigmoid"):
        log.warning("model %s: CrossEncoder puts %s on its scores; not here", source.settings.model, applied)
    frame = FAMILIES[name].frame(source)
    return name, frame, FAMILIES[name].load(source, frame)
