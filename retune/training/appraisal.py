"""What models are worth by their loss on a few examples, and the merging weights that follow from it.

LM-Cocktail (arXiv:2311.13534) weighs models by softmax(−loss / temperature).  A loss is a mean over
the examples as a whole, whatever the batches; negatives are the first ones of a row and not a draw.
So the same examples give the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from retune.config import EmbedderConfig, RerankerConfig
from retune.data.examples import Completion, Group, completions, groups
from retune.model import checkpoint, device, parts
from retune.model.backbone import load_tokenizer, load_whole
from retune.model.embedder import Embedder
from retune.model.embedder_families import pools
from retune.model.reranker import Reranker
from retune.objective.losses import info_nce, listwise
from retune.runtime import UserError, log, progress

TEMPERATURE = 0.05  # of the embedders' contrastive loss, LM-Cocktail's own


@dataclass(frozen=True)
class Limits:
    """How examples are read."""

    batch_size: int = 2
    """Examples of one forward pass; it changes memory and time, not the loss."""
    max_input_length: int = 2048
    """Tokens of a text, or of a pair."""
    neg_number: int = 7
    """Negatives of a query at most."""
    trust_remote_code: bool = False
    embedder: EmbedderConfig | None = None
    """How an embedder is used, but for the model; as its checkpoint says where not given."""


def embedder_loss(model: str | Path, examples: Sequence[Group], limits: Limits) -> float:
    """InfoNCE at temperature 0.05 with all examples in one batch.

    The passages of all examples count, but for those that are a positive of the query.  The model is
    pooled as its checkpoint says, by the first token where it says nothing.
    """
    used = limits.embedder or EmbedderConfig(model=str(model), trust_remote_code=limits.trust_remote_code)
    folder = checkpoint.resolve(model, used.revision)
    settings = used.model_copy(update={"model": str(folder), "revision": None, "sha256": None})
    if not pools(settings, parts.locate(settings)):
        settings = settings.model_copy(update={"pooling": "cls"})
    embedder = Embedder.load(settings, torch.float32)
    embedder.max_lengths = {kind: min(most, limits.max_input_length) for kind, most in embedder.max_lengths.items()}
    passages = [text for group in examples for text in group.passages]
    if len(passages) < 2:
        raise UserError("examples: expected two of them, or a negative: one passage alone tells nothing")
    own = [group.prompt for group in examples]
    queries = _vectors(embedder, [group.query for group in examples], "query", limits, own)  # [Q, D]
    scores = queries @ _vectors(embedder, passages, "passage", limits).T  # [Q, P]
    counts = [len(group.passages) for group in examples]
    targets = torch.tensor(np.cumsum([0, *counts[:-1]]))  # [Q]
    excluded = torch.tensor([[text in group.positives for text in passages] for group in examples])  # [Q, P]
    return float(info_nce(scores, targets, TEMPERATURE, excluded))


def _vectors(
    embedder: Embedder, texts: Sequence[str], kind: str, limits: Limits, own: Sequence[str | None] | None = None
) -> torch.Tensor:
    """float64 [n, D], so that sums do not hang on their order."""
    most = limits.batch_size * limits.max_input_length
    return torch.from_numpy(embedder.encode_texts(texts, kind, own, max_tokens=most)).double()


def reranker_loss(model: str | Path, examples: Sequence[Group], limits: Limits) -> float:
    """Cross entropy of the positive among its own negatives: the mean over queries."""
    if bare := sum(len(group.passages) < 2 for group in examples):
        raise UserError(f"examples: a reranker needs negatives, and {bare} of {len(examples)} have none")
    longest = checkpoint.positions(checkpoint.resolve(model)) or limits.max_input_length
    settings = RerankerConfig(
        model=str(model), max_length=min(limits.max_input_length, longest), trust_remote_code=limits.trust_remote_code
    )
    reranker = Reranker.load(settings, torch.float32)
    pairs = [(group.query, text) for group in examples for text in group.passages]
    tokens = reranker.tokenize(*zip(*pairs, strict=True))
    scores = torch.from_numpy(reranker.scores(tokens, limits.batch_size * settings.max_length)).double()
    parts = scores.split([len(group.passages) for group in examples])
    logits = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-torch.inf)  # [Q, G]
    return float(listwise(logits))


def decoder_loss(model: str | Path, examples: Sequence[Completion], limits: Limits) -> float:
    """A language model's loss: the mean over all tokens of all outputs, the end of the text among them."""
    from transformers import AutoModelForCausalLM

    folder, target = checkpoint.resolve(model), device.best_device()
    tokenizer = load_tokenizer(folder, limits.trust_remote_code)
    rows = [_tokens(tokenizer, example, limits.max_input_length) for example in examples]
    for place, (ids, start) in enumerate(rows, 1):
        if start >= len(ids):
            raise UserError(f"examples: of number {place} no token of the output is within {len(ids)} tokens")
    options = {"dtype": device.compute_dtype("auto", target), "trust_remote_code": limits.trust_remote_code}
    network = load_whole(AutoModelForCausalLM, folder, **options).to(target).eval()
    losses = []
    with torch.inference_mode():
        for at in range(0, len(rows), limits.batch_size):
            losses += _token_losses(network, rows[at : at + limits.batch_size], target)
    return float(torch.cat(losses).mean())


def _tokens(tokenizer: Any, example: Completion, most: int) -> tuple[list[int], int]:
    """(ids of input, output and end of text, cut; place of the output's first token)."""
    end = tokenizer.eos_token_id
    ids, prompt = tokenizer.encode(f"{example.input} {example.output}"), tokenizer.encode(example.input)
    if end is not None:
        ids = ids if ids[-1:] == [end] else [*ids, end]
        prompt = prompt[:-1] if prompt[-1:] == [end] else prompt
    return ids[:most], max(len(prompt), 1)  # nothing comes before a text's first token


def _token_losses(
    model: torch.nn.Module, rows: Sequence[tuple[list[int], int]], target: torch.device
) -> list[torch.Tensor]:
    """Loss of each token of each row's output, float64 [tokens] a row."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True)  # [B, L]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row, _ in rows], batch_first=True).long()  # [B, L]
    logits = model(input_ids=ids.to(target), attention_mask=mask.to(target), use_cache=False).logits  # [B, L, V]
    found = []
    for row, (own, start) in enumerate(rows):
        said = logits[row, start - 1 : len(own) - 1].float()  # [tokens, V]
        wanted = ids[row, start : len(own)].to(target)
        found.append(F.cross_entropy(said, wanted, reduction="none").double().cpu())
    return found


LOSSES: dict[str, Callable[[str | Path, Sequence, Limits], float]] = {
    "encoder": embedder_loss,
    "decoder": decoder_loss,
    "reranker": reranker_loss,
}


def losses(
    models: Sequence[str | Path], model_type: str, rows: Sequence[tuple[str, Any]], limits: Limits,
    embedders: Sequence[EmbedderConfig] | None = None,
) -> list[float]:  # fmt: skip
    """Loss of each model on the examples; one model after the other is in memory.

    Args:
        model_type: `encoder`, `decoder` or `reranker`.
        rows: (where it stands, value) of each example: {query, pos, neg}, or {input, output} for decoders.
        embedders: how each encoder is used; as its checkpoint says where not given.

    Raises:
        UserError: for rows of another form, models that cannot be loaded, and losses that are not finite.
    """
    examples = completions(rows) if model_type == "decoder" else groups(rows, limits.neg_number)
    found = []
    with progress(len(models), "examples", "models") as bar:
        for model, embedder in zip(models, embedders or [limits.embedder] * len(models), strict=True):
            loss = LOSSES[model_type](model, examples, replace(limits, embedder=embedder))
            if not math.isfinite(loss):
                raise UserError(f"merge: {model}: its loss on the examples is {loss}")
            log.info("%s: loss %.4f on %d examples", model, loss, len(examples))
            found.append(loss)
            bar.update()
    return found


def shares(losses: Sequence[float], temperature: float) -> list[float]:
    """softmax(−loss / temperature): merging weights, 1 in all; a lower temperature favours the best model more."""
    logits = -np.asarray(losses, np.float64) / temperature
    powers = np.exp(logits - logits.max())
    return (powers / powers.sum()).tolist()
