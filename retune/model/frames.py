"""Frames: how a query and a passage become the tokens of a pair.

Every distinct query and passage is tokenised once, alone; a frame holds the tokens around them.  So
that this gives the tokens of the whole text tokenised at once, a boundary between pieces lies where
no token can reach across: at a special token, or after a line break.  Knows tokenizers and token
arrays; nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from retune.model.engine import Tokenizer, Tokens, ragged
from retune.runtime import UserError, log

QUERY_SLOT, PASSAGE_SLOT = "the·query·slot", "the·passage·slot"


@dataclass(frozen=True)
class Frame:
    """Tokens before, between and after the texts, and what belongs to the texts themselves.

    Attributes:
        parts: ids before, between and after the texts, int32 [m] each.
        heads: text that is tokenised with each query or passage, before it.
        tails: the same after it; of a text that is cut, the tail stays.
        tail_ids: token ids of the tails.
        types: segments of (before, query, between, passage, after); None where the model has none.
            Those of `parts` may be one number or one for each token.
        extra: tokens of the frame that do not count towards `max_length`.
        spared: tokens of the query's head and tail that do not count towards `query_max_length`.
        instructed: whether the query's instruction is part of the frame already.
    """

    parts: tuple[np.ndarray, np.ndarray, np.ndarray]
    heads: dict[str, str] = field(default_factory=dict)
    tails: dict[str, str] = field(default_factory=dict)
    tail_ids: dict[str, np.ndarray] = field(default_factory=dict)
    types: tuple | None = None
    extra: int = 0
    spared: int = 0
    instructed: bool = False

    @property
    def size(self) -> int:
        """Tokens around the texts."""
        return sum(len(part) for part in self.parts)

    def pieces(self, tokenizer: Tokenizer, texts: Sequence[str], kind: str, limit: int) -> Tokens:
        """Ids of queries or passages, heads and tails included, cut to `limit`."""
        head, tail = self.heads.get(kind, ""), self.tails.get(kind, "")
        texts = [head + text + tail for text in texts] if head or tail else texts
        if not tail:
            return tokenizer(texts, limit, special=False)
        tokens, last = tokenizer(texts, limit + 1, special=False), self.tail_ids[kind][-limit:]
        lengths = np.minimum(tokens.lengths, limit)
        where, offsets = ragged(tokens.offsets[:-1], lengths)
        ids = tokens.ids[where]
        ends = offsets[1:][tokens.lengths > limit]
        ids[ends[:, None] - np.arange(len(last), 0, -1)] = last  # [cut, tail]
        return Tokens(ids, offsets)

    def join(
        self, queries: Tokens, passages: Tokens, query_rows: np.ndarray, passage_rows: np.ndarray, max_length: int
    ) -> Tokens:
        """Tokens of the pairs (query_rows[i], passage_rows[i]); the passage is cut where a pair is too long."""
        sizes, n = [len(part) for part in self.parts], len(query_rows)
        query_lengths = queries.lengths[query_rows]
        room = np.maximum(max_length + self.extra - self.size - query_lengths, 0)
        passage_lengths = np.minimum(passages.lengths[passage_rows], room)
        before, between, after = self.parts
        pieces = [before, queries.ids, between, passages.ids, after]
        at = np.cumsum([0, *(len(piece) for piece in pieces)])  # where each begins in the flat array
        starts = np.stack([
            np.full(n, at[0]), at[1] + queries.offsets[query_rows], np.full(n, at[2]),
            at[3] + passages.offsets[passage_rows], np.full(n, at[4]),
        ], 1)  # fmt: skip
        lengths = np.stack(
            [np.full(n, sizes[0]), query_lengths, np.full(n, sizes[1]), passage_lengths, np.full(n, sizes[2])], 1
        )
        where, _ = ragged(starts.ravel(), lengths.ravel())
        offsets = np.concatenate([[0], np.cumsum(lengths.sum(1))])
        ids = np.concatenate(pieces).astype(np.int32)[where]
        if self.types is None:
            return Tokens(ids, offsets)
        kinds = [np.broadcast_to(kind, len(piece)) for kind, piece in zip(self.types, pieces, strict=True)]
        return Tokens(ids, offsets, np.concatenate(kinds).astype(np.int8)[where])


def ids_of(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids of one text, without special tokens that are not written in it, int32 [m]."""
    return tokenizer([text], None, special=False).ids


def pair(tokenizer: Tokenizer) -> Frame:
    """The tokenizer's own way to join two texts, read off an example.

    Raises:
        UserError: for a tokenizer in Python, which does not tell where the texts are.
    """
    if tokenizer.fast is None:
        raise UserError("a reranker needs a fast tokenizer (tokenizer.json)")
    encoded = tokenizer.hf("a", "b")
    ids, of = np.array(encoded["input_ids"], np.int32), encoded.sequence_ids(0)
    first = [i for i, s in enumerate(of) if s == 0]
    second = [i for i, s in enumerate(of) if s == 1]
    a, b, c, d = first[0], first[-1] + 1, second[0], second[-1] + 1
    types = None
    if "token_type_ids" in encoded:
        kinds = np.array(encoded["token_type_ids"])
        types = (kinds[:a], kinds[first[0]], kinds[b:c], kinds[second[0]], kinds[d:])
    return Frame((ids[:a], ids[b:c], ids[d:]), types=types)


def question(tokenizer: Tokenizer, prompt: str, mark_passage: bool = False) -> Frame:
    r"""`<bos>A: {query}\nB: {passage}\n{prompt}`, as BAAI's decoders read a pair.

    The separator and the prompt are tokenised alone.  As with the incumbent, <bos>, query, separator and
    passage may have `max_length` tokens and a separator's and the prompt's number on top, and are then
    followed by a separator and the prompt.

    Args:
        mark_passage: give the passage's tokens segment 1 and all others 0, for models that merge them.
    """
    hf, separator, asked = tokenizer.hf, ids_of(tokenizer, "\n"), ids_of(tokenizer, prompt)
    begin = [] if hf.bos_token_id in (None, hf.pad_token_id) else [hf.bos_token_id]
    parts = (np.array(begin, np.int32), separator, np.concatenate([separator, asked]))
    types = (0, 0, 0, 1, 0) if mark_passage else None
    return Frame(parts, heads={"query": "A: ", "passage": "B: "}, types=types, extra=2 * (len(separator) + len(asked)))


def template(tokenizer: Tokenizer, text: str) -> Frame:
    """A frame from a rendered template with `QUERY_SLOT` and `PASSAGE_SLOT` in it, special tokens written out.

    What stands between the last line break before a text and the text is tokenised with it.

    Raises:
        UserError: if the slots are not there once each, the query's first.
    """
    if (
        text.count(QUERY_SLOT) != 1
        or text.count(PASSAGE_SLOT) != 1
        or text.index(QUERY_SLOT) > text.index(PASSAGE_SLOT)
    ):
        raise UserError("the chat template must show the query and then the passage, once each")
    before, rest = text.split(QUERY_SLOT)
    between, after = rest.split(PASSAGE_SLOT)
    start, query_head = _after_line(before)
    query_tail, passage_head = _after_line(between)
    empty = np.empty(0, np.int32)
    frame = Frame(
        (ids_of(tokenizer, start) if start else empty, empty, ids_of(tokenizer, after) if after else empty),
        heads={"query": query_head, "passage": passage_head}, tails={"query": query_tail},
        tail_ids={"query": ids_of(tokenizer, query_tail) if query_tail else empty},
        spared=len(ids_of(tokenizer, query_head + query_tail)), instructed=True,
    )  # fmt: skip
    _compare(frame, tokenizer, text)
    return frame


def _after_line(text: str) -> tuple[str, str]:
    """`text` in two: to its last line break, and what follows."""
    cut = text.rfind("\n") + 1
    return text[:cut], text[cut:]


def _compare(frame: Frame, tokenizer: Tokenizer, text: str) -> None:
    """Warn where the pieces of a sample pair are not the tokens of the whole."""
    query, passage = "What is it?", "It is one. (So it is said.)"
    one = np.zeros(1, np.int64)
    pieces = (frame.pieces(tokenizer, [query], "query", 999), frame.pieces(tokenizer, [passage], "passage", 999))
    found = frame.join(*pieces, one, one, 9999).ids
    whole = ids_of(tokenizer, text.replace(QUERY_SLOT, query).replace(PASSAGE_SLOT, passage))
    if not np.array_equal(found, whole):
        log.warning("the reranker's template is tokenised in pieces, which differ a little from the whole")
