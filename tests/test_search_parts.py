"""A search in parts, by other jobs, finds what one search of all texts finds: the same bytes."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import World, simple, worlds

from retune.config import MineConfig
from retune.data import found
from retune.experiment import ConfigError, load
from retune.plan import Node, Plan
from retune.runtime import UserError
from retune.stages.mine import mine
from retune.stages.search import search_part


def searched(world: World, parts: int, files: int, options: dict, searching: dict) -> list[Path]:
    """What each of `parts` jobs finds, of `files` files of vectors each; `searching` is what may differ from mining."""
    cuts = [len(world.texts) * i // (parts * files) for i in range(parts * files + 1)]
    shards = [world.vectors(f"t{i}", world.text_vectors[a:b], a) for i, (a, b) in enumerate(itertools.pairwise(cuts))]
    bins = {name: world.folder / f"{name}.parquet" for name in ("lengths", "bins")} if world.bins else {}
    found = [world.folder / f"found-{part}.parquet" for part in range(parts)]
    for part in range(parts):
        search_part(
            queries=world.folder / "queries.parquet", query_vectors=world.vectors("q", world.query_vectors),
            text_vectors=shards[part * files : (part + 1) * files], settings=MineConfig(**options | searching),
            out=found[part], **bins,
        )  # fmt: skip
    return found


def mined(world: World, found: list[Path], seed: int, options: dict) -> bytes:
    """The table of pairs from what was found, and that of counts."""
    files = {name: world.folder / f"{name}.parquet" for name in ("texts", "queries", "pairs")}
    if world.bins:
        files |= {name: world.folder / f"{name}.parquet" for name in ("lengths", "bins")}
    out, stats = world.folder / "from-parts.parquet", world.folder / "counts.parquet"
    vectors = [world.vectors("t-all", world.text_vectors)]
    mine(
        **files, query_vectors=world.folder / "q.parquet", text_vectors=vectors, settings=MineConfig(**options),
        seed=seed, out=out, stats=stats, found=found,
    )  # fmt: skip
    return out.read_bytes() + stats.read_bytes()


def whole(world: World, seed: int, options: dict) -> bytes:
    return world.mine(seed, **options).read_bytes() + (world.folder / "mining.parquet").read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    made=worlds(), seed=st.integers(0, 9), parts=st.integers(2, 5), files=st.integers(1, 2),
    batch=st.sampled_from([1, 3, 8192]),
)  # fmt: skip
def test_parts_give_the_bytes_of_the_whole(tmp_path_factory, made, seed, parts, files, batch):
    *contents, split, options = made
    options = options | {"retriever": "hybrid" if options["retriever"] == "bm25" else options["retriever"]}
    world = World(tmp_path_factory.mktemp("w"), *contents, split)
    found = searched(world, parts, files, options, {"search_batch_size": batch})
    assert mined(world, found, seed, options) == whole(world, seed, options)


def test_within_length_bins(tmp_path):
    base = simple(tmp_path / "a", 90, 40)
    bins = (np.arange(90) * 7 % 20, ["len-0-10", "len-10-inf"], np.arange(40) % 2)
    vectors = base.text_vectors, base.query_vectors
    world = World(tmp_path / "b", base.texts, base.queries, base.pairs, *vectors, bins=bins)
    options = {"range_for_sampling": "2-30", "negative_number": 5, "pool": "bin"}
    found = searched(world, 3, 1, options, {"search_batch_size": 7})
    assert mined(world, found, 4, options) == whole(world, 4, options)


def test_ties_and_few_texts(tmp_path):
    """Equal vectors come in the order of their ids, across parts; a part may hold fewer texts than are asked for."""
    texts, queries = [f"text {i}" for i in range(12)], ["one", "two"]
    world = World(tmp_path, texts, queries, [(0, 0, 1), (1, 3, 1)], np.ones((12, 4)), np.ones((2, 4)))
    options = {"range_for_sampling": "0-9", "negative_number": 3, "sampling": "top"}
    parts = searched(world, 4, 1, options, {})
    scores, ids = found.Parts(parts).take(np.array([0, 1]), 9)
    assert ids.tolist() == [list(range(9))] * 2 and (scores == 4).all()
    assert mined(world, parts, 0, options) == whole(world, 0, options)


def test_parts_of_another_search_are_refused(tmp_path):
    world = simple(tmp_path, 40, 6)
    options = {"range_for_sampling": "1-9", "negative_number": 2}
    found = searched(world, 2, 1, options, {})
    with pytest.raises(UserError, match=r"found-0\.parquet: found for other queries, or not 12 texts for each"):
        mined(world, found, 0, options | {"range_for_sampling": "1-12"})
    found[1].write_bytes(found[1].read_bytes()[:-9])
    with pytest.raises(UserError, match=r"found-1\.parquet: not a whole table"):
        mined(world, found, 0, options)


def test_memory_does_not_grow_with_parts_times_queries(tmp_path):
    """Between two takes a part holds a few rows of what is left: neither the last block nor its file's row groups."""
    parts, queries, k = 12, 8192, 40
    rng, blocks = np.random.default_rng(1), 3
    for part in range(parts):
        rows = ((np.arange(queries) + block * queries, rng.random((queries, k), np.float32)) for block in range(blocks))
        found.write(tmp_path / str(part), k, ((ids, scores, np.full((queries, k), part)) for ids, scores in rows))
    block = queries * k * (4 + 8)
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        reader = found.Parts([tmp_path / str(part) for part in range(parts)])
        for taken in range(blocks):
            _, names = reader.take(np.arange(queries) + taken * queries, k)
            assert set(np.unique(names)) == set(range(parts))
            held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow
            assert held < parts * block / 2, f"{held / block:.1f} blocks of one part"
    finally:
        tracemalloc.stop()


# ---- the plan -----------------------------------------------------------------------------------

CONFIG = {"name": "run", "embedder": {"model": "m"}, "ingest": {"train": "t.jsonl"}, "embed": {"shards": 6}}


def test_a_job_a_part_with_its_own_files() -> None:
    plan = Plan(load(CONFIG | {"mine": {"shards": 3, "range_for_sampling": "5-60"}}))
    parts = plan.searches("run")
    assert [plan.path(part) for part in parts] == [f"results/run/mine/found-{i:02d}-of-03.parquet" for i in range(3)]
    files = [plan.path(node) for node in plan.searched_texts(parts[1])]
    assert files == [f"results/run/embed/base/texts-{i:02d}-of-06.parquet" for i in (2, 3)]
    assert plan.settings(parts[1])["settings"]["range_for_sampling"] == "0-60"


def test_what_is_sampled_does_not_decide_what_is_searched() -> None:
    variants = {
        "other": {"mine": {"negative_number": 2, "range_for_sampling": "20-210"}},
        "all": {"mine": {"shards": 1}},
    }
    plan = Plan(load(CONFIG | {"mine": {"shards": 2}, "variants": variants}))
    part = ("00-of-02",)
    assert plan.path(Node("run.other", "search", part)) == plan.path(Node("run", "search", part))
    assert plan.path(Node("run.other", "mine")) != plan.path(Node("run", "mine"))
    assert plan.path(Node("run.all", "mine")) == plan.path(Node("run", "mine")) and plan.searches("run.all") == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shards": 4}, "mine.shards: expected a divisor of embed.shards, 6, found 4"),
        ({"shards": 3, "index_factory": "HNSW32"}, "mine.shards: only an exact search by vectors"),
        ({"shards": 3, "retriever": "bm25"}, "mine.shards: only an exact search by vectors"),
    ],
)
def test_mistakes(changed: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(CONFIG | {"mine": changed})
