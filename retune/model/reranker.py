"""The reranker: a backbone that reads query and passage together, and a readout that makes it one score.

Pairs are put together from tokens: every distinct query and passage is tokenised once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retune.config import RerankerConfig
from retune.model import checkpoint, device, engine
from retune.model.backbone import load_tokenizer
from retune.model.budget import TokenBudget, budget_for
from retune.model.engine import Tokenizer, Tokens
from retune.model.families import FAMILIES, Source, family
from retune.model.frames import Frame
from retune.model.fused import Flat
from retune.model.portable import make_portable
from retune.model.prompts import Prompt
from retune.model.shortcut import Shortcut, head_of
from retune.runtime import UserError, log


class Reranker(torch.nn.Module):
    """(query, passage) → score, for every family of `retune.model.families.FAMILIES`.

    Attributes:
        family: its name. backbone: the model. frame: how a pair becomes tokens.
        max_length, query_max_length: tokens of a pair and of a query, as the frame counts them.
    """

    def __init__(
        self, name: str, backbone: torch.nn.Module, tokenizer: Tokenizer, frame: Frame, settings: RerankerConfig,
        limit: int | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.family, self.backbone, self.tokenizer, self.frame, self.settings = (
            name,
            backbone,
            tokenizer,
            frame,
            settings,
        )
        self.pad_token_id = tokenizer.hf.pad_token_id or 0
        self.max_length = min(settings.max_length, limit - frame.extra if limit else settings.max_length)
        if self.max_length < settings.max_length:
            log.warning("reranker.max_length: the model takes %d tokens at most", self.max_length)
        room = self.max_length + frame.extra - frame.size  # tokens for query and passage together
        if room - frame.spared < 1:
            raise UserError(f"reranker.max_length: the model's template alone has {frame.size} tokens")
        self.query_max_length = min(settings.query_max_length or self.max_length * 3 // 4, room - frame.spared)
        if settings.query_max_length and settings.query_max_length > self.query_max_length:
            log.warning("reranker.query_max_length: at most %d tokens fit max_length", self.query_max_length)
        self._budget: TokenBudget | None = None
        self.shortcut = Shortcut()
        self.prompts = {
            "query": Prompt(
                None if frame.instructed else settings.query_instruction, settings.query_instruction_format
            ),
            "passage": Prompt(settings.passage_instruction, settings.passage_instruction_format),
        }

    @classmethod
    def load(
        cls, settings: RerankerConfig | str | Path, dtype: torch.dtype | None = None,
        target: torch.device | None = None, fresh: bool = False,
    ) -> Reranker:  # fmt: skip
        """Load a checkpoint; with `fresh`, an encoder's weights under a new head, to be trained.

        Raises:
            UserError: for a reference that leads nowhere, or a checkpoint that is no reranker.
        """
        if not isinstance(settings, RerankerConfig):
            settings = RerankerConfig(model=str(settings))
        folder = checkpoint.resolve(settings.model, settings.revision, settings.sha256)
        target = target or device.best_device()
        dtype = dtype or device.compute_dtype(settings.dtype, target)
        tokenizer = Tokenizer(load_tokenizer(folder, settings.trust_remote_code))
        name, frame, backbone = family(Source(folder, tokenizer, settings, dtype, fresh))
        return cls(name, backbone.to(target).eval(), tokenizer, frame, settings, checkpoint.positions(folder))

    @classmethod
    def start(cls, settings: RerankerConfig, seed: int, target: torch.device | None = None) -> Reranker:
        """A reranker to be trained: the encoder's weights in float32 and a new head, drawn with `seed`."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cls.load(settings, torch.float32, target, fresh=True)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    def pieces(self, texts: Sequence[str], kind: str) -> Tokens:
        """Ids of queries or passages as they stand in a pair, the queries cut to their length."""
        limit = self.query_max_length + self.frame.spared if kind == "query" else self.max_length
        return self.frame.pieces(self.tokenizer, self.prompts[kind].apply(texts), kind, limit)

    def join(self, queries: Tokens, passages: Tokens, query_rows: np.ndarray, passage_rows: np.ndarray) -> Tokens:
        """Tokens of the pairs (query_rows[i], passage_rows[i]); the passage is cut where a pair is too long."""
        return self.frame.join(queries, passages, query_rows, passage_rows, self.max_length)

    def tokenize(self, queries: Sequence[str], passages: Sequence[str]) -> Tokens:
        """Tokens of the pairs (queries[i], passages[i])."""
        rows = np.arange(len(queries))
        return self.join(self.pieces(queries, "query"), self.pieces(passages, "passage"), rows, rows)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """input_ids, attention_mask, token_type_ids int64 [B, L], padded on the right → scores float32 [B]."""
        head = head_of(self.backbone)
        if head and (flat := self.shortcut.of(self.backbone.base_model, attention_mask)) is not None:
            first = flat(Flat.of(input_ids, attention_mask, token_type_ids), first=True)  # [B, D]
            return head(self.backbone, first.unsqueeze(1))[:, 0].float()
        return FAMILIES[self.family].read(self.backbone, input_ids, attention_mask, token_type_ids)

    def scores(self, tokens: Tokens, max_tokens: int | None = None, bar=None) -> np.ndarray:
        """Scores of tokenised pairs, float32 [n]: as they are, or their sigmoids where `normalize` is set."""
        if max_tokens is None and self._budget is None:
            self._budget = budget_for(self.device, self.dtype)
        with self.shortcut.settled(getattr(self.backbone, "base_model", self.backbone)):
            logits = engine.run(
                self, tokens, pad_id=self.pad_token_id, max_tokens=self._budget if max_tokens is None else max_tokens,
                multiple=device.length_multiple(self.dtype, self.device), device=self.device, bar=bar,
            )  # fmt: skip
        return np.exp(-np.logaddexp(0, -logits)) if self.settings.normalize else logits

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Scores of (query, passage) pairs, float32 [n]."""
        return self.scores(self.tokenize([query for query, _ in pairs], [passage for _, passage in pairs]))

    def save(self, folder: Path) -> None:
        """Write weights and tokenizer so that the same family, and for a classifier `CrossEncoder(folder)`, loads them.

        Raises:
            UserError: for a model that is read by layers, which is for scoring alone.
        """
        FAMILIES[self.family].save(self.backbone, folder)
        self.tokenizer.save(folder)
        make_portable(Path(folder))
