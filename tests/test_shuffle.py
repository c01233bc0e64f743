"""Shuffled passages: what is drawn, what becomes of it, and how a batch takes it up."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_bert
from toy import toy_tables

from retune import tables
from retune.config import EmbedderConfig, TrainConfig
from retune.data import candidates
from retune.data.batches import Chunker, Group
from retune.data.shuffle import Shuffler, shuffled
from retune.model.embedder import Embedder
from retune.model.engine import tokens_of
from retune.stages.train import _collate

LONG = "".join(chr(ord("a") + i % 26) for i in range(120))


def letters(texts: list[str], queries: np.ndarray):
    """A letter a token."""
    return tokens_of([[ord(letter) for letter in text] for text in texts])


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=101, max_size=400), st.integers(0, 99))
def test_three_thirds_change_places_and_nothing_is_lost(text, seed):
    size = len(text) // 3 + 1
    found = shuffled(text, np.random.default_rng(seed))
    thirds = [text[:size], text[size : 2 * size], text[2 * size :]]
    orders = [" ".join(order) for order in permutations(thirds)]
    assert found in orders


def test_a_short_text_stays():
    assert shuffled("x" * 100, np.random.default_rng(0)) == "x" * 100


def test_the_share_is_drawn_anew_each_epoch_and_depends_on_the_seed_alone(tmp_path):
    """300 long positives, then 300 short ones."""
    data = candidates.load(**toy_tables(tmp_path, 600, n_negatives=1), group_size=2, seed=0)
    texts = [LONG] * 300 + ["short"] * 300
    queries, first = np.arange(600), Shuffler(data, texts, letters, 0.3, 7)
    drawn, tokens = first(0, queries, data.starts)
    assert not drawn[300:].any() and 60 <= drawn.sum() <= 120 and len(tokens) == drawn.sum()
    again, same = Shuffler(data, texts, letters, 0.3, 7)(0, queries, data.starts)
    assert (again == drawn).all() and same.ids.tolist() == tokens.ids.tolist()
    for epoch, seed in ((1, 7), (0, 8)):
        assert (Shuffler(data, texts, letters, 0.3, seed)(epoch, queries, data.starts)[0] != drawn).any()
    part = first(0, queries[50:90], data.starts[50:90])[0]
    assert (part == drawn[50:90]).all(), "what else is in the batch changes nothing"


def test_a_batch_reads_its_own_tokens_in_their_places():
    """Rows from 4 on are texts of this batch alone."""
    plain, more = [[7], [1, 2, 3], [4], [5, 6]], [[3, 2, 1, 9], [6, 5]]
    rows = np.array([3, 5, 1, 4, 2, 3])
    batch, places = Chunker(tokens_of(plain), 0, 8, 1, 0)(rows, tokens_of(more))
    assert read_back(batch, places) == [(plain + more)[row] for row in rows.tolist()]
    assert batch["n_tokens"] == sum(map(len, [plain[3], plain[1], plain[2], *more]))


TYPES = ["symmetric_sts", None, "symmetric_clustering", "symmetric_class", None, None]


def test_only_positives_are_shuffled_and_read_as_their_query_wants_it(tmp_path):
    """As in FlagEmbedding: negatives never, symmetric passages too, each under its own instruction."""
    paths = toy_tables(tmp_path, 6, type=TYPES, prompt=["a", "b", None, None, "c", None])
    text_ids = tables.read(paths["pairs"], "pairs")["text_id"].to_pylist()
    text_ids[4 * 5 + 3] = 4  # the positive of query 4 is a negative of query 5
    pairs = tables.read(paths["pairs"], "pairs").to_pydict() | {"text_id": text_ids}
    tables.write(paths["pairs"], "pairs", pairs)
    texts = [f"{'foo bar di ba ' * 9}{row}" for row in range(12)]  # longer than 100 characters
    columns = tables.read(paths["texts"], "texts").to_pydict() | {"text": texts}
    tables.write(paths["texts"], "texts", columns)
    data = candidates.load(**paths, group_size=4, seed=0)
    model = Embedder.load(EmbedderConfig(
        model=str(tiny_bert(tmp_path / "model")), query_instruction="foo ", passage_instruction="bar ",
        query_max_length=90, passage_max_length=100,
    ))  # fmt: skip
    made = _collate(model, data, paths["texts"], TrainConfig(shuffle_ratio=1.0), False, None, 5)
    batch = made([Group(query, data.starts[query] + np.arange(4), 2) for query in range(6)])
    read = read_back(batch, batch["passage_places"].numpy())
    moved = 0
    for at, text_id in enumerate(data.text_ids):
        query, member = divmod(at, 4)
        text = texts[text_id]
        if member == 0:
            text = shuffled(text, after_the_draw(5, 2, query))
            moved += text != texts[text_id]
        kind = "query" if TYPES[query] in ("symmetric_sts", "symmetric_clustering") else "passage"
        wanted = model.tokenize([text], kind, [data.prompts[query]] if kind == "query" else None)
        assert read[at] == wanted.ids.tolist()
    assert moved >= 4 and 4 in data.text_ids[4 * 5 + 1 : 4 * 6]  # both readings are in this batch
    plain = _collate(model, data, paths["texts"], TrainConfig(), False, None, 5)
    assert plain.shuffler is None and len(plain.chunker.tokens) == len(made.chunker.tokens)


def after_the_draw(seed: int, epoch: int, query: int) -> np.random.Generator:
    rng = np.random.default_rng([seed, epoch, query, 1])
    rng.random()
    return rng


def read_back(batch: dict, places: np.ndarray) -> list[list[int]]:
    """The tokens at each place of a batch's chunks."""
    rows = [
        row[mask > 0].tolist() if mask is not None else row.tolist()
        for chunk in batch["chunks"]
        for row, mask in zip(chunk["input_ids"], _masks(chunk), strict=True)
    ]
    return [rows[place] for place in places]


def _masks(chunk):
    mask = chunk.get("attention_mask")
    return [None] * len(chunk["input_ids"]) if mask is None else mask
