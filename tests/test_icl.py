"""In-context learning: what a query reads, in training and in use, and the same vectors in FlagEmbedding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from flagembedding import ask, needs_flagembedding
from sentence_transformers import SentenceTransformer
from test_train import job
from tiny import WORDS, some_texts, tiny_decoder
from toy import mrr, toy_tables

from retune import tables
from retune.cli import main
from retune.config import EmbedderConfig, IngestConfig, TrainConfig
from retune.data import candidates, encode
from retune.data.batches import Chunker, Group, joined
from retune.data.incontext import InContextCollate
from retune.experiment import load as load_experiment
from retune.model.embedder import Embedder
from retune.model.incontext import cut
from retune.plan import Node, Plan
from retune.runtime import UserError
from retune.stages.ingest import ingest
from retune.stages.train import train

CPU = torch.device("cpu")
TEXTS = [*some_texts(10, longest=20), "a"]
EXAMPLES = [{"query": "bar?", "response": "co di"}, {"instruct": "Sort", "query": "fun", "response": "ge"}]
SHOWN = "<instruct>Find\n<query>bar?\n<response>co di\n\n<instruct>Sort\n<query>fun\n<response>ge\n\n"


def load(model: Path | str, **settings) -> Embedder:
    return Embedder.load(EmbedderConfig(model=str(model), **{"family": "icl"} | settings), target=CPU)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tiny_decoder(tmp_path_factory.mktemp("icl"), "mistral", max_position_embeddings=2048)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 2048}))
    return folder


def spelled(model: Embedder, ids) -> str:
    return model.tokenizer.hf.decode(ids)


# ---- what a query reads -------------------------------------------------------------------------


def test_a_query_stands_between_examples_and_suffix(base):
    model = load(base, query_instruction="Find", examples=EXAMPLES)
    assert model.read(["co?"], "query") == [SHOWN + "<instruct>Find\n<query>co?\n<response>"]
    assert model.read(["co?"], "query", ["Own"]) == [SHOWN + "<instruct>Own\n<query>co?\n<response>"]
    assert model.read(["co?"], "passage") == ["co?"]
    own = load(base, icl_suffix_str="\\nResponse:", examples=[{"query": "q", "response": "r"}],
               examples_instruction_format="{}\\n{} -> {}")  # fmt: skip
    assert own.read(["co?"], "query") == ["\nq -> r\n\nco?\nResponse:"]
    ids = model.tokenize(["co?"], "query").ids
    assert spelled(model, ids) == model.read(["co?"], "query")[0] + "<eos>"


def test_texts_are_cut_by_their_tokens(base):
    model = load(base)
    text = "bar coст " * 9
    tokens = model.tokenizer.hf(text, add_special_tokens=False)["input_ids"]
    for limit in range(1, len(tokens)):
        short = cut(model.tokenizer, [text, "bar", ""], limit)
        assert text.startswith(short[0]) and short[1:] == ["bar", ""]
        ids = model.tokenizer.hf(short[0], add_special_tokens=False)["input_ids"]
        assert ids == tokens[: len(ids)] and limit - 1 <= len(ids) <= limit, "a letter of two tokens is not torn"
    assert cut(model.tokenizer, [text, text], np.array([0, 3]))[0] == ""


def test_only_the_query_is_cut(base):
    model = load(base, query_instruction="Find", examples=EXAMPLES, query_max_length=60)
    long = " ".join(["bar"] * 200)
    read = model.read([long], "query")[0]
    assert read.startswith(SHOWN + "<instruct>Find\n<query>bar") and read.endswith("\n<response>")
    ids = model.tokenize([long], "query").ids
    assert spelled(model, ids) == read + "<eos>"
    bare = load(base, query_instruction="Find", query_max_length=60)
    assert 58 <= len(bare.tokenize([long], "query").ids) <= 60
    shown = len(model.tokenizer.hf(SHOWN, add_special_tokens=False)["input_ids"])
    assert len(ids) == pytest.approx(60 + shown, abs=2)


def test_examples_make_another_text_for_the_cache(base, tmp_path):
    rows = encode.Rows(toy_tables(tmp_path)["queries"], "query", 0, 5)
    plain, shown = encode.digests(load(base), rows), encode.digests(load(base, examples=EXAMPLES), rows)
    assert not (plain == shown).any()


def test_examples_are_for_in_context_models(base):
    with pytest.raises(UserError, match=r"embedder\.examples: .* is no in-context model; set embedder\.family: icl"):
        load(base, family="decoder", examples=EXAMPLES)


# ---- batches ------------------------------------------------------------------------------------

N = 12


def train_set(folder: Path, **changed) -> tuple[candidates.TrainSet, list[str], Path]:
    paths = toy_tables(folder, N, **changed)
    data = candidates.load(paths["texts"], paths["queries"], paths["pairs"], group_size=3, seed=0)
    return data, tables.read(paths["texts"], "texts")["text"].to_pylist(), paths["texts"]


def collate(model: Embedder, data: candidates.TrainSet, texts: list[str], path: Path, **settings) -> InContextCollate:
    tokens = joined([model.tokenize(data.queries, "query", data.prompts), model.tokenize(texts, "passage")])
    return InContextCollate(
        data, Chunker(tokens, model.pad_token_id, 10**6, overhead=10**6), len(data) + data.text_ids, False, None,
        model=model,
        positives=candidates.positive_texts(data, path), settings=TrainConfig(**settings), seed=3,
    )  # fmt: skip


def groups(data: candidates.TrainSet, rows) -> list[Group]:
    return [Group(row, data.starts[row] + np.arange(3)) for row in rows]


def read_back(made: InContextCollate, batch: dict) -> list[str]:
    """The queries of a batch as the model reads them."""
    (chunk,) = batch["chunks"]
    found = []
    for place in batch["query_places"].tolist():
        mask = chunk.get("attention_mask", torch.ones_like(chunk["input_ids"]))[place].bool()
        found.append(spelled(made.model, chunk["input_ids"][place][mask].tolist()))
    return found


def parts(read: str) -> tuple[list[str], str]:
    """(examples, the query itself) of what was read."""
    *examples, own = read.removesuffix("<eos>").removesuffix("\n<response>").split("\n\n")
    return examples, own


def test_examples_are_other_queries_of_the_batch(base, tmp_path):
    model = load(base, query_instruction="Find", query_max_length=1000)
    data, texts, path = train_set(tmp_path)
    made = collate(model, data, texts, path)
    valid = {
        row: f"<instruct>Find\n<query>{data.queries[row]}\n<response>{texts[row]}" for row in range(N)
    }  # text i is the positive of query i
    numbers = []
    for rows in (range(N), range(6), [3, 1, 2]):
        reads = read_back(made, made(groups(data, rows)))
        for row, read in zip(rows, reads, strict=True):
            examples, own = parts(read)
            assert own == f"<instruct>Find\n<query>{data.queries[row]}"
            assert len(set(examples)) == len(examples) <= 5
            assert set(examples) <= {valid[other] for other in rows if other != row}
            numbers.append(len(examples))
    assert min(numbers) == 0 and max(numbers) == 5
    same, other = made(groups(data, range(6))), made(groups(data, range(1, 7)))
    assert read_back(made, same) == read_back(made, made(groups(data, range(6))))
    assert read_back(made, same)[1:] != read_back(made, other)[:5]


def test_passages_are_those_of_any_batch(base, tmp_path):
    model = load(base)
    data, texts, path = train_set(tmp_path)
    made = collate(model, data, texts, path)
    batch = made(groups(data, range(4)))
    (chunk,) = batch["chunks"]
    for place, candidate in zip(
        batch["passage_places"].tolist(), [data.starts[r] + j for r in range(4) for j in range(3)], strict=True
    ):
        mask = chunk["attention_mask"][place].bool()
        expected = model.tokenize([texts[data.text_ids[candidate]]], "passage").ids
        assert chunk["input_ids"][place][mask].tolist() == expected.tolist()


def test_which_queries_get_examples(base, tmp_path):
    types = ["symmetric_sts"] * 4 + [None] * 4 + ["symmetric_clustering"] * 4
    data, texts, path = train_set(tmp_path, type=types, category=[None] * 8 + ["odd", "even"] * 2)
    made = collate(load(base), data, texts, path, retrieval_use_examples=False)
    seen: dict[int, set[str]] = {row: set() for row in range(N)}
    for shift in range(8):
        rows = np.roll(np.arange(N), shift)
        for row, read in zip(rows, read_back(made, made(groups(data, rows))), strict=True):
            seen[int(row)] |= set(parts(read)[0])
    assert not any(seen[row] for row in range(4, 8)), "retrieval is told to do without"
    assert all(len(seen[row]) == 3 for row in [*range(4), *range(8, 12)]), "all others of the same task"
    assert {shown.split("<response>")[1] for shown in seen[8]} == {"odd", "even"}, "a category for an answer"
    data, texts, path = train_set(tmp_path / "without", type=types)
    with pytest.raises(UserError, match=r"toy\.jsonl:9: category: symmetric_clustering shows it"):
        collate(load(base), data, texts, path)


def test_examples_are_cut_and_leave_room_for_the_query(base, tmp_path):
    data, texts, path = train_set(tmp_path)
    model = load(base, query_max_length=60)
    made = collate(model, data, texts, path, example_query_max_len=4, example_passage_max_len=3)
    count = lambda text: len(model.tokenizer.hf(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    numbers = []
    for shift in range(4):
        rows = np.roll(np.arange(N), shift)
        batch = made(groups(data, rows))
        for row, read in zip(rows, read_back(made, batch), strict=True):
            examples, own = parts(read)
            assert own == data.queries[row], "whole"
            assert all(
                count(one.split("\n<response>")[0]) <= 4 and count(one.split("\n<response>")[1]) <= 3
                for one in examples
            )
            assert count(read) <= 61
            numbers.append(len(examples))
    assert max(numbers) > 1
    tight = collate(load(base, query_max_length=24), data, texts, path)
    assert not any(parts(read)[0] for read in read_back(tight, tight(groups(data, range(N)))))


# ---- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    asked = job(folder, base, toy_tables(folder / "tables"), {"num_train_epochs": 8, "learning_rate": 3e-3})
    asked["embedder"] = EmbedderConfig(
        model=str(base), family="icl", query_instruction="Find", query_max_length=400, examples=EXAMPLES,
        icl_suffix_str="\n<answer>",
    )  # fmt: skip
    train(**asked)
    return folder


def test_training_lowers_the_loss_and_lifts_mrr(trained, base):
    losses = tables.read(trained / "history.parquet", "history")["loss"].to_pylist()
    assert losses[-1] < 0.6 * losses[0]
    after = Embedder.load(EmbedderConfig(model=str(trained / "model")), target=CPU)
    before = load(base, query_instruction="Find", icl_suffix_str="\n<answer>")
    assert mrr(after, trained) > mrr(before, trained) + 0.2


def test_what_is_saved(trained):
    model = Embedder.load(str(trained / "model"))
    assert model.card.family == "icl" and model.read(["co?"], "query") == ["<instruct>Find\n<query>co?\n<answer>"]
    shown = load(trained / "model", query_instruction="Find", examples=EXAMPLES[:1])
    assert shown.read(["co?"], "query")[0].startswith("<instruct>Find\n<query>bar?\n<response>co di\n\n<instruct>Find")
    theirs = SentenceTransformer(str(trained / "model"), device="cpu")
    np.testing.assert_allclose(model.encode_passages(TEXTS), theirs.encode(TEXTS), atol=1e-5)
    with_suffix = [text + "\n<answer>" for text in TEXTS]  # their prompts end before the text
    np.testing.assert_allclose(model.encode_queries(TEXTS), theirs.encode_query(with_suffix), atol=1e-5)


THEIRS = """
import json, sys
import numpy as np
from FlagEmbedding import FlagICLModel
folder, out, texts, examples = json.loads(sys.stdin.read())
model = FlagICLModel(
    folder, query_instruction_for_retrieval="Find", suffix="\\n<answer>", examples_for_task=examples,
    use_fp16=False, devices="cpu",
)
shown = model.encode_queries(texts)
model.examples_for_task = None
model.set_examples()
np.savez(out, shown=shown, plain=model.encode_queries(texts), passages=model.encode_corpus(texts))
"""


@needs_flagembedding
def test_flagembedding_gives_the_same_vectors(trained, tmp_path):
    ask(THEIRS, str(trained / "model"), str(tmp_path / "out.npz"), TEXTS, EXAMPLES)
    theirs = np.load(tmp_path / "out.npz")
    model = load(trained / "model")
    shown = load(trained / "model", query_instruction="Find", examples=EXAMPLES)
    np.testing.assert_allclose(model.encode_passages(TEXTS), theirs["passages"], atol=1e-4)
    np.testing.assert_allclose(model.encode_queries(TEXTS), theirs["plain"], atol=1e-4)
    np.testing.assert_allclose(shown.encode_queries(TEXTS), theirs["shown"], atol=1e-4)


def test_examples_leave_the_passages_vectors_alone():
    raw = {"embedder": {"model": "m", "family": "icl"}, "ingest": {"train": "t.jsonl"}, "name": "x"}
    plan = Plan(load_experiment(raw | {"variants": {"shown": {"embedder": {"examples": EXAMPLES}}}}))
    texts, queries = (Node("x.shown", "embed", ("base", "train", part)) for part in ("texts-00-of-01", "queries"))
    assert plan.path(texts).startswith("results/x/") and plan.path(queries).startswith("results/x.shown/")


# ---- rows and commands --------------------------------------------------------------------------


def test_category_comes_with_the_rows(tmp_path):
    rows = [{"query": "q1", "pos": ["a"], "category": "odd"}, {"query": "q2", "pos": ["b"]},
            {"query": "q3", "pos": ["c"], "category": 7}]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = {name: tmp_path / f"{name}.parquet" for name in ("texts", "queries", "pairs", "rejected")}
    ingest(IngestConfig(train=str(tmp_path / "t.jsonl")), out, 0)
    assert tables.read(out["queries"], "queries")["category"].to_pylist() == ["odd", None, None]
    table = pq.read_table(out["queries"]).drop_columns("category")
    pq.write_table(table, tmp_path / "older.parquet")
    assert tables.read(tmp_path / "older.parquet", "queries")["category"].to_pylist() == [None] * 3
    assert pa.types.is_large_string(tables.read(tmp_path / "older.parquet", "queries")["category"].type)


def test_commands_take_examples(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    queries = [f"is {word}?" for word in WORDS[:5]]
    Path("q.jsonl").write_text("".join(json.dumps({"query": query}) + "\n" for query in queries))
    Path("examples.json").write_text(json.dumps(EXAMPLES))
    asked = ["embed", "--input_file", "q.jsonl", "--embedder_name_or_path", str(base), "--vector_dtype", "float32"]
    asked += ["--embedder_model_class", "decoder-only-icl", "--query_instruction_for_retrieval", "Find"]
    expected = load(base, query_instruction="Find", examples=EXAMPLES).encode_queries(queries)
    for number, examples in enumerate((json.dumps(EXAMPLES), "examples.json")):
        assert main([*asked, "--output_file", f"{number}.npy", "--examples_for_task", examples]) == 0
        np.testing.assert_allclose(np.load(f"{number}.npy"), expected, atol=1e-5)
    capsys.readouterr()
    assert main([*asked, "--output_file", "v.npy", "--examples_for_task", "nothing.json"]) == 1
    assert "--examples_for_task: expected a JSON list, or a file with one" in capsys.readouterr().err
    rows = [
        {"query": query, "pos": [text], "neg": TEXTS[:2]} for query, text in zip(queries, some_texts(5, 9), strict=True)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model_name_or_path", str(base), "--train_data", "rows.jsonl", "--output_dir", "out", "--family", "icl"]
    given += ["--example_query_max_len", "16", "--example_passage_max_len", "16", "--retrieval_use_examples", "True"]
    given += [
        "--icl_suffix_str",
        "\\nResponse:",
        "--train_group_size",
        "2",
        "--max_steps",
        "1",
        "--query_max_len",
        "300",
    ]
    assert main(["train", *given]) == 0
    assert Embedder.load("out").read(["co"], "query") == ["co\nResponse:"]
