"""The reranker: a backbone that reads query and passage together, with one logit as readout.

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
from retune.model.backbone import load_classifier, load_tokenizer
from retune.model.engine import Tokenizer, Tokens, ragged
from retune.model.prompts import Prompt
from retune.runtime import UserError, log


class Reranker(torch.nn.Module):
    """(query, passage) → logit, for sequence classifiers with one label (BERT, XLM-R and their kin)."""

    def __init__(self, backbone: torch.nn.Module, tokenizer, settings: RerankerConfig, limit: int | None) -> None:
        super().__init__()
        self.backbone, self.settings = backbone, settings
        self.tokenizer = Tokenizer(tokenizer)
        self.pad_token_id = tokenizer.pad_token_id or 0
        self.max_length = min(settings.max_length, limit or settings.max_length)
        if self.max_length < settings.max_length:
            log.warning("reranker.max_length: the model takes %d tokens at most", self.max_length)
        self._frame, self._types = self._read_frame()
        room = self.max_length - sum(len(ids) for ids, _ in self._frame)  # tokens for query and passage together
        self.query_max_length = min(settings.query_max_length or self.max_length * 3 // 4, room)
        if settings.query_max_length and settings.query_max_length > room:
            log.warning("reranker.query_max_length: at most %d tokens fit max_length", room)
        self.prompts = {
            "query": Prompt(settings.query_instruction, settings.query_instruction_format),
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
        backbone = load_classifier(folder, dtype, settings.trust_remote_code, fresh).to(target).eval()
        limit = checkpoint.positions(folder)
        return cls(backbone, load_tokenizer(folder, settings.trust_remote_code), settings, limit)

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
        """Ids of queries or passages without special tokens, the queries cut to their length."""
        limit = self.query_max_length if kind == "query" else self.max_length
        return self.tokenizer(self.prompts[kind].apply(texts), limit, special=False)

    def join(self, queries: Tokens, passages: Tokens, query_rows: np.ndarray, passage_rows: np.ndarray) -> Tokens:
        """Tokens of the pairs (query_rows[i], passage_rows[i]); the passage is cut where a pair is too long."""
        frame, (query_type, passage_type) = self._frame, self._types or (0, 0)
        sizes = [len(part) for part, _ in frame]
        query_lengths = queries.lengths[query_rows]
        room = np.maximum(self.max_length - sum(sizes) - query_lengths, 0)
        passage_lengths = np.minimum(passages.lengths[passage_rows], room)
        flat = np.concatenate([*(part for part, _ in frame), queries.ids, passages.ids]).astype(np.int32)
        types = np.concatenate([
            *(kinds for _, kinds in frame),
            np.full(len(queries.ids), query_type), np.full(len(passages.ids), passage_type),
        ]).astype(np.int8)  # fmt: skip
        at = np.cumsum([0, *sizes])  # where prefix, middle, suffix, queries and passages begin in `flat`
        n = len(query_rows)
        starts = np.stack([
            np.full(n, at[0]), at[3] + queries.offsets[query_rows], np.full(n, at[1]),
            at[3] + len(queries.ids) + passages.offsets[passage_rows], np.full(n, at[2]),
        ], 1)  # fmt: skip
        lengths = np.stack(
            [np.full(n, sizes[0]), query_lengths, np.full(n, sizes[1]), passage_lengths, np.full(n, sizes[2])], 1
        )
        where, _ = ragged(starts.ravel(), lengths.ravel())
        offsets = np.concatenate([[0], np.cumsum(lengths.sum(1))])
        return Tokens(flat[where], offsets, types[where] if self._types else None)

    def tokenize(self, queries: Sequence[str], passages: Sequence[str]) -> Tokens:
        """Tokens of the pairs (queries[i], passages[i])."""
        rows = np.arange(len(queries))
        return self.join(self.pieces(queries, "query"), self.pieces(passages, "passage"), rows, rows)

    def _read_frame(self) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[int, int] | None]:
        """How the tokenizer joins two texts, read off an example.

        Returns (ids, segments) of the special tokens before, between and after the texts, and the
        segments of the two texts; None where the model has no segments.
        """
        if self.tokenizer.fast is None:
            raise UserError(f"model {self.settings.model}: a reranker needs a fast tokenizer (tokenizer.json)")
        encoded = self.tokenizer.hf("a", "b")
        ids, of = np.array(encoded["input_ids"]), encoded.sequence_ids(0)
        types = np.array(encoded.get("token_type_ids") or [0] * len(ids))
        first = [i for i, s in enumerate(of) if s == 0]
        second = [i for i, s in enumerate(of) if s == 1]
        cuts = [(0, first[0]), (first[-1] + 1, second[0]), (second[-1] + 1, len(ids))]
        kinds = (int(types[first[0]]), int(types[second[0]])) if "token_type_ids" in encoded else None
        return [(ids[a:b], types[a:b]) for a, b in cuts], kinds

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """input_ids, attention_mask, token_type_ids int64 [B, L] → logits float32 [B]."""
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask, **segments).logits[:, 0].float()

    def scores(self, tokens: Tokens, max_tokens: int | None = None, bar=None) -> np.ndarray:
        """Scores of tokenised pairs, float32 [n]: logits, or their sigmoids where `normalize` is set."""
        logits = engine.run(
            self, tokens, pad_id=self.pad_token_id, max_tokens=max_tokens or device.default_token_budget(self.device),
            multiple=device.length_multiple(self.dtype, self.device), device=self.device, bar=bar,
        )  # fmt: skip
        return np.exp(-np.logaddexp(0, -logits)) if self.settings.normalize else logits

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Scores of (query, passage) pairs, float32 [n]."""
        return self.scores(self.tokenize([query for query, _ in pairs], [passage for _, passage in pairs]))

    def save(self, folder: Path) -> None:
        """Write weights and tokenizer so that `CrossEncoder(folder)` gives the same logits."""
        # sentence-transformers reads the activation of its predictions from here
        self.backbone.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        self.backbone.save_pretrained(folder)
        self.tokenizer.save(folder)
