"""Texts as an embedder reads them: prompts around them, cut to a length, as token ids.

Knows the tokenizer and how the checkpoint is used; nothing of weights, vectors or heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retune.config import EmbedderConfig
from retune.model.checkpoint import Card
from retune.model.engine import Tokenizer, Tokens
from retune.model.incontext import SLACK, Context, cut, rendered
from retune.model.prompts import Prompt
from retune.runtime import UserError, log

PASSAGE_PROMPTS = ("document", "passage", "corpus")


class Reader:
    """Texts → token ids.

    Attributes:
        card: how the checkpoint is used, with the config's choices applied.
        prompts: {"query": Prompt, "passage": Prompt}. max_lengths: tokens, by the same keys.
        context: what stands around every query of an in-context model; None for others.
    """

    def __init__(self, tokenizer, card: Card, settings: EmbedderConfig) -> None:
        self.card, self.settings = card, settings
        self.tokenizer = Tokenizer(tokenizer)
        self.pad_token_id = tokenizer.pad_token_id or 0
        said = {"query": card.prompts.get("query")}
        said["passage"] = next((card.prompts[name] for name in PASSAGE_PROMPTS if card.prompts.get(name)), None)
        self.prompts = {
            kind: Prompt(instruction, card.formats[kind], said[kind] if instruction is None else None)
            for kind in ("query", "passage")
            for instruction in (getattr(settings, f"{kind}_instruction"),)
        }
        self.context: Context | None = None
        if card.suffix is not None:
            template = settings.examples_instruction_format
            self.context = Context(card.suffix, rendered(settings.examples, template, settings.query_instruction))
        elif settings.examples:
            raise UserError(f"embedder.examples: {settings.model} is no in-context model; set embedder.family: icl")
        self.max_lengths = {
            "query": min(settings.query_max_length or 10**9, card.max_length or 512),
            "passage": min(settings.passage_max_length or 10**9, card.max_length or 512),
        }
        for kind in ("query", "passage"):
            asked = getattr(settings, f"{kind}_max_length")
            if asked and asked > self.max_lengths[kind]:
                log.warning("embedder.%s_max_length: the model takes %d tokens at most", kind, self.max_lengths[kind])

    def tokenize(self, texts: Sequence[str], kind: str, instructions: Sequence[str | None] | None = None) -> Tokens:
        """Ids of texts as the model reads them: prompt, special tokens, cut to the kind's length.

        Args:
            kind: "query" or "passage".
            instructions: a text's own instruction, which comes before the common one.
        """
        limit = self.max_lengths[kind]
        if kind == "query" and self.context is not None and self.context.examples:
            limit += int(self.tokenizer([self.context.examples], None).lengths[0]) + SLACK
        return self.tokenizer(self.read(texts, kind, instructions), limit)

    def cut(self, texts: Sequence[str], kind: str, instructions: Sequence[str | None] | None = None) -> np.ndarray:
        """Whether `tokenize` leaves an end of each text out, bool [n]."""
        if kind == "query" and self.context is not None:
            own = self.prompts[kind].apply(texts, instructions)
            return self.tokenizer(own, None, special=False).lengths > self.room()
        limit = self.max_lengths[kind]
        return self.tokenizer(self.read(texts, kind, instructions), limit + 1).lengths > limit

    def read(self, texts: Sequence[str], kind: str, instructions: Sequence[str | None] | None = None) -> list[str]:
        """The texts as the tokenizer gets them, with prompts and all that stands around a query.

        Arguments are those of `tokenize`.
        """
        texts = self.prompts[kind].apply(texts, instructions)
        if kind == "query" and self.context is not None:
            kept = cut(self.tokenizer, texts, self.room())
            texts = [f"{self.context.examples}{text}{self.context.suffix}" for text in kept]
        return [text.lower() for text in texts] if self.card.lowercase else texts

    def tokenize_within(self, texts: Sequence[str], prefixes: Sequence[str]) -> Tokens:
        """Ids of queries, instructions included, each after examples of its own; prefix and query together are cut."""
        whole = [prefix + text for prefix, text in zip(prefixes, texts, strict=True)]
        whole = [text + self.context.suffix for text in cut(self.tokenizer, whole, self.room())]
        return self.tokenizer(whole, self.max_lengths["query"])

    def room(self, length: int = 0, kept: int = 0) -> int:
        """Tokens that a query's length leaves beside its suffix, special tokens and `length`, of which `kept` count."""
        around = self.tokenizer([self.context.suffix], None).lengths[0]
        return int(self.max_lengths["query"] - around - min(length, kept))
