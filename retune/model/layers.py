"""A decoder read at chosen layers, with or without merging of the passage's tokens on the way.

The hidden state of a pair's last token after layer k, through the final norm, times a vector that
belongs to k, is the score at layer k (early exit).  At chosen layers, groups of the passage's tokens
are replaced by their mean, so that the layers above read a shorter text, as
https://huggingface.co/BAAI/bge-reranker-v2.5-gemma2-lightweight is trained to bear.

The layers are those of transformers' own decoders.  Padding is on the right: under causal attention
no real token sees it, so no mask is needed for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retune.runtime import UserError

SAMPLE = 6  # tokens of the text on which the loop here is compared with the model's own


def last_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Position of each text's last token, int64 [B]; texts are padded on the right."""
    if attention_mask is None:
        return torch.full((len(input_ids),), input_ids.shape[1] - 1, device=input_ids.device)
    return attention_mask.sum(1) - 1


def merge_tokens(hidden: Tensor, last: Tensor, passage: Tensor, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
    """Replace every `ratio` passage tokens by their mean; a last, smaller group by the mean of what it has.

    Args:
        hidden: [B, L, D]. last: position of the last token, int64 [B]. passage: 1 at passage tokens, [B, L].

    Returns:
        The same three for the shorter texts, [B, L', D], [B] and [B, L'].
    """
    inside, width = passage.bool(), passage.shape[1]
    real = torch.arange(width, device=hidden.device) <= last[:, None]  # [B, L]
    rank = inside.long().cumsum(1) - 1  # place within the passage, [B, L]
    begins = real & (~inside | (rank % ratio == 0))  # a group's first token, [B, L]
    group = begins.long().cumsum(1) - 1  # new position of each token, [B, L]
    new_last = group.gather(1, last[:, None]).squeeze(1)  # [B]
    shorter = int(new_last.max()) + 1
    # stable: the firsts come in their order, what follows them is padding
    first = torch.argsort((~begins).byte(), dim=1, stable=True)[:, :shorter]  # [B, L']
    total, count = 0, 0
    for step in range(ratio):  # a group's members stand next to each other
        member = (first + step).clamp(max=width - 1)  # [B, L']
        own = torch.arange(shorter, device=hidden.device)
        belongs = (group.gather(1, member) == own) & real.gather(1, member) & (first + step < width)
        part = hidden.gather(1, member[..., None].expand(-1, -1, hidden.shape[-1]))  # [B, L', D]
        total = total + torch.where(belongs[..., None], part, 0)
        count = count + belongs
    merged = total / count.clamp(min=1)[..., None].to(hidden.dtype)  # [B, L', D]
    return merged, new_last, passage.gather(1, first)


class LayerScores(nn.Module):
    """Scores of pairs at chosen layers of a decoder: ids → [B, K].

    Args:
        model: a transformers decoder without its head (embed_tokens, layers, norm, rotary_emb); the
            layers that are not needed are taken out of it.
        vectors: what each chosen layer's state is multiplied with, [K, D].
        cutoffs: the chosen layers, ascending; layer 1 is the first.
        softcap: bound c of the scores, c * tanh(score / c); None for none.
        merge_after: after how many layers tokens are merged. ratio: tokens that become one.

    Raises:
        UserError: if the architecture is not this plain sequence of layers.
    """

    def __init__(
        self, model: nn.Module, vectors: Tensor, cutoffs: Sequence[int], softcap: float | None = None,
        merge_after: Sequence[int] = (), ratio: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.vectors = model, nn.Parameter(vectors.detach())
        self.cutoffs, self.softcap = list(cutoffs), softcap
        self.merge_after, self.ratio = set(merge_after) if ratio > 1 else set(), ratio
        _compare(model)
        model.layers = model.layers[: max(cutoffs)]
        self.config = model.config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """input_ids, attention_mask, token_type_ids (1 at passage tokens) int64 [B, L] → float32 [B, K]."""
        hidden, last = embed(self.model, input_ids), last_tokens(input_ids, attention_mask)  # [B, L, D], [B]
        passage, around, scores = token_type_ids, surroundings(self.model, hidden), []
        for depth, layer in enumerate(self.model.layers):
            if depth in self.cutoffs:
                scores.append(self._read(hidden, last, len(scores)))
            if depth in self.merge_after:
                hidden, last, passage = merge_tokens(hidden, last, passage, self.ratio)
                around = surroundings(self.model, hidden)
            hidden = run_layer(self.model, depth, layer, hidden, around)
        scores.append(self._read(hidden, last, len(scores)))
        return torch.stack(scores, 1)

    def _read(self, hidden: Tensor, last: Tensor, which: int) -> Tensor:
        """The score of hidden states [B, L, D] with the `which`-th vector, float32 [B]."""
        state = self.model.norm(hidden[torch.arange(len(last), device=last.device), last])  # [B, D]
        score = state.float() @ self.vectors[which].float()  # [B]
        return score if self.softcap is None else self.softcap * torch.tanh(score / self.softcap)


def embed(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Token ids [B, L] → what the first layer reads, [B, L, D]."""
    hidden = model.embed_tokens(input_ids)
    scale = getattr(model, "embedding_multiplier", None)
    return hidden if scale is None else hidden * scale


def surroundings(model: nn.Module, hidden: Tensor) -> tuple:
    """What every layer needs of texts [B, L, D] beside them: masks by kind of layer, positions, rotations."""
    from transformers.masking_utils import create_masks_for_generate

    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]  # [1, L]
    masks = create_masks_for_generate(model.config, hidden, attention_mask=None, past_key_values=None)
    return masks, positions, model.rotary_emb(hidden, positions)


def run_layer(model: nn.Module, depth: int, layer: nn.Module, hidden: Tensor, around: tuple) -> Tensor:
    """Hidden states [B, L, D] through the layer that has `depth` layers below it."""
    masks, positions, rotations = around
    mask = masks[model.config.layer_types[depth]] if isinstance(masks, dict) else masks
    return layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotations)


@torch.no_grad()
def _compare(model: nn.Module) -> None:
    """See that the loop here is what the model's own forward does."""
    device = next(model.parameters()).device
    ids = torch.arange(SAMPLE, device=device)[None] % model.config.vocab_size
    name = model.config.model_type
    try:
        hidden = embed(model, ids)
        around = surroundings(model, hidden)
        for depth, layer in enumerate(model.layers):
            hidden = run_layer(model, depth, layer, hidden, around)
        found, expected = model.norm(hidden).float(), model(input_ids=ids).last_hidden_state.float()
    except (AttributeError, TypeError, KeyError) as error:
        raise UserError(f"reranker: an architecture such as {name} cannot be read by layers ({error})") from None
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().mean())):
        raise UserError(f"reranker: an architecture such as {name} cannot be read by layers (its forward differs)")
