"""retune mine: rows come out as they came, with negatives that an independent search confirms."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tiny import WORDS, some_texts, tiny_bert, tiny_reranker

from retune import tables
from retune.cli import main
from retune.model.embedder import Embedder
from retune.runtime import UserError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
EXAMPLES = sorted((DATA / "flagembedding").rglob("*.jsonl")) + sorted((DATA / "intel").glob("*example.jsonl"))
needs_data = pytest.mark.skipif(not EXAMPLES, reason=f"{DATA} is absent")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_bert(tmp_path_factory.mktemp("model") / "tiny"))


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def some_rows(n: int = 8, seed: int = 0) -> list[dict]:
    """`n` rows with a positive and a negative, all texts different."""
    texts = list(dict.fromkeys(some_texts(5 * n, seed, 12)))[: 3 * n]
    assert len(texts) == 3 * n
    return [{"query": texts[i], "pos": [texts[n + i]], "neg": [texts[2 * n + i]]} for i in range(n)]


class Folder:
    """A folder with rows in a.jsonl, and `retune mine` from there to b.jsonl."""

    def __init__(self, folder: Path, model: str, rows: list | None = None) -> None:
        self.path, self.model = folder, model
        self.input, self.output = folder / "a.jsonl", folder / "b.jsonl"
        write(self.input, some_rows() if rows is None else rows)

    def run(self, *flags: object, model: bool = True) -> int:
        words = ["--input_file", self.input, "--output_file", self.output, *flags]
        return main(["mine", *map(str, words), *(["--model_name_or_path", self.model] if model else [])])

    def said(self, *flags: object, code: int = 0) -> str:
        """What a run, which ends with `code`, writes to standard error."""
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert self.run(*flags) == code
        assert "Traceback" not in said.getvalue()
        return said.getvalue()

    def mined(self, *flags: object, **options) -> list[dict]:
        assert self.run("--range_for_sampling", "0-20", "--negative_number", 3, *flags, **options) == 0
        return read(self.output)


@pytest.fixture
def folder(tmp_path: Path, model: str) -> Folder:
    return Folder(tmp_path, model)


def nearest(model: str, query: str, pool: list[str]) -> list[str]:
    """The pool by similarity, computed apart from the command."""
    embedder = Embedder.load(model)
    scores = embedder.encode_passages(pool).astype(np.float64) @ embedder.encode_queries([query])[0].astype(np.float64)
    return [pool[i] for i in np.argsort(-scores, kind="stable")]


# ---- what is mined ------------------------------------------------------------------------------


def test_negatives_are_the_nearest_others(folder: Folder) -> None:
    rows = some_rows()
    found = folder.mined("--sampling", "top", "--vector_dtype", "float32", "--dtype", "float32")
    pool = [text for row in rows for text in row["pos"] + row["neg"]]
    for row, new in zip(rows, found, strict=True):
        ranked = [text for text in nearest(folder.model, row["query"], pool) if text not in row["pos"]]
        assert new["neg"] == ranked[:3]


def test_a_rank_window_holds_all_negatives(folder: Folder) -> None:
    rows = some_rows()
    assert folder.run("--range_for_sampling", "2-9", "--negative_number", 4, "--vector_dtype", "float32") == 0
    pool = [text for row in rows for text in row["pos"] + row["neg"]]
    for row, new in zip(rows, read(folder.output), strict=True):
        window = set(nearest(folder.model, row["query"], pool)[2:9])
        assert set(new["neg"]) <= window - set(row["pos"]) and len(set(new["neg"])) == 4


def test_a_pool_is_all_that_is_searched(folder: Folder) -> None:
    pool = some_texts(30, seed=5)
    rows = some_rows()
    # a positive and a negative of the input that the pool holds too, and a passage with a title
    shared = [rows[0]["pos"][0], rows[1]["neg"][0]]
    write(folder.path / "pool.jsonl", [{"text": text} for text in pool + shared] + [{"title": "ba", "text": "co"}])
    flags = "--candidate_pool", folder.path / "pool.jsonl", "--negative_number", 40, "--range_for_sampling", "0-99"
    found = folder.mined(*flags)
    whole = {*pool, *shared, "ba co"}
    for row, new in zip(rows, found, strict=True):
        assert set(new["neg"]) == whole - set(row["pos"]) - {row["query"]}


def test_ranks_count_within_the_pool(folder: Folder) -> None:
    pool = list(dict.fromkeys(some_texts(30, seed=5)))
    write(folder.path / "pool.jsonl", [{"text": text} for text in pool])
    flags = "--candidate_pool", folder.path / "pool.jsonl", "--sampling", "top", "--range_for_sampling", "4-9"
    found = folder.mined(*flags, "--vector_dtype", "float32")
    for row, new in zip(some_rows(), found, strict=True):
        assert new["neg"] == nearest(folder.model, row["query"], pool)[4:7]


def test_queries_that_read_the_same_share_their_positives(tmp_path: Path, model: str) -> None:
    rows = some_rows(6)
    rows[1]["query"] = rows[0]["query"].upper()
    found = Folder(tmp_path, model, rows).mined("--negative_number", 99)
    for row in found[:2]:
        assert not set(row["neg"]) & {rows[0]["pos"][0], rows[1]["pos"][0]}
    assert {rows[0]["pos"][0], rows[1]["pos"][0]} <= set(found[2]["neg"])


def test_rows_that_are_alike_each_come_out(tmp_path: Path, model: str) -> None:
    rows = some_rows(4)
    folder = Folder(tmp_path, model, [*rows, rows[0], rows[0] | {"id": 7}])
    found = folder.mined()
    assert [row["query"] for row in found] == [row["query"] for row in [*rows, rows[0], rows[0]]]
    assert all(len(set(row["neg"])) == 3 and not set(row["neg"]) & set(row["pos"]) for row in found)
    assert found[5]["id"] == 7


def test_negatives_that_came_are_kept_on_demand(folder: Folder) -> None:
    for row, new in zip(some_rows(), folder.mined("--keep_existing_neg"), strict=True):
        assert new["neg"][:1] == row["neg"] and len(set(new["neg"])) == 4


def test_rows_that_come_short_are_dropped_on_demand(tmp_path: Path, model: str) -> None:
    rows = some_rows(6)
    rows[2]["pos"] = [text for row in rows for text in row["pos"]]  # only the negatives are left to it
    folder = Folder(tmp_path, model, rows)
    found = folder.mined("--negative_number", 8, "--on_shortage", "drop")
    assert [row["query"] for row in found] == [row["query"] for i, row in enumerate(rows) if i != 2]


def test_a_reranker_refuses_candidates(folder: Folder) -> None:
    reranker = tiny_reranker(folder.path / "reranker")
    flags = "--max_score_of_teacher", "-0.01", "--on_shortage", "drop", "--negative_number", 1
    free = folder.mined("--sampling", "top", "--negative_number", 1)
    judged = folder.mined("--sampling", "top", *flags, "--reranker_name_or_path", reranker)
    from retune.model.reranker import Reranker

    teacher = Reranker.load(str(reranker))
    for row in judged:
        negative, positive = teacher.score([(row["query"], row["neg"][0]), (row["query"], row["pos"][0])])
        assert negative < positive
    assert judged != free
    assert "--max_score_of_teacher: needs a reranker: --reranker_name_or_path" in folder.said(*flags, code=1)


def test_bins_are_the_pool_on_demand(tmp_path: Path, model: str) -> None:
    short, long = some_texts(12, 1, 4), [" ".join(WORDS[i : i + 20]) for i in range(12)]
    rows = [
        {"query": short[0], "pos": [short[1]], "neg": short[2:]},
        {"query": "ba", "pos": [long[0]], "neg": long[1:]},
    ]
    found = Folder(tmp_path, model, rows).mined("--pool", "bin", "--length_list", 0, 10, "--negative_number", 5)
    assert set(found[0]["neg"]) <= set(short) and set(found[1]["neg"]) <= set(long)


def test_words_find_candidates_without_a_model(folder: Folder) -> None:
    pytest.importorskip("bm25s")
    found = folder.mined("--retriever", "bm25", model=False)
    assert all(len(row["neg"]) == 3 and not set(row["neg"]) & set(row["pos"]) for row in found)


def test_instructions_of_rows(tmp_path: Path, model: str) -> None:
    rows = [row | {"prompt": "co di"} for row in some_rows()]
    work = tmp_path / "work"
    folder = Folder(tmp_path, model, rows)
    for flag, wanted in (("True", "co di"), ("False", None)):
        found = folder.mined("--work_dir", work, "--use_row_prompts", flag)
        assert {row["prompt"] for row in found} == {"co di"}
        assert set(tables.read(work / "ingest/queries.parquet", "queries")["prompt"].to_pylist()) == {wanted}


# ---- what is left as it was ---------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_incumbents_examples_keep_their_form(tmp_path: Path, model: str, path: Path) -> None:
    output = tmp_path / "b.jsonl"
    flags = ["--embedder_name_or_path", model, "--range_for_sampling", "2-200", "--negative_number", "5"]
    code = main(["mine", "--input_file", str(path), "--output_file", str(output), *flags])
    before, after = read(path), read(output)
    pool = {text for row in before for text in row["pos"] + row.get("neg", [])}
    assert code == 0 and len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        kept = [name for name in old if name not in ("pos_scores", "neg_scores")]
        assert list(new) == (kept if "neg" in old else [*kept, "neg"])
        assert {name: new[name] for name in kept if name != "neg"} == {n: old[n] for n in kept if n != "neg"}
        others = pool - {*new["pos"], new["query"]}
        assert set(new["neg"]) <= others and len(new["neg"]) == len(set(new["neg"])) == min(5, len(others))


def test_other_columns_keep_their_spelling(tmp_path: Path, model: str) -> None:
    rows = some_rows(5)
    lines = [json.dumps(row) for row in rows]
    lines[2] = (
        '{"id": 12345678901234567890123, "query":"ba \\u0063o", "w": 1.10,"pos": ["di fur"],  "neg": null, "x": '
        '{"b": [1E5, true], "neg": 0}, "pos_scores": null}'
    )
    folder = Folder(tmp_path, model, lines)
    negatives = json.dumps(folder.mined()[2]["neg"])
    assert folder.output.read_text().splitlines()[2] == (
        '{"id": 12345678901234567890123, "query": "ba \\u0063o", "w": 1.10, "pos": ["di fur"], "neg": '
        + negatives + ', "x": {"b": [1E5, true], "neg": 0}, "pos_scores": null}'
    )  # fmt: skip


def test_scores_of_other_negatives_are_left_out(tmp_path: Path, model: str) -> None:
    rows = [row | {"pos_scores": [1.0], "neg_scores": [0.5]} for row in some_rows(4)] + some_rows(3, seed=9)
    folder = Folder(tmp_path, model, rows)
    said = folder.said("--negative_number", "3")
    assert not any("pos_scores" in row or "neg_scores" in row for row in read(folder.output))
    assert said.count("4 rows go without pos_scores and neg_scores: those were of other negatives") == 1


def test_scores_stay_where_the_negatives_do(tmp_path: Path, model: str) -> None:
    rows = some_rows(3)
    rows[1] |= {"pos_scores": [1.0], "neg_scores": [0.25]}
    write(tmp_path / "pool.jsonl", [{"text": rows[1]["neg"][0]}])
    folder = Folder(tmp_path, model, rows)
    found = folder.mined("--candidate_pool", tmp_path / "pool.jsonl")
    assert found[1] == rows[1]


# ---- files --------------------------------------------------------------------------------------


def test_files_folders_and_compression(tmp_path: Path, model: str) -> None:
    rows = some_rows(9)
    write(tmp_path / "in" / "part-10.jsonl", rows[6:])
    write(tmp_path / "in" / "part-2.jsonl", rows[:3])
    (tmp_path / "in" / "part-3.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows[3:6])).encode()))
    output = tmp_path / "in" / "mined.jsonl.gz"
    command = [
        "mine",
        "--input_file",
        str(tmp_path / "in"),
        "--output_file",
        str(output),
        "--model_name_or_path",
        model,
    ]
    for _ in range(2):  # the second time the output lies in the input folder
        assert main([*command, "--range_for_sampling", "0-20", "--negative_number", "3"]) == 0
        found = [json.loads(line) for line in gzip.decompress(output.read_bytes()).splitlines()]
        assert [row["query"] for row in found] == [row["query"] for row in rows]
    assert sorted(one.name for one in (tmp_path / "in").iterdir()) == [
        "mined.jsonl.gz", "part-10.jsonl", "part-2.jsonl", "part-3.jsonl.gz",
    ]  # fmt: skip


def test_a_file_may_be_its_own_output(folder: Folder) -> None:
    folder.output = folder.input
    found = folder.mined()
    assert [row["query"] for row in found] == [row["query"] for row in some_rows()] and len(found[0]["neg"]) == 3


def test_the_same_bytes_again_and_with_shards(folder: Folder) -> None:
    folder.mined()
    first = folder.output.read_bytes()
    folder.mined("--shards", 3)
    assert folder.output.read_bytes() == first
    folder.mined("--seed", 7)
    assert folder.output.read_bytes() != first


def test_what_mining_did_is_written_on_demand(folder: Folder) -> None:
    folder.mined("--stats_file", folder.path / "stats.parquet")
    table = tables.read(folder.path / "stats.parquet", "mining").to_pylist()
    assert sum(row["value"] for row in table if row["name"] == "chosen") == 24


def test_nothing_is_left_beside_the_output(folder: Folder) -> None:
    folder.mined()
    assert sorted(path.name for path in folder.path.iterdir()) == ["a.jsonl", "b.jsonl"]


# ---- mistakes -----------------------------------------------------------------------------------


def test_bad_rows_are_named_and_the_earlier_output_stays(tmp_path: Path, model: str) -> None:
    bad = [{"query": "q", "pos": "a"}, "{", {"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1]}]
    folder = Folder(tmp_path, model, [*some_rows(2), *bad])
    folder.output.write_text("earlier\n")
    said = folder.said("--negative_number", 1, code=1)
    for line in (
        f"{folder.input}:3: pos: expected a list of strings, found a string",
        f"{folder.input}:4: row: invalid JSON",
        f"{folder.input}:5: neg_scores: expected scores, as the row has pos_scores",
        f"`--on_bad_row skip` goes on without such rows and lists them in {folder.output}.rejected",
    ):
        assert line in said
    assert folder.output.read_text() == "earlier\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_bad_rows_are_left_out_on_demand(tmp_path: Path, model: str) -> None:
    rows = some_rows(4)
    folder = Folder(tmp_path, model, [rows[0], {"query": 1}, *rows[1:], "{"])
    found = folder.mined("--on_bad_row", "skip")
    assert [row["query"] for row in found] == [row["query"] for row in rows]
    listed = read(tmp_path / "b.jsonl.rejected")
    assert [row["source"] for row in listed] == [f"{folder.input}:2", f"{folder.input}:6"]
    assert "query: expected a string" in listed[0]["reason"] and listed[1]["row"] == "{"


def test_ranks_beyond_all_texts_are_told_of(folder: Folder) -> None:
    """The rows come out with random negatives, as for any query that is short of candidates."""
    said = folder.said("--range_for_sampling", "500-600", "--negative_number", 2)
    assert "--range_for_sampling: no query has a text of ranks 500-600; 16 texts are searched" in said
    assert all(len(row["neg"]) == 2 for row in read(folder.output))
    assert "no query has a text" not in folder.said("--range_for_sampling", "5-600", "--negative_number", 2)


def test_a_folder_that_cannot_be_made_is_one_line(folder: Folder) -> None:
    said = folder.said("--work_dir", folder.input / "work", code=1)
    assert f"error: {folder.input / 'work'}: cannot be made (Not a directory); " in said


def test_too_few_candidates_are_an_error_on_demand(folder: Folder) -> None:
    said = folder.said("--on_shortage", "error", "--range_for_sampling", "0-5", code=1)
    assert "widen --range_for_sampling, or set --on_shortage to random or drop" in said
    assert not folder.output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input_file", "no.jsonl"], "--input_file: no.jsonl: no such file, folder or match"),
        (["--candidate_pool", "no.jsonl"], "--candidate_pool: no.jsonl: no such file"),
        (["--output_file", "."], "--output_file: .: expected a file, found a folder"),
        (["--output_file", "b.parquet"], "--output_file: b.parquet: rows are written as JSONL"),
        (["--output_file", "/proc/no/b.jsonl"], "--output_file: /proc: cannot be written to"),
        (["--seed", "x"], "--seed: expected a whole number from 0 on, found 'x'"),
        (["--negative_numbers", "3"], "unknown flag --negative_numbers; did you mean --negative_number?"),
        (["--model_name_or_path", "./none"], "model ./none: no such folder"),
    ],
)
def test_mistakes_are_one_line(folder: Folder, flags: list[str], message: str) -> None:
    if flags[-1].startswith("/proc") and os.access("/proc", os.W_OK):
        flags, message = ["--output_file", str(folder.input / "b")], f"{folder.input}: cannot be written to"
    words = ["--input_file", folder.input, "--output_file", folder.output, "--model_name_or_path", folder.model, *flags]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(["mine", *map(str, words)]) == 1
    errors = [line for line in said.getvalue().splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in said.getvalue()
    assert not folder.output.exists()


def test_an_input_that_changes_is_noticed(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from retune.commands import mine

    real = mine._mine

    def change(*args):
        found = real(*args)
        folder.input.write_text("")
        return found

    monkeypatch.setattr(mine, "_mine", change)
    assert "the input changed during the run" in folder.said("--negative_number", 1, code=1)


# ---- a folder that is kept ----------------------------------------------------------------------


def test_a_kept_folder_goes_on_where_it_was(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    import retune.stages.embed as stage
    from retune.commands import vectors

    folder.mined()
    wanted = folder.output.read_bytes()
    folder.output.unlink()
    real, done = stage.embed, []

    def embed(*, broken: bool = False, **options) -> None:
        if broken and options["kind"] == "query":
            raise UserError("interrupted")
        done.append((options["kind"], options["shard"]))
        real(**options)

    monkeypatch.setattr(vectors, "SHARD", 9)
    work = "--work_dir", folder.path / "work"
    monkeypatch.setattr(stage, "embed", lambda **options: embed(broken=True, **options))
    assert folder.run(*work) == 1 and done == [("passage", (0, 2)), ("passage", (1, 2))]
    monkeypatch.setattr(stage, "embed", embed)
    folder.mined(*work)
    assert folder.output.read_bytes() == wanted and done[2:] == [("query", (0, 1))]

    folder.mined(*work, "--negative_number", 2)  # mines again, embeds nothing
    assert len(done) == 3 and all(len(row["neg"]) == 2 for row in read(folder.output))
    folder.mined(*work, "--query_instruction_for_retrieval", "ba")
    assert done[3:] == [("query", (0, 1))]
    write(folder.input, some_rows(7))
    folder.mined(*work)
    assert len(done) == 7 and len(read(folder.output)) == 7


def test_a_kept_folder_notices_another_model(folder: Folder, tmp_path: Path) -> None:
    work = "--work_dir", tmp_path / "work"
    folder.model = str(tiny_bert(tmp_path / "own", seed=1))
    folder.mined(*work)
    tiny_bert(tmp_path / "own", seed=2)  # the same name, other weights
    found = folder.mined(*work)
    folder.output.unlink()
    assert folder.mined() == found


def test_a_vector_cache_spares_texts(folder: Folder) -> None:
    cache = "--vector_cache", folder.path / "cache"
    first = folder.said(*cache), folder.output.read_bytes()
    again = folder.said(*cache), folder.output.read_bytes()
    assert "0 of 16 vectors taken from the cache" in first[0] and "16 of 16 vectors taken from the cache" in again[0]
    assert again[1] == first[1]
