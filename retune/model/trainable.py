"""An embedder that is to be trained, and the folder that it becomes: adapters around it, and folded into it.

Between the two a wrapped backbone is a backbone like any other; nothing else knows of adapters.
"""

from __future__ import annotations

from pathlib import Path

import torch

from retune.config import EmbedderConfig, TrainConfig
from retune.model import adapters, checkpoint, heads, parts
from retune.model.backbone import set_dropout
from retune.model.embedder import Embedder
from retune.model.engine import Tokenizer
from retune.model.portable import make_portable
from retune.model.usage import embedding_tokenizer
from retune.model.vocabulary import add_tokens
from retune.runtime import UserError, log

POSITIONS = "position_embeddings"


def load(settings: EmbedderConfig, training: TrainConfig, seed: int, target: torch.device | None = None) -> Embedder:
    """The model of `settings` in float32, with the tokens, heads, dropout and adapters that `training` asks for.

    Args:
        seed: of new adapters and heads.

    Raises:
        UserError: for settings that contradict each other or do not fit the model.
    """
    _check(settings, training)
    settings = settings.model_copy(update={"examples": []})  # batches have examples of their own
    kept = settings.peft_path if training.continue_adapters else None
    model = Embedder.load(settings.model_copy(update={"peft_path": None}) if kept else settings, torch.float32, target)
    folder = adapters.located(kept, parts.KEY) if kept else None
    if folder:
        _take_beside(model, folder)
    _choose_heads(model, training, seed)
    new = _add_tokens(model, training.additional_special_tokens or [])
    if new and folder:
        raise UserError(
            f"train.additional_special_tokens: {new} of them are new to the adapters of {parts.KEY}; new tokens need "
            "new adapters, so leave them or train.continue_adapters out"
        )
    if training.dropout is not None:
        set_dropout(model, training.dropout)
    if folder:
        model.backbone = adapters.go_on(model.backbone, folder, parts.KEY)
    elif training.use_lora:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.backbone = _wrapped(model.backbone, training)
    if new and not _learns(model.backbone.get_input_embeddings()):
        log.warning(
            "train.additional_special_tokens: their vectors stay the mean of all others, since adapters alone are "
            "trained; name the embedding layer in train.modules_to_save"
        )
    if training.fix_position_embedding:
        _fix_positions(model.backbone)
    if training.fix_encoder:
        model.backbone.requires_grad_(False)
    return model


def _take_beside(model: Embedder, adapters: Path) -> None:
    """Have the tokenizer and the heads that lie with adapters, where there are some."""
    if model.settings.tokenizer_name is None and checkpoint.has_tokenizer(adapters):
        trusted = model.settings.trust_remote_code
        tokenizer = parts.with_tokens_of(adapters, model.tokenizer.hf, model.backbone, trusted)
        tokenizer = embedding_tokenizer(tokenizer, adapters, parts.locate(model.settings), model.card)
        model.tokenizer = Tokenizer(tokenizer)
    model.take_heads(adapters)


def _choose_heads(model: Embedder, training: TrainConfig, seed: int) -> None:
    """Leave an M3 model the heads that are trained."""
    if training.unified_finetuning:
        model.complete_heads(seed, training.colbert_dim)
    elif model.heads is not None:
        log.info("train.unified_finetuning is off: dense is trained alone, and no other head is saved")
        model.heads = None


def _check(settings: EmbedderConfig, training: TrainConfig) -> None:
    if training.continue_adapters and not settings.peft_path:
        raise UserError(f"train.continue_adapters: expected {parts.KEY}, the adapters to go on from")
    if training.use_lora and not training.save_merged_lora_model:
        if settings.peft_path and not training.continue_adapters:
            raise UserError(
                f"train.save_merged_lora_model: false would save adapters for a model into which those of {parts.KEY} "
                "are folded, and which is nowhere; leave it out, or set train.continue_adapters"
            )
        if parts.is_adapters_alone(parts.locate(settings).checkpoint):
            raise UserError(
                "train.save_merged_lora_model: false needs a base that is no adapters itself; set embedder.model to "
                f"their base and {parts.KEY} to {settings.model}"
            )


def _add_tokens(model: Embedder, tokens: list[str]) -> int:
    """How many of `tokens` are new to the model, which has them now."""
    if not tokens:
        return 0
    tokenizer = model.tokenizer.hf
    new = add_tokens(tokenizer, model.backbone, tokens)
    model.tokenizer = Tokenizer(tokenizer)
    log.info("%d of %d special tokens are new", new, len(tokens))
    return new


def _wrapped(backbone: torch.nn.Module, training: TrainConfig) -> torch.nn.Module:
    try:
        found = adapters.wrap(backbone, training, "FEATURE_EXTRACTION")
    except UserError as error:
        raise UserError(f"train.{error}") from None
    trained = sum(weight.numel() for weight in found.parameters() if weight.requires_grad)
    log.info("adapters: %s of %s weights are trained", f"{trained:,}", f"{backbone.num_parameters():,}")
    return found


def _learns(module: torch.nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())


def _fix_positions(backbone: torch.nn.Module) -> None:
    found = [weight for name, weight in backbone.named_parameters() if POSITIONS in name]
    for weight in found:
        weight.requires_grad_(False)
    if not found:
        log.warning("train.fix_position_embedding: the model has no position embeddings")


def save(model: Embedder, folder: Path, training: TrainConfig) -> None:
    """Write a trained model: with adapters folded in and beside it, or as adapters alone; others as they are."""
    if not adapters.is_wrapped(model.backbone):
        model.save(folder)
        return
    beside = folder / adapters.BESIDE if training.save_merged_lora_model else folder
    source = parts.locate(model.settings)
    if source.adapters:
        log.warning(
            "%s: these adapters are for %s with %s folded in, not for it alone", beside, model.settings.model,
            " and ".join(map(str, source.adapters)),
        )  # fmt: skip
    name = model.settings.model
    here = Path(name).expanduser().is_dir() or name.startswith("package:")
    base = str(source.weights.absolute()) if here else name
    adapters.save(model.backbone, beside, base, None if here else model.settings.revision)
    if training.save_merged_lora_model:
        model.tokenizer.save(beside)
        make_portable(beside, model.tokenizer.hf, model.family.causal)
        if model.heads is not None:
            heads.write(beside, model.heads.state_dict())
        model.backbone = adapters.unwrap(model.backbone)
        model.save(folder)
    else:
        model.save_use(folder)  # and no config.json: with one, loaders look for the model's own weights
