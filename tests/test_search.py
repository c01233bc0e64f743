"""Search equals brute force in float64, ties by id, whatever the shards, blocks, batches and backend."""

import itertools
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retune import tables
from retune.data import search
from retune.runtime import UserError

BACKENDS = sorted(search.NEAREST)
META = {"model": "m", "revision": "None", "pooling": "mean", "normalize": "True"}


def write(path: Path, vectors: np.ndarray, first: int = 0, meta=META) -> Path:
    schema = tables.embeddings_schema(vectors.shape[1], str(vectors.dtype))
    with tables.writer(path, schema, meta) as out:
        if len(vectors):
            out.write({"id": np.arange(first, first + len(vectors)), "vector": tables.vector_array(vectors)})
    return path


def shards_of(folder: Path, vectors: np.ndarray, count: int) -> list[Path]:
    cuts = [len(vectors) * i // count for i in range(count + 1)]
    parts = itertools.pairwise(cuts)
    return [write(folder / f"{count}-{i}.parquet", vectors[a:b], a) for i, (a, b) in enumerate(parts)]


def brute_force(queries: np.ndarray, vectors: np.ndarray, k: int, only=None) -> tuple[np.ndarray, np.ndarray]:
    """Scores summed in float64, rounded to float32; sorted by score, then id; -inf and -1 where there are no more."""
    scores, ids = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
    for row, query in enumerate(queries):
        exact = [np.float32(sum(float(a) * float(b) for a, b in zip(query, text, strict=True))) for text in vectors]
        allowed = [i for i in range(len(vectors)) if only is None or only[i]]
        order = sorted(allowed, key=lambda i: (-exact[i], i))[:k]
        scores[row, : len(order)], ids[row, : len(order)] = [exact[i] for i in order], order
    return scores, ids


def equal(found, expected) -> None:
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.int64)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Vectors of length 1 as models make them: (queries, texts float16, folder)."""
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((300, 24))
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float16)
    queries = rng.standard_normal((17, 24)).astype(np.float32)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True), texts, tmp_path_factory.mktemp("real")


@pytest.mark.parametrize("nearest", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 40, 290, 400])
def test_top_k_equals_brute_force(real, monkeypatch, nearest, count, k):
    queries, texts, folder = real
    monkeypatch.setattr(search, "BLOCK", 64)
    shards = shards_of(folder, texts, count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = search.top_k(queries, shards, k, batch=5, nearest=nearest)
    equal(found, brute_force(queries, texts, k))


@pytest.mark.parametrize("nearest", BACKENDS)
@settings(max_examples=60)
@given(data=st.data())
def test_ties_are_by_id_however_many(tmp_path_factory, nearest, data):
    """Small whole numbers and repeated vectors: far more ties than spare candidates."""
    n, k = data.draw(st.integers(0, 120)), data.draw(st.integers(1, 30))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    top = data.draw(st.integers(0, 2))
    texts = rng.integers(0, top + 1, (n, 3)).astype(np.float32)
    queries = rng.integers(-1, 2, (4, 3)).astype(np.float32)
    folder = tmp_path_factory.mktemp("ties")
    only = rng.random(n) < 0.7 if data.draw(st.booleans()) else None
    expected = brute_force(queries, texts, k, only)
    for count in (1, 3):
        equal(search.top_k(queries, shards_of(folder, texts, count), k, nearest=nearest, only=only), expected)


@pytest.mark.parametrize("nearest", BACKENDS)
def test_a_model_that_gives_all_texts_one_vector(tmp_path, nearest):
    texts = np.full((500, 8), 0.1, np.float16)
    for count in (1, 5):
        _, ids = search.top_k(np.ones((2, 8), np.float32), shards_of(tmp_path, texts, count), 10, nearest=nearest)
        assert ids.tolist() == [list(range(10))] * 2


def test_what_float32_products_put_in_the_wrong_order_is_found(tmp_path, monkeypatch):
    """Scores that float32 sums cannot tell apart: the best is found though the first pass has it last."""
    rng = np.random.default_rng(3)
    texts = np.repeat(rng.standard_normal((1, 64)), 200, 0).astype(np.float32) * 100
    texts[:, 0] += np.linspace(0, 1e-4, 200, dtype=np.float32)
    queries = np.ones((1, 64), np.float32)

    def worst_first(queries, vectors, k):
        scores = queries @ vectors.T
        order = np.argsort(scores, axis=1)[:, :k]  # as wrong as rounding could make it
        return np.full_like(np.take_along_axis(scores, order, 1), scores.max()), order

    monkeypatch.setitem(search.NEAREST, "wrong", worst_first)
    equal(search.top_k(queries, shards_of(tmp_path, texts, 2), 5, nearest="wrong"), brute_force(queries, texts, 5))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 40, 400])
def test_the_search_in_float64_is_the_same(real, monkeypatch, masked, k):
    """Tiles, blocks and the order in which BLAS sums do not matter."""
    queries, texts, folder = real
    only = np.arange(len(texts)) % 3 > 0 if masked else None
    expected = search.top_k(queries, shards_of(folder, texts, 1), k, only=only)
    equal(search._top_k_float64(queries, shards_of(folder, texts, 1), k, only), expected)
    monkeypatch.setattr(search, "BLOCK", 50)
    monkeypatch.setattr(search, "TILE", (7, 3))
    equal(search._top_k_float64(queries, shards_of(folder, texts, 5), k, only), expected)


def test_scores_that_blas_rounds_otherwise_are_summed_again(monkeypatch):
    """Sums next to the middle between two float32 numbers, where the order of summation decides."""
    rng = np.random.default_rng(5)
    queries, texts = rng.standard_normal((6, 40)), rng.standard_normal((50, 40))
    plain = search._inner(queries, np.repeat(np.arange(6), 50), texts, np.tile(np.arange(50), 6)).reshape(6, 50)
    calls = []
    inner = search._inner
    monkeypatch.setattr(search, "_inner", lambda *args: calls.append(len(args[1])) or inner(*args))
    least = np.full(6, -np.inf, np.float32)
    np.testing.assert_array_equal(search._exact(queries, texts, least), plain)
    monkeypatch.setattr(search, "ROUNDING64", 2.0**-30)  # then most sums are in doubt
    np.testing.assert_array_equal(search._exact(queries, texts, least), plain)
    assert calls[0] < 10 < 250 < calls[1] <= 300
    search._exact(queries, texts, plain.max(1) + 1)
    assert calls[2] == 0  # none of those can be among the best


def test_ordinary_vectors_need_no_second_search(real, monkeypatch):
    queries, texts, folder = real
    monkeypatch.setattr(search, "_top_k_float64", lambda *_: pytest.fail("searched again"))
    search.top_k(queries, shards_of(folder, texts, 2), 20)


def test_only_some_texts(real):
    queries, texts, folder = real
    only = np.zeros(len(texts), bool)
    only[[3, 77, 150, 299]] = True
    scores, ids = search.top_k(queries, shards_of(folder, texts, 5), 6, only=only)
    equal((scores, ids), brute_force(queries, texts, 6, only))
    assert (ids[:, 4:] == -1).all() and np.isneginf(scores[:, 4:]).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 4)])
def test_nothing_to_search(tmp_path, shape):
    empty = write(tmp_path / "empty.parquet", np.empty((0, 4), np.float16))
    scores, ids = search.top_k(np.ones(shape, np.float32), [empty], 3)
    assert scores.shape == ids.shape == (shape[0], 3)
    assert (ids == -1).all() and np.isneginf(scores).all()
    assert search.count([empty, empty]) == 0 and search.load(empty).size == 0


# ---- pairs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_pair_scores_are_each_by_itself(real, monkeypatch, count):
    queries, texts, folder = real
    monkeypatch.setattr(search, "BLOCK", 64)
    shards = shards_of(folder, texts, count)
    rng = np.random.default_rng(1)
    rows, ids = rng.integers(0, len(queries), 2000), rng.integers(-1, len(texts), 2000)
    found = search.pair_scores(queries, shards, rows, ids)
    exact = np.einsum("nd,nd->n", queries[rows].astype(np.longdouble), texts[ids].astype(np.longdouble))
    expected = np.where(ids < 0, -np.inf, exact).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(search.pair_scores(queries, shards, rows[7:8], ids[7:8]), found[7:8])
    assert search.pair_scores(queries, shards, rows[:0], ids[:0]).shape == (0,)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_pair_scores_do_not_depend_on_threads(real, monkeypatch, threads):
    queries, texts, folder = real
    monkeypatch.setattr(search, "_threads", lambda: threads)
    rng = np.random.default_rng(2)
    rows, ids = rng.integers(0, len(queries), 999), rng.integers(-1, len(texts), 999)
    exact = np.einsum("nd,nd->n", queries[rows].astype(np.longdouble), texts[ids].astype(np.longdouble))
    expected = np.where(ids < 0, -np.inf, exact).astype(np.float32)
    np.testing.assert_array_equal(search.pair_scores(queries, shards_of(folder, texts, 2), rows, ids), expected)


# ---- tables -------------------------------------------------------------------------------------


def test_load_and_count(real):
    _, texts, folder = real
    shards = shards_of(folder, texts, 5)
    np.testing.assert_array_equal(np.concatenate([search.load(shard) for shard in shards]), texts.astype(np.float32))
    assert search.count(shards) == len(texts)


@pytest.mark.parametrize("key", ["model", "revision", "pooling", "normalize"])
def test_vectors_of_two_models_do_not_mix(tmp_path, key):
    vectors = np.ones((2, 4), np.float16)
    one, two = (
        write(tmp_path / "one.parquet", vectors),
        write(tmp_path / "two.parquet", vectors, meta=META | {key: "x"}),
    )
    search.same_model(one, [one, one])
    with pytest.raises(UserError, match=rf"two\.parquet: embedded by {key} x, but .*one\.parquet by {META[key]}"):
        search.same_model(one, [one, two])


@pytest.mark.parametrize("rows", [1, 64, 299, 300, 1000, None])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_blocks_run_across_shards(real, rows, count):
    _, texts, folder = real
    found = [(ids.copy(), vectors.copy()) for ids, vectors in search.blocks(shards_of(folder, texts, count), rows)]
    size = rows or len(texts)
    assert [len(ids) for ids, _ in found] == [min(size, 300 - start) for start in range(0, 300, size)]
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in found]), np.arange(300))
    np.testing.assert_array_equal(np.concatenate([vectors for _, vectors in found]), texts.astype(np.float32))
    assert all(vectors.dtype == np.float32 for _, vectors in found)


def test_a_block_stays_until_the_next_is_asked_for(real):
    _, texts, folder = real
    reader = search.blocks(shards_of(folder, texts, 2), 100)
    for start, (_, vectors) in zip(range(0, 300, 100), reader, strict=True):
        time.sleep(0.05)  # the thread that reads ahead has long read the next
        np.testing.assert_array_equal(vectors, texts[start : start + 100].astype(np.float32))


def test_blocks_are_bounded_by_bytes(real, monkeypatch):
    _, texts, folder = real
    monkeypatch.setattr(search, "BLOCK_BYTES", 24 * 4 * 128)
    assert [len(ids) for ids, _ in search.blocks(shards_of(folder, texts, 2))] == [128, 128, 44]


def test_shards_of_either_dtype(real):
    queries, texts, folder = real
    shards = [
        write(folder / "half.parquet", texts[:100]),
        write(folder / "single.parquet", texts[100:].astype(np.float32), 100),
    ]
    equal(search.top_k(queries, shards, 9), brute_force(queries, texts, 9))


def test_a_huge_row_group_is_read_piece_by_piece(tmp_path):
    """A file of one row group of 50 MB, as another writer may make it, takes a fraction of that to read."""
    code = """
import sys
import pyarrow as pa
from retune.data import search
assert sum(len(ids) for ids, _ in search.blocks(sys.argv[1:], 4096)) == 200_000
print(pa.default_memory_pool().max_memory())
"""
    vectors, path = np.zeros((200_000, 128), np.float16), tmp_path / "huge.parquet"
    table = pa.table(
        {"id": np.arange(len(vectors)), "vector": tables.vector_array(vectors)},
        schema=tables.embeddings_schema(128, "float16"),
    )
    pq.write_table(table, path, row_group_size=len(vectors), use_dictionary=False, compression="none")
    assert pq.ParquetFile(path).metadata.num_row_groups == 1
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30e6
