"""The vector cache on hand-made tables: finds what was added, whole entries or none, no more than is needed."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_bert

from retune import tables
from retune.data import contents, vectors
from retune.data.contents import folder_hash
from retune.data.vectors import Cache, Found, digests
from retune.runtime import UserError

DIM = 3
ABOUT = {"checkpoint": "abc", "max_length": 64}


def vector(text: str) -> list[float]:
    """Another vector for every text."""
    return [float(len(text)), float(sum(map(ord, text)) % 1000), float(zlib.crc32(text.encode()) % 1000)]


def write(path: Path, texts: list[str], group: int = 4) -> Path:
    """An embeddings table of the texts, in row groups of `group` rows."""
    with tables.writer(path, tables.embeddings_schema(DIM, "float32")) as writer:
        for start in range(0, len(texts), group):
            part = np.array([vector(text) for text in texts[start : start + group]], np.float32)
            ids = np.arange(start, start + len(part))
            writer.write({"id": ids, "vector": tables.vector_array(part)})
    return path


def add(cache: Cache, path: Path, texts: list[str]) -> Path:
    cache.add(write(path, texts), digests(texts), cache.find(digests(texts)))
    return path


def entries(cache: Cache) -> list[Path]:
    return sorted(cache.folder.iterdir()) if cache.folder.exists() else []


def found(cache: Cache, texts: list[str], step: int = 5) -> dict[str, list[float]]:
    """{text: its vector} of those in the cache, asked for in blocks of `step` rows."""
    result = cache.find(digests(texts))
    parts = [result.take(start, min(start + step, len(texts))) for start in range(0, len(texts), step)]
    rows = [row.tolist() for part in parts for row in part]
    return dict(zip([text for text, here in zip(texts, result.mask, strict=True) if here], rows, strict=True))


def words(first: int, last: int) -> list[str]:
    return [f"text {number}" for number in range(first, last)]


@given(
    tables_=st.lists(st.lists(st.integers(0, 40), max_size=15), max_size=5),
    asked=st.lists(st.integers(0, 50), max_size=40),
    step=st.integers(1, 9),
    window=st.sampled_from([1, 100, 1 << 20]),
)
@settings(max_examples=60, deadline=None)
def test_finds_what_is_in_any_entry_and_nothing_else(tables_, asked, step, window) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "WINDOW", window)
        cache, known = Cache(Path(folder) / "cache", ABOUT), set()
        for number, rows in enumerate(tables_):
            add(cache, Path(folder) / f"{number}.parquet", [f"text {row}" for row in rows])
            known |= {f"text {row}" for row in rows}
        texts = [f"text {row}" for row in asked]
        assert found(cache, texts, step) == {text: vector(text) for text in texts if text in known}


def test_rows_are_found_one_by_one_in_any_order(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", ABOUT)
    add(cache, tmp_path / "v", words(0, 30))
    texts = [*words(0, 30)[::-1], "another", "text 3", "text 3"]
    result = cache.find(digests(texts))
    assert result.mask.tolist() == [True] * 30 + [False, True, True]
    for row in (32, 0, 31, 29, 30, 5):  # not as they lie: each is read again
        expected = [vector(texts[row])] if result.mask[row] else []
        assert result.take(row, row + 1).tolist() == expected


def test_texts_whose_digests_begin_alike_are_told_apart(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", ABOUT)
    rows = digests(words(0, 4)).copy()
    cache.add(write(tmp_path / "v", words(0, 4)), rows, Found.nothing(4))
    other = rows.copy()
    other[2, 1] += 1
    assert cache.find(other).mask.tolist() == [True, True, False, True]
    assert cache.find(np.concatenate([other[2:3], rows[2:3]])).mask.tolist() == [False, True]


def test_an_entry_takes_no_space_and_outlives_the_result(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", ABOUT)
    path = add(cache, tmp_path / "v", words(0, 9))
    (entry,) = entries(cache)
    assert (entry / "vectors.parquet").samefile(path)
    write(path, ["something else"])  # by a rename, as all results
    assert found(cache, words(0, 9)) == {text: vector(text) for text in words(0, 9)}
    path.unlink()
    assert len(found(cache, words(0, 9))) == 9


def test_another_key_is_another_cache(tmp_path: Path) -> None:
    add(Cache(tmp_path / "cache", ABOUT), tmp_path / "v", words(0, 3))
    for about in (ABOUT | {"max_length": 32}, ABOUT | {"checkpoint": "abd"}):
        assert not found(Cache(tmp_path / "cache", about), words(0, 3))
    assert found(Cache(tmp_path / "cache", dict(reversed(ABOUT.items()))), words(0, 3))


def test_what_newer_entries_hold_together_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", ABOUT)
    add(cache, tmp_path / "0", words(0, 10))
    add(cache, tmp_path / "1", words(10, 20))
    (first, second) = entries(cache)
    add(cache, tmp_path / "0", words(0, 14))  # the corpus grew, so shards end elsewhere
    assert entries(cache)[0] == second and len(entries(cache)) == 2
    add(cache, tmp_path / "1", words(14, 28))
    assert first not in entries(cache) and second not in entries(cache) and len(entries(cache)) == 2
    assert found(cache, words(0, 40)) == {text: vector(text) for text in words(0, 28)}
    add(cache, tmp_path / "2", words(3, 8))  # a smaller one makes none superfluous
    assert len(entries(cache)) == 3


def test_the_same_twice_is_kept_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", ABOUT)
    for _ in range(3):
        add(cache, tmp_path / "v", words(0, 5))
        assert len(entries(cache)) == 1


@pytest.mark.parametrize("file", ["vectors.parquet", "digests"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_a_broken_entry_is_removed_and_said(tmp_path: Path, caplog, file: str, damage: str) -> None:
    cache = Cache(tmp_path / "cache", ABOUT)
    path = add(cache, tmp_path / "v", words(0, 9))
    add(cache, tmp_path / "w", words(20, 25))
    broken = entries(cache)[0] / file
    content = broken.read_bytes()
    broken.unlink()
    if damage != "gone":
        broken.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with caplog.at_level("WARNING", "retune"):
        assert sorted(found(cache, words(0, 25))) == sorted(words(20, 25))
    assert "is not whole and is removed" in caplog.text and str(broken.parent) in caplog.text
    assert len(entries(cache)) == 1 and path.exists()


def test_an_entry_that_cannot_be_opened_now_stays(tmp_path: Path, caplog, monkeypatch) -> None:
    cache = Cache(tmp_path / "cache", ABOUT)
    add(cache, tmp_path / "v", words(0, 9))

    def refuse(path: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(vectors.pq, "ParquetFile", refuse)
    assert not found(cache, words(0, 9)) and "cannot be read" in caplog.text
    monkeypatch.undo()
    assert len(found(cache, words(0, 9))) == 9


def test_a_killed_job_leaves_no_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", ABOUT)
    code = (
        "import os; from pathlib import Path; from test_vectors import ABOUT, Cache, add, words\n"
        "Path.rename = lambda *_: os._exit(9)  # the last step\n"
        f"add(Cache(Path({str(cache.root)!r}), ABOUT), Path({str(tmp_path / 'v')!r}), words(0, 5))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})
    assert done.returncode == 9
    (left,) = entries(cache)
    assert left.name.startswith(".") and not cache.find(digests(words(0, 5))).mask.any()
    old = time.time() - 2 * vectors.UNUSED
    os.utime(left, (old, old))
    add(cache, tmp_path / "v", words(0, 5))
    assert left not in entries(cache) and len(found(cache, words(0, 5))) == 5


def test_where_files_cannot_be_linked_they_are_copied(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    cache = Cache(tmp_path / "cache", ABOUT)
    path = add(cache, tmp_path / "v", words(0, 9))
    (entry,) = entries(cache)
    assert not (entry / "vectors.parquet").samefile(path) and len(found(cache, words(0, 9))) == 9
    add(cache, tmp_path / "w", words(2, 7))  # all of it is there: no copy
    assert entries(cache) == [entry]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, caplog) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    cache = Cache(tmp_path / "cache", ABOUT)
    with caplog.at_level("WARNING", "retune"):
        path = add(cache, tmp_path / "v", words(0, 3))
    assert path.exists() and "is not kept" in caplog.text


def test_what_nobody_uses_goes_after_a_while(tmp_path: Path) -> None:
    used, unused, read = (Cache(tmp_path / "cache", ABOUT | {"checkpoint": name}) for name in "abc")
    results = [add(cache, tmp_path / cache.folder.name, words(0, 3)) for cache in (used, unused, read)]
    old = time.time() - vectors.UNUSED - 60
    for cache in (used, unused, read):
        os.utime(entries(cache)[0], (old, old))
    results[1].unlink()
    results[2].unlink()
    found(read, words(0, 3))
    add(Cache(tmp_path / "cache", ABOUT | {"checkpoint": "d"}), tmp_path / "d", words(0, 3))
    assert found(used, words(0, 3)) and found(read, words(0, 3))
    assert not unused.folder.exists()


def test_an_entry_that_goes_while_it_is_read_is_still_read(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", ABOUT)
    add(cache, tmp_path / "v", words(0, 20))
    result = cache.find(digests(words(0, 20)))
    shutil.rmtree(cache.folder)
    (tmp_path / "v").unlink()
    assert result.take(0, 20).tolist() == [vector(text) for text in words(0, 20)]


def test_damage_within_is_a_clear_error_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", ABOUT)
    path = write(tmp_path / "v", words(0, 400), group=400)
    cache.add(path, digests(words(0, 400)), Found.nothing(400))
    content = bytearray(path.read_bytes())
    content[4:4000] = bytes(3996)
    with open(path, "r+b") as file:  # in place, as nothing of ours does
        file.write(content)
    result = cache.find(digests(words(0, 400)))
    with pytest.raises(UserError, match=r"cannot be read .* run again"):
        result.take(0, 400)
    assert not cache.find(digests(words(0, 400))).mask.any()


def test_jobs_side_by_side(tmp_path: Path) -> None:
    """Some add tables that make each other superfluous while others read: every vector is right."""
    folder, wrong = tmp_path / "cache", []

    def work(worker: int) -> None:
        try:
            for turn in range(12):
                cache, texts = Cache(folder, ABOUT), words(0, 10 + 3 * (turn % 4) + worker)
                seen = found(cache, texts)
                if seen != {text: vector(text) for text in seen}:
                    wrong.append(texts)
                add(cache, tmp_path / f"{worker}", texts)
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    cache = Cache(folder, ABOUT)
    assert not [entry for entry in entries(cache) if entry.name.startswith(".")]
    assert len(found(cache, words(0, 10))) == 10


# ---- the hash of a checkpoint -------------------------------------------------------------------


def settled(folder: Path) -> None:
    """Make the files look old enough for their times to be trusted; the time of a change cannot be set."""
    for file in folder.rglob("*"):
        os.utime(file, (1e9, 1e9))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(contents, "SETTLED", -1)
    return tiny_bert(tmp_path / "model")


def test_the_hash_is_of_the_content(checkpoint: Path, tmp_path: Path) -> None:
    before = folder_hash(checkpoint, tmp_path / "memory")
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "README.md").write_text("about")
    (copy / ".cache").mkdir()
    (copy / ".cache/x.json").write_text("{}")
    settled(copy)
    assert folder_hash(copy, tmp_path / "memory") == folder_hash(copy, tmp_path / "no memory") == before
    for file in ("config.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors"):
        other = shutil.copytree(checkpoint, tmp_path / file.replace("/", "-"))
        content = bytearray((other / file).read_bytes())
        content[-2] ^= 1
        (other / file).write_bytes(content)
        assert folder_hash(other, tmp_path / "memory") != before
    (copy / "modeling_own.py").write_text("")
    assert folder_hash(copy, tmp_path / "memory") != before


def test_a_file_is_read_again_only_when_it_has_changed(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    read, digest = [], contents.hashlib.file_digest
    monkeypatch.setattr(
        contents.hashlib, "file_digest", lambda file, kind: read.append(Path(file.name).name) or digest(file, kind)
    )
    before = folder_hash(checkpoint, tmp_path / "memory")
    assert "model.safetensors" in read
    read.clear()
    assert folder_hash(checkpoint, tmp_path / "memory") == before and read == []
    weights = checkpoint / "model.safetensors"
    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    with open(weights, "r+b") as file:  # in place: the same size, and the old time on it
        file.write(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert folder_hash(checkpoint, tmp_path / "memory") != before and read == ["model.safetensors"]


def test_a_file_that_has_just_changed_is_not_trusted(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(contents, "SETTLED", 60)
    before = folder_hash(checkpoint, tmp_path / "memory")
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert folder_hash(checkpoint, tmp_path / "memory") != before


def test_a_memory_that_is_lost_or_broken_is_none(checkpoint: Path, tmp_path: Path) -> None:
    before = folder_hash(checkpoint, tmp_path / "memory")
    (memo,) = (tmp_path / "memory").iterdir()
    for content in ("", "[1]", "{"):
        memo.write_text(content)
        assert folder_hash(checkpoint, tmp_path / "memory") == before
    (tmp_path / "file").write_text("")
    assert folder_hash(checkpoint, tmp_path / "file/memory") == before
