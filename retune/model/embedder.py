"""The embedder: a backbone, a pooling, prompts.  Texts in, vectors out.

Everything that the checkpoint says (pooling, normalisation, lengths, prompts) holds unless the
config overrules it; a contradiction is a warning.  Knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retune.config import EmbedderConfig
from retune.model import checkpoint, device, engine, heads, multihead, parts
from retune.model.budget import TokenBudget, budget_for
from retune.model.embedder_families import FAMILIES
from retune.model.engine import Tokens
from retune.model.fused import Flat
from retune.model.multihead import HEADS
from retune.model.pooling import POOLINGS, of_flat
from retune.model.portable import make_portable
from retune.model.reader import PASSAGE_PROMPTS, Reader
from retune.model.shortcut import Shortcut
from retune.model.usage import embedding_tokenizer, looks_both_ways, usage
from retune.runtime import UserError

AHEAD = 1 << 20  # characters tokenised at a time, while the model computes the ones before


class Embedder(torch.nn.Module, Reader):
    """Token ids → vectors; what a `Reader` has, it has too.

    Attributes:
        backbone: the transformer. family: its row in the table of families.
        heads: those of an M3 model beside the dense one, where it has them.
        shortcut: the backbone's faster form, where it has one.
    """

    def __init__(self, backbone: torch.nn.Module, tokenizer, card: checkpoint.Card, settings: EmbedderConfig) -> None:
        super().__init__()
        Reader.__init__(self, tokenizer, card, settings)
        self.backbone, self.family = backbone, FAMILIES[card.family]
        if card.truncate_dim and card.truncate_dim > backbone.config.hidden_size:
            raise UserError(
                f"embedder.truncate_dim: {card.truncate_dim} is more than the {backbone.config.hidden_size} dimensions "
                f"of {settings.model}"
            )
        self.heads: heads.Heads | None = None
        self._budget: TokenBudget | None = None
        self.shortcut = Shortcut(trains=True)

    @classmethod
    def load(
        cls, settings: EmbedderConfig | str | Path, dtype: torch.dtype | None = None, target: torch.device | None = None
    ) -> Embedder:
        """Load a checkpoint; `settings` may be its reference alone.

        Args:
            dtype: of the weights; the settings' own where not given.
            target: device; the best one where not given.

        Raises:
            UserError: for a reference that leads nowhere, or a checkpoint that is no encoder.
        """
        if not isinstance(settings, EmbedderConfig):
            settings = EmbedderConfig(model=str(settings))
        made_of = parts.locate(settings)
        card = usage(settings, made_of)
        target = target or device.best_device()
        dtype = dtype or device.compute_dtype(settings.dtype, target)
        backbone, tokenizer = parts.load(made_of, settings, dtype, looks_both_ways(settings, made_of))
        tokenizer = embedding_tokenizer(tokenizer, made_of.texts_by, made_of, card)
        found = cls(backbone.to(target).eval(), tokenizer, card, settings)
        found.take_heads(made_of.heads)
        return found

    @classmethod
    def start(cls, settings: EmbedderConfig, target: torch.device, seed: int, colbert_dim: int | None) -> Embedder:
        """An M3 embedder to be trained, in float32: with the checkpoint's heads, or with new ones drawn with `seed`.

        Raises:
            UserError: see `complete_heads`.
        """
        found = cls.load(settings, torch.float32, target)
        found.complete_heads(seed, colbert_dim)
        return found

    def take_heads(self, folder: Path) -> None:
        """Have the heads of a folder, where this is an M3 model, and there are some."""
        if self.card.family == "m3":
            found = heads.load(folder, self.backbone.config.hidden_size, heads.special_ids(self.tokenizer.hf))
            self.heads = found.to(self.device, self.dtype) if found is not None else self.heads

    def complete_heads(self, seed: int, colbert_dim: int | None) -> None:
        """Have new heads, drawn with `seed`, where there are none.

        Raises:
            UserError: for a model of another family, or whose heads are of another width than `colbert_dim`.
        """
        name = self.settings.model
        if self.card.family != "m3":
            raise UserError(f"train.unified_finetuning: {name} has one head; set embedder.family: m3")
        if self.heads is None:
            special = heads.special_ids(self.tokenizer.hf)
            fresh = heads.fresh(self.backbone.config.hidden_size, colbert_dim, special, seed)
            self.heads = fresh.to(self.device, self.dtype)
        elif colbert_dim not in (None, self.heads.colbert_dim):
            raise UserError(f"train.colbert_dim: {name} has a head of {self.heads.colbert_dim} dimensions")

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return self.card.truncate_dim or self.backbone.config.hidden_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids int64 [B, L], attention_mask [B, L] (None: no padding) → float32 [B, dim]."""
        if (flat := self.shortcut.of(self.backbone, attention_mask)) is not None:
            batch = Flat.of(input_ids, attention_mask)
            if self.card.pooling == "cls":
                return self.finished(flat(batch, first=True).float())
            return self.finished(of_flat(self.card.pooling, flat(batch), batch))
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, **self.family.options
        ).last_hidden_state  # [B, L, D]
        return self.finished(POOLINGS[self.card.pooling](hidden, attention_mask))

    def finished(self, pooled: Tensor) -> Tensor:
        """Pooled float32 [B, D] → [B, dim]: the first dimensions, normalised."""
        pooled = pooled[:, : self.dim]
        return torch.nn.functional.normalize(pooled, dim=-1) if self.card.normalize else pooled

    def budget(self, max_tokens: int | None) -> TokenBudget | int:
        """Padded tokens of a batch: as given, else what was found for the device so far."""
        if max_tokens is not None:
            return max_tokens
        self._budget = self._budget or budget_for(self.device, self.dtype)
        return self._budget

    def encode(self, tokens: Tokens, max_tokens: int | None = None, bar=None) -> np.ndarray:
        """Vectors of tokenised texts, float32 [n, dim], in their order.

        Args:
            max_tokens: padded tokens of a batch; found for the device where not given.
        """
        budget = self.budget(max_tokens)
        with self.shortcut.settled(self.backbone):
            out = engine.run(
                self, tokens, pad_id=self.pad_token_id, max_tokens=budget,
                multiple=device.length_multiple(self.dtype, self.device), device=self.device, bar=bar,
            )  # fmt: skip
        return out.reshape(-1, self.dim)

    def encode_texts(
        self, texts: Sequence[str], kind: str, instructions: Sequence[str | None] | None = None,
        max_tokens: int | None = None, bar=None,
    ) -> np.ndarray:  # fmt: skip
        """Vectors of texts, float32 [n, dim], in their order; a thread tokenises what comes next meanwhile.

        Texts are taken in the order of their characters, the longest first, so that the ones in a
        batch have nearly the same number of tokens and memory runs out at once or never.

        Args:
            kind, instructions: see `tokenize`.
            max_tokens: see `encode`.
            bar: told of the texts that are done.
        """
        out = np.empty((len(texts), self.dim), np.float32)
        blocks = list(_blocks(np.fromiter(map(len, texts), np.int64, len(texts)), AHEAD))

        def tokenized(rows: np.ndarray) -> Tokens:
            own = None if instructions is None else [instructions[row] for row in rows]
            return self.tokenize([texts[row] for row in rows], kind, own)

        with ThreadPoolExecutor(1, "tokenize") as pool:
            ahead = pool.submit(tokenized, blocks[0]) if blocks else None
            for rows, following in zip_longest(blocks, blocks[1:]):
                tokens = ahead.result()  # raises what the thread raised
                if following is not None:
                    ahead = pool.submit(tokenized, following)
                out[rows] = self.encode(tokens, max_tokens, bar)
        return out

    def encode_heads(
        self, texts: Sequence[str], kind: str, heads: Sequence[str] = HEADS,
        instructions: Sequence[str | None] | None = None, max_tokens: int | None = None, bar=None,
    ) -> multihead.Encoded:  # fmt: skip
        """What an M3 model's heads make of texts, in their order; arguments as for `encode_texts`.

        Raises:
            UserError: for heads that the model does not have.
        """
        return multihead.encode(self, self.tokenize(texts, kind, instructions), heads, max_tokens, bar)

    def encode_queries(self, texts: Sequence[str], instructions: Sequence[str | None] | None = None) -> np.ndarray:
        """Vectors of queries, float32 [n, dim]."""
        return self.encode_texts(texts, "query", instructions)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of passages, float32 [n, dim]."""
        return self.encode_texts(texts, "passage")

    def save(self, folder: Path) -> None:
        """Write weights, tokenizer, sentence-transformers modules and prompts, also for transformers 4."""
        self.backbone.save_pretrained(folder)
        self.save_use(folder)

    def save_use(self, folder: Path) -> None:
        """Write what a checkpoint says beside its weights: tokenizer, sentence-transformers modules and prompts."""
        self.tokenizer.save(folder)
        prompts = {name: text for name, text in self.card.prompts.items() if name not in PASSAGE_PROMPTS}
        prompts |= {"query": self.prompts["query"].prefix(), "document": self.prompts["passage"].prefix()}
        longest = max(self.max_lengths.values())
        card = replace(self.card, prompts=prompts, max_length=self.card.max_length or longest)
        checkpoint.write_card(Path(folder), card, self.backbone.config.hidden_size)
        if self.heads is not None:
            heads.write(Path(folder), self.heads.state_dict())
        make_portable(Path(folder), self.tokenizer.hf, self.family.causal)


def _blocks(lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Rows in blocks of at least `size` characters in all (the last may have fewer), longest texts first."""
    order = np.argsort(-lengths, kind="stable")
    block_of = np.cumsum(lengths[order]) // size
    yield from np.split(order, np.flatnonzero(np.diff(block_of)) + 1) if len(order) else []
