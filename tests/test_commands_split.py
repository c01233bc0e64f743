"""retune split: every row goes out once, byte for byte, into the file of its length."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import some_texts, tiny_tokenizer
from transformers import AutoTokenizer

from retune.cli import main

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "flagembedding" / "retrieval"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    return folder


def split(model: Path, source: Path, out: Path, *flags: object) -> int:
    words = ["--input_path", source, "--output_dir", out, "--model_name_or_path", model, "--num_proc", 1, *flags]
    return main(["split", *map(str, words)])


def some_lines(n: int = 40, seed: int = 0) -> list[str]:
    """Rows as different as they may be: columns, white space, escapes; one is there twice."""
    texts, rng = some_texts(3 * n, seed, 50), random.Random(seed)
    lines = []
    for i in range(n):
        row = {"id": i, "query": f"{texts[i]} {i}", "pos": [texts[n + i]], "x": {"é": [1.5, None]}}
        if i % 3:
            row["neg"] = [texts[2 * n + i]]
        lines.append(json.dumps(row, ensure_ascii=bool(i % 2), separators=rng.choice([(", ", ": "), (" ,", " : ")])))
    return [*lines, lines[0]]


def write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def outputs(folder: Path) -> dict[str, list[str]]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_text().splitlines() for path in found}


def length(tokenizer, line: str) -> int:
    row = json.loads(line)
    return max(len(tokenizer(text)["input_ids"]) for text in [row["query"], *row["pos"], *(row.get("neg") or [])])


def test_files_hold_the_rows_of_their_length(tmp_path: Path, model: Path) -> None:
    lines = some_lines()
    assert (
        split(model, write(tmp_path / "train.jsonl", lines), tmp_path / "out", "--length_list", 0, 20, 30, 45, 999) == 0
    )
    found, tokenizer = outputs(tmp_path / "out"), AutoTokenizer.from_pretrained(model)
    wanted: dict[str, list[str]] = {}
    for line in lines:
        low = max(bound for bound in (0, 20, 30, 45) if bound <= length(tokenizer, line))
        high = {0: 20, 20: 30, 30: 45, 45: 999}[low]
        wanted.setdefault(f"train_len-{low}-{high}.jsonl", []).append(line)
    assert found == wanted  # in their order; no file for 999 and more
    assert len(wanted) > 1 and sum(map(len, found.values())) == len(lines)


def test_the_log_counts(tmp_path: Path, model: Path) -> None:
    lines = some_lines()
    source = write(tmp_path / "train.jsonl", lines)
    for _ in range(2):
        assert split(model, source, tmp_path / "out", "--length_list", 0, 30, "--overwrite") == 0
    first, second = map(json.loads, (tmp_path / "out/.split_log").read_text().splitlines())
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [length(tokenizer, line) for line in lines]
    short = sum(n < 30 for n in lengths)
    assert list(first) == ["file_name", "size", "avg_length", "file_path", "start_time", "end_time", "split_info"]
    assert (first["file_name"], first["size"], first["file_path"]) == ("train.jsonl", 41, str(source))
    assert first["avg_length"] == pytest.approx(sum(lengths) / 41)
    assert first["split_info"] == {"len-0-30": short, "len-30-inf": 41 - short} == second["split_info"]


def test_a_folder_file_by_file(tmp_path: Path, model: Path) -> None:
    files = {
        name: some_lines(9, seed) for seed, name in enumerate(("a.jsonl", "b.jsonl", "sub-no_in_batch_neg/a.jsonl"))
    }
    for name, lines in files.items():
        write(tmp_path / "in" / name, lines)
    (tmp_path / "in/c.jsonl.gz").write_bytes(gzip.compress("\n".join(files["a.jsonl"]).encode()))
    assert split(model, tmp_path / "in", tmp_path / "out", "--log_name", "log") == 0
    found = outputs(tmp_path / "out")
    log = [json.loads(line) for line in found.pop("log")]
    assert found == {
        "a_len-0-500.jsonl": files["a.jsonl"], "b_len-0-500.jsonl": files["b.jsonl"],
        "c_len-0-500.jsonl": files["a.jsonl"],
        "sub-no_in_batch_neg/a_len-0-500.jsonl": files["sub-no_in_batch_neg/a.jsonl"],
    }  # fmt: skip
    assert [row["file_name"] for row in log] == ["a.jsonl", "b.jsonl", "c.jsonl.gz", "a.jsonl"]


def test_outputs_may_lie_in_the_input_folder(tmp_path: Path, model: Path) -> None:
    lines = some_lines(5)
    write(tmp_path / "a.jsonl", lines)
    for _ in range(2):
        assert split(model, tmp_path, tmp_path, "--overwrite") == 0
        assert outputs(tmp_path) == {"a.jsonl": lines, "a_len-0-500.jsonl": lines}


def test_an_earlier_split_is_refused_or_replaced(tmp_path: Path, model: Path, capsys) -> None:
    lines = some_lines()
    source = write(tmp_path / "a.jsonl", lines)
    assert split(model, source, tmp_path / "out", "--length_list", 0, 20, 40) == 0
    first = outputs(tmp_path / "out")
    for flags in ([], ["--overwrite", "False"]):
        assert split(model, source, tmp_path / "out", "--length_list", 0, 30, *flags) == 1
        said = capsys.readouterr().err
        assert "a_len-0-20.jsonl and 2 more: there already; `--overwrite` replaces" in said
        assert outputs(tmp_path / "out") == first
    assert split(model, source, tmp_path / "out", "--length_list", 0, 30, "--overwrite", "True") == 0
    found = outputs(tmp_path / "out")
    assert set(found) == {"a_len-0-30.jsonl", "a_len-30-inf.jsonl"}  # none is left of the other bins
    assert sorted(line for lines in found.values() for line in lines) == sorted(lines)
    assert split(model, write(tmp_path / "b.jsonl", lines), tmp_path / "out") == 0  # another name is not in the way


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    bounds=st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 99),
)
def test_no_row_is_lost_or_doubled(tmp_path_factory, model: Path, counts, bounds, seed) -> None:
    folder = tmp_path_factory.mktemp("split")
    files = {f"{name}.jsonl": some_lines(count, seed + name) for name, count in enumerate(counts)}
    for name, lines in files.items():
        write(folder / "in" / name, lines)
    assert split(model, folder / "in", folder / "out", "--length_list", *bounds) == 0
    found = outputs(folder / "out")
    for name, lines in files.items():
        own = [
            line
            for path, held in found.items()
            if path.startswith(name.removesuffix("jsonl")[:-1] + "_")
            for line in held
        ]
        assert sorted(own) == sorted(lines)
    assert sum(map(len, found.values())) == sum(map(len, files.values()))


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent")
def test_the_incumbents_examples(tmp_path: Path, model: Path) -> None:
    assert split(model, DATA, tmp_path / "out", "--length_list", 0, 100, 200, 300) == 0
    found = outputs(tmp_path / "out")
    for path in DATA.glob("*.jsonl"):
        own = [line for name, lines in found.items() if name.startswith(f"{path.stem}_len-") for line in lines]
        assert sorted(own) == sorted(path.read_text().splitlines())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--length_list", 0, "x"], "--length_list: invalid int value: 'x'"),
        (["--length_list", 5, 5], "--length_list: expected rising numbers"),
        (["--num_proc", 0], "--num_proc: expected a whole number from 1 on"),
        (["--input_path", "no"], "--input_path: no: no such file"),
        (["--model_name_or_path", "./no"], "model ./no: no such folder"),
        (["--lenght_list", 0], "unknown flag --lenght_list; did you mean --length_list?"),
    ],
)
def test_mistakes(tmp_path: Path, model: Path, capsys, flags: list, message: str) -> None:
    assert split(model, write(tmp_path / "a.jsonl", some_lines(3)), tmp_path / "out", *flags) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert outputs(tmp_path / "out") == {} if (tmp_path / "out").exists() else True


def test_bad_rows(tmp_path: Path, model: Path, capsys) -> None:
    lines = some_lines(4)
    source = write(tmp_path / "a.jsonl", [*lines, '{"query": "a"}'])
    assert split(model, source, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert f"{source}:6: pos: expected a list of strings, the column is missing" in said
    assert f"lists them in {tmp_path / 'out' / 'split.rejected'}" in said and "Traceback" not in said
    assert outputs(tmp_path / "out") == {}
    assert split(model, source, tmp_path / "out", "--on_bad_row", "skip") == 0
    found = outputs(tmp_path / "out")
    assert found["a_len-0-500.jsonl"] == lines and json.loads(found["split.rejected"][0])["source"] == f"{source}:6"


def test_two_files_of_one_name_are_refused(tmp_path: Path, model: Path, capsys) -> None:
    write(tmp_path / "in/a.jsonl", some_lines(2))
    write(tmp_path / "in/a.json", some_lines(2))
    assert split(model, tmp_path / "in", tmp_path / "out") == 1
    assert "would be split into the same files" in capsys.readouterr().err
