"""retune score: rows come out as they came, with the scores that the reranker gives each pair alone."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import some_texts, tiny_bert, tiny_decoder, tiny_reranker

import retune
from retune.cli import main
from retune.commands import score
from retune.commands.flags import parse
from retune.config import RerankerConfig
from retune.model.reranker import Reranker
from retune.stages import scores as stage

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "flagembedding"
EXAMPLES = sorted((DATA / "reranker").rglob("*.jsonl")) + sorted((DATA / "retrieval").glob("*.jsonl"))
needs_data = pytest.mark.skipif(not EXAMPLES, reason=f"{DATA} is absent")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_reranker(tmp_path_factory.mktemp("model") / "tiny"))


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def some_rows(n: int = 6, seed: int = 0) -> list[dict]:
    """`n` rows with one to three negatives, all texts different."""
    texts = list(dict.fromkeys(some_texts(8 * n, seed, 12)))[: 5 * n]
    assert len(texts) == 5 * n
    return [
        {"query": texts[i], "pos": [texts[n + i]], "neg": texts[2 * n + 3 * i :][: 1 + i % 3]} for i in range(n)
    ]  # fmt: skip


class Folder:
    """A folder with rows in a.jsonl, and `retune score` from there to b.jsonl."""

    def __init__(self, folder: Path, teacher: str, rows: list | None = None) -> None:
        self.path, self.teacher = folder, teacher
        self.input, self.output = folder / "a.jsonl", folder / "b.jsonl"
        write(self.input, some_rows() if rows is None else rows)

    def words(self, *flags: object) -> list[str]:
        files = ["--input_file", self.input, "--output_file", self.output, "--reranker_name_or_path", self.teacher]
        return ["score", *map(str, [*files, *flags])]

    def said(self, *flags: object, code: int = 0) -> str:
        """What a run, which ends with `code`, writes to standard error."""
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert main(self.words(*flags)) == code, said.getvalue()
        assert "Traceback" not in said.getvalue()
        return said.getvalue()

    def scored(self, *flags: object) -> list[dict]:
        self.said(*flags)
        return read(self.output)


@pytest.fixture
def folder(tmp_path: Path, teacher: str) -> Folder:
    return Folder(tmp_path, teacher)


def check_scores(teacher: str, rows: list[dict], **settings) -> None:
    """Every score is that which the reranker gives the pair alone."""
    model = Reranker.load(RerankerConfig(model=teacher, **settings))
    for row in rows:
        for column in ("pos", "neg"):
            texts, found = row.get(column) or [], row[f"{column}_scores"]
            assert len(texts) == len(found)
            for text, score_ in zip(texts, found, strict=True):
                np.testing.assert_allclose(score_, model.score([(row["query"], text)])[0], atol=1e-5)


# ---- scores -------------------------------------------------------------------------------------


def test_scores_are_those_of_each_pair_alone(folder: Folder) -> None:
    found = folder.scored()
    assert [{n: row[n] for n in ("query", "pos", "neg")} for row in found] == some_rows()
    assert np.ptp([score for row in found for score in row["pos_scores"] + row["neg_scores"]]) > 0.1
    check_scores(folder.teacher, found)


def test_scores_read_back_as_the_numbers_that_were_computed(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, plain = [], Reranker.scores

    def watched(self, *given, **named):
        computed.append(plain(self, *given, **named))
        return computed[-1]

    monkeypatch.setattr(Reranker, "scores", watched)
    found = [number for row in folder.scored() for number in row["pos_scores"] + row["neg_scores"]]
    [computed] = computed
    assert computed.dtype == np.float32
    assert sorted(found) == sorted(computed.astype(np.float64).tolist())


def test_the_flags_reach_the_reranker(folder: Folder) -> None:
    flags = (
        "--normalize", "--reranker_max_length", 24, "--reranker_query_max_length", 6, "--query_instruction_for_rerank",
        "co di", "--query_instruction_format_for_rerank", "{}\\n{}", "--passage_instruction_for_rerank", "ba",
    )  # fmt: skip
    found = folder.scored(*flags)
    settings = {
        "normalize": True, "max_length": 24, "query_max_length": 6, "query_instruction": "co di",
        "query_instruction_format": "{}\n{}", "passage_instruction": "ba",
    }  # fmt: skip
    assert all(0 < number < 1 for row in found for number in row["pos_scores"] + row["neg_scores"])
    check_scores(folder.teacher, found, **settings)


def test_a_decoder_by_layers(tmp_path: Path) -> None:
    teacher = str(tiny_decoder(tmp_path / "model", "gemma2"))
    folder = Folder(tmp_path, teacher, some_rows(2))
    flags = "--reranker_model_class", "decoder-only-lightweight", "--cutoff_layers", 3, 4, "--compress_ratio", 2
    found = folder.scored(*flags, "--compress_layers", 1, 2, "--prompt", "Is it so?")
    settings = {"family": "decoder-only-lightweight", "cutoff_layers": [3, 4], "compress_ratio": 2}
    check_scores(teacher, found, **settings, compress_layers=[1, 2], prompt="Is it so?")


def test_each_distinct_pair_is_scored_once(tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, a, b, c = list(dict.fromkeys(some_texts(9, 3, 9)))[:4]
    rows = [
        {"query": query, "pos": [a, a], "neg": [b, c, b]}, {"query": query, "pos": [b], "neg": [a]},
        {"query": c, "pos": [a]},
    ]  # fmt: skip
    counts, plain = [], Reranker.scores

    def counted(self, tokens, *given, **named):
        counts.append(len(tokens.lengths))
        return plain(self, tokens, *given, **named)

    monkeypatch.setattr(Reranker, "scores", counted)
    folder = Folder(tmp_path, teacher, rows)
    found = folder.scored()
    assert sum(counts) == 4
    first, second, third = found
    assert first["pos_scores"] == second["neg_scores"] * 2 and first["neg_scores"][0] == first["neg_scores"][2]
    assert first["neg_scores"][0] == second["pos_scores"][0] and third["neg_scores"] == []
    monkeypatch.undo()
    check_scores(teacher, found)


def test_several_devices_give_what_one_gives(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = folder.scored()
    started, plain = [], stage.processes.working

    def working(module, jobs, *rest):
        started.extend(job["device"] for job in jobs)
        return plain(module, jobs, *rest)

    monkeypatch.setattr(stage, "GROUP", 7)
    monkeypatch.setattr(stage.processes, "working", working)
    monkeypatch.setattr(score.models, "prepare", lambda given: ["cpu", "cpu"])
    found = folder.scored("--work_dir", folder.path / "work")
    assert started == ["cpu"]
    for one, other in zip(expected, found, strict=True):
        for name in ("pos_scores", "neg_scores"):
            np.testing.assert_allclose(one[name], other[name], atol=1e-5)


# ---- rows ---------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_incumbents_examples_keep_their_form(tmp_path: Path, teacher: str, path: Path) -> None:
    folder = Folder(tmp_path, teacher)
    folder.input = path
    before, after = read(path), folder.scored("--reranker_max_length", 64)
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        added = [name for name in ("pos_scores", "neg_scores") if name not in old]
        assert list(new) == [*old, *added]
        kept = [name for name in old if not name.endswith("_scores")]
        assert {name: new[name] for name in kept} == {name: old[name] for name in kept}
        assert len(new["pos_scores"]) == len(new["pos"]) and len(new["neg_scores"]) == len(new["neg"])
        assert new["neg_scores"] != old.get("neg_scores")
    check_scores(teacher, after[:1], max_length=64)


def test_other_columns_keep_their_spelling_and_stale_scores_go(tmp_path: Path, teacher: str) -> None:
    """Scores of an earlier set of negatives: too few, and one that is no number."""
    row = (
        '{"id": 12345678901234567890123, "pos_scores": [1], "query":"ba \\u0063o", "w": 1.10,"pos": ["di fur"], '
        '"neg": null, "x": {"neg_scores": [1E5, true]}, "neg_scores": [NaN, "a"]}'
    )
    folder = Folder(tmp_path, teacher, [row])
    [found] = folder.scored()
    assert folder.output.read_text() == (
        '{"id": 12345678901234567890123, "pos_scores": ' + json.dumps(found["pos_scores"])
        + ', "query": "ba \\u0063o", "w": 1.10, "pos": ["di fur"], "neg": null, "x": {"neg_scores": [1E5, true]}, '
        + '"neg_scores": []}\n'
    )  # fmt: skip
    check_scores(teacher, [found])


def test_compressed_files_and_a_file_that_is_its_own_output(tmp_path: Path, teacher: str) -> None:
    folder = Folder(tmp_path, teacher)
    expected = folder.scored()
    folder.input = folder.output = tmp_path / "c.jsonl.gz"
    folder.input.write_bytes(gzip.compress("\n".join(map(json.dumps, some_rows())).encode()))
    folder.said()
    assert [json.loads(line) for line in gzip.decompress(folder.output.read_bytes()).splitlines()] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]


# ---- mistakes -----------------------------------------------------------------------------------


def test_bad_rows_are_named_and_the_earlier_output_stays(tmp_path: Path, teacher: str) -> None:
    folder = Folder(tmp_path, teacher, [*some_rows(2), {"query": "q", "pos": "a"}, "{"])
    folder.output.write_text("earlier\n")
    said = folder.said(code=1)
    assert f"{folder.input}:3: pos: expected a list of strings, found a string" in said
    assert f"{folder.input}:4: row: invalid JSON" in said and "`--on_bad_row skip` goes on without" in said
    assert folder.output.read_text() == "earlier\n"
    found = folder.scored("--on_bad_row", "skip")
    assert [row["query"] for row in found] == [row["query"] for row in some_rows(2)]
    assert [row["source"] for row in read(tmp_path / "b.jsonl.rejected")] == [f"{folder.input}:{n}" for n in (3, 4)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reranker_model_class", "decoder"], "--reranker_model_class: expected one of auto, encoder-only-base, "),
        (["--reranker_name_or_path", "./none"], "model ./none: no such folder"),
        (["--output_file", "b.parquet"], "--output_file: b.parquet: rows are written as JSONL"),
        (["--compress_ratio", "3"], "--compress_ratio: expected one of 1, 2, 4, 8; found '3'"),
        (["--reranker_max_lenght", "9"], "unknown flag --reranker_max_lenght; did you mean --reranker_max_length?"),
        (["--reranker_batch_size", "0"], "--reranker_batch_size: expected a whole number from 1 on, found '0'"),
    ],
)
def test_mistakes_are_one_line(folder: Folder, flags: list[str], message: str) -> None:
    said = folder.said(*flags, code=1)
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0] and not folder.output.exists()


def test_a_model_that_is_no_reranker_of_the_class(folder: Folder, tmp_path: Path) -> None:
    said = folder.said("--reranker_model_class", "decoder-only-layerwise", code=1)
    assert "--reranker_model_class: its tokenizer has no token 'Yes'" in said
    folder.teacher = str(tiny_bert(tmp_path / "encoder"))
    assert f"model {folder.teacher}" in folder.said(code=1)
    words = folder.words()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(words[: words.index("--reranker_name_or_path")]) == 1
    assert "--reranker_name_or_path: required, but not given" in said.getvalue()


@pytest.mark.parametrize(
    ("argv", "budget"),
    [
        (["--reranker_batch_size", "2"], 1024), (["--reranker_batch_size", "3000"], None), ([], None),
        (["--batch_size", "2", "--reranker_max_length", "100"], 200), (["--batch_tokens", "77"], 77),
        (["--batch_size", "2", "--max_tokens_per_batch", "99"], 99),
    ],
)  # fmt: skip
def test_a_batch_size_bounds_the_tokens(argv: list[str], budget: int | None) -> None:
    words = ["--input_file", "a", "--output_file", "b", "--reranker_name_or_path", "m", "--devices", "cpu", *argv]
    given = parse("score", score.FLAGS, "", words)
    assert score._settings(given, score.models.reranker(given)).batch_tokens == budget


# ---- interrupted --------------------------------------------------------------------------------


SLOW = """
import sys, time
from retune.cli import main
from retune.model.reranker import Reranker
from retune.stages import scores as stage
stage.GROUP, plain = 4, Reranker.scores
def slow(self, *given, **named):
    time.sleep(float(sys.argv[1]))
    return plain(self, *given, **named)
Reranker.scores = slow
sys.exit(main(sys.argv[2:]))
"""


def test_killed_and_run_again(folder: Folder) -> None:
    """Finished groups are not scored again, and the file equals that of an uninterrupted run."""

    def start(seconds: float, work: str) -> subprocess.Popen:
        words = folder.words("--work_dir", folder.path / work)
        environment = os.environ | {"PYTHONPATH": str(Path(retune.__file__).parents[1])}
        command = [sys.executable, "-c", SLOW, str(seconds), *words]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    whole = start(0, "whole")
    assert whole.wait() == 0, whole.stderr.read()
    expected = folder.output.read_bytes()
    folder.output.unlink()

    killed, finished = start(1, "work"), time.monotonic() + 120
    while len(list(folder.path.glob("work/score/state/*/*.npy"))) < 2:
        assert killed.poll() is None and time.monotonic() < finished
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not folder.output.exists()
    done = 4 * len(list(folder.path.glob("work/score/state/*/*.npy")))
    again = start(0, "work")
    _, said = again.communicate()
    assert again.returncode == 0
    assert "ingest: done before" in said and f"going on: {done} of 18 pairs were scored before" in said
    assert folder.output.read_bytes() == expected


def test_a_kept_folder_notices_what_changed(folder: Folder, tmp_path: Path) -> None:
    work = "--work_dir", tmp_path / "work"
    folder.teacher = str(tiny_reranker(tmp_path / "own", seed=1))
    first = folder.scored(*work)
    assert "scores: done before" in folder.said(*work) and read(folder.output) == first
    tiny_reranker(tmp_path / "own", seed=2)  # the same name, other weights
    second = folder.scored(*work)
    assert second != first
    check_scores(folder.teacher, second)
    assert "scores: done before" not in folder.said(*work, "--normalize")
    check_scores(folder.teacher, read(folder.output), normalize=True)
