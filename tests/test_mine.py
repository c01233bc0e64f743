"""mine: what may never be taken is never taken, what was asked for is there, and the bytes are the same each time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import some_texts
from world import World, may_take, of, reads, simple, worlds

from retune.config import MineConfig
from retune.data import negatives
from retune.runtime import UserError

# ---- properties ---------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(made=worlds(), shortage=st.sampled_from(["random", "drop", "error"]))
def test_what_holds_for_all_tables(tmp_path_factory, made, shortage):
    *contents, split, options = made
    world = World(tmp_path_factory.mktemp("w"), *contents, split)
    number, scores = options["negative_number"], world.similarity(options["retriever"])
    trained = [query for query, side in enumerate(split) if side == "train"]
    may = {query: may_take(world, query, options) for query in trained}
    short = [query for query in trained if len(may[query].window) < number]
    if shortage == "error" and short:
        with pytest.raises(UserError, match=rf"{len(short)} queries have .* first train\.jsonl:{short[0] + 1}:"):
            world.mine(on_shortage=shortage, **options)
        return
    rows = world.rows(on_shortage=shortage, **options)
    assert {row.query_id for row in rows} <= set(trained), "set-aside queries are not mined"
    for query in trained:
        window, fill = may[query].window, may[query].fill
        mined, filled = of(rows, query, "mined"), of(rows, query, "random")
        if shortage == "drop" and query in short:
            assert not [row for row in rows if row.query_id == query]
            continue
        assert set(mined) <= set(window) and len(set(mined)) == len(mined) == min(number, len(window))
        if options["sampling"] == "top":
            assert mined == window[:number]
        assert set(filled) <= set(fill) - set(mined) and len(set(filled)) == len(filled)
        assert len(filled) == (min(number - len(mined), len(set(fill) - set(mined))) if shortage == "random" else 0)
        given_rows = [
            (t, label) for q, t, label in world.pairs if q == query and (label or options["keep_existing_neg"])
        ]
        assert sorted((row.text_id, row.label) for row in rows if row.query_id == query and row.origin == "given") == (
            sorted(given_rows)
        )
    ranked = {query: world.ranked(query, options["retriever"], 2 * end(options)) for query in trained}
    for row in rows:
        assert row.similarity == scores[row.query_id][row.text_id]
        assert row.origin == "given" or row.label == 0
        assert row.rank == (ranked[row.query_id].index(row.text_id) if row.origin == "mined" else None)
        assert row.score == (9.0 if row.origin == "given" else None), "scores that came with the data are kept"
    order = [(row.query_id, -row.label, row.origin != "given") for row in rows]
    assert order == sorted(order)
    added_up(world.counts(), rows, may, short, shortage)


def end(options) -> int:
    return int(options["range_for_sampling"].split("-")[1])


def added_up(counts, rows, may, short, shortage) -> None:
    """Every candidate is counted once."""
    mined = [row for row in rows if row.origin == "mined"]
    assert counts["candidates"]["seen"] == sum(len(one.seen) for one in may.values())
    assert counts["candidates"]["chosen"] == len(mined)
    assert counts["candidates"]["seen"] == counts["candidates"]["chosen"] + sum(counts["removed"].values())
    kept = counts["removed"]["not_drawn"] + counts["removed"].get("query_dropped", 0) + len(mined)
    assert kept == sum(len(one.window) for one in may.values()), "what the filters left"
    assert counts["queries"]["mined_for"] == len(may) and counts["queries"]["short"] == len(short)
    assert counts["queries"]["dropped"] == (len(short) if shortage == "drop" else 0)
    assert counts.get("random", {}).get("filled", 0) == len([row for row in rows if row.origin == "random"])
    lowest = {}
    for row in rows:
        if row.label:
            lowest[row.query_id] = min(lowest.get(row.query_id, np.inf), row.similarity)
    compared = [row for row in mined if row.query_id in lowest]
    near = [row for row in compared if row.similarity >= np.float32(below(np.float32(lowest[row.query_id])))]
    assert counts["suspected"] == {"compared": len(compared), "similar": len(near)}


def below(positive: np.float32) -> np.float32:
    return positive - np.float32(0.05) * abs(positive)


@settings(max_examples=40, deadline=None)
@given(made=worlds(), seed=st.integers(0, 99), shards=st.sampled_from([1, 2, 5]), batch=st.sampled_from([1, 2, 1024]))
def test_the_same_bytes_whatever_the_shards_and_batches(tmp_path_factory, made, seed, shards, batch):
    world = World(tmp_path_factory.mktemp("w"), *made[:-1])
    first, counts = world.mine(seed, **made[-1]).read_bytes(), world.counts()
    assert world.mine(seed, shards, search_batch_size=batch, **made[-1]).read_bytes() == first
    assert world.counts() == counts


# ---- who is drawn -------------------------------------------------------------------------------


def test_the_seed_decides_and_nothing_else_changes(tmp_path):
    world = simple(tmp_path, 200, 30)
    options = {"range_for_sampling": "5-100", "negative_number": 6}
    one, two, other = (world.mine(seed, **options).read_bytes() for seed in (1, 1, 2))
    assert one == two != other
    assert world.mine(1, shards=3, search_batch_size=7, **options).read_bytes() == one


def test_all_of_the_window_is_drawn_from_evenly(tmp_path):
    world = simple(tmp_path, 60, 400)
    rows = world.rows(range_for_sampling="10-30", negative_number=5)
    counts = np.zeros(60)
    for query in range(400):
        ranked = world.ranked(query)
        for text in of(rows, query, "mined"):
            counts[ranked.index(text)] += 1
    assert counts[:10].sum() == counts[30:].sum() == 0
    assert counts.sum() == 400 * 5
    assert counts[10:30].min() > 60 and counts[10:30].max() < 145, "each rank is expected 100 times or a little less"


def test_top_takes_the_first_ones_allowed(tmp_path):
    world = simple(tmp_path)
    rows = world.rows(range_for_sampling="3-20", negative_number=4, sampling="top")
    for query in range(6):
        expected = [text for text in world.ranked(query)[3:20] if text != query][:4]
        assert of(rows, query, "mined") == expected


def test_margins_by_hand(tmp_path):
    """One query along the first axis: similarities are the texts' first numbers; the positives have .8 and .6."""
    values = [0.8, 0.6, 0.95, 0.58, 0.56, 0.5, 0.2, -0.3]
    world = World(
        tmp_path, [f"text {value}" for value in values], ["query"], [(0, 0, 1), (0, 1, 1)],
        [[value, 0] for value in values], [[1, 0]],
    )  # fmt: skip
    cases = {
        (): [0.95, 0.58, 0.56, 0.5, 0.2, -0.3],
        (("relative_margin", 0.05),): [0.56, 0.5, 0.2, -0.3],
        (("absolute_margin", 0.1),): [0.5, 0.2, -0.3],
        (("similarity_range", "0.2-0.57"),): [0.56, 0.5, 0.2],
        (("relative_margin", 0.05), ("absolute_margin", 0.3)): [0.2, -0.3],
    }
    for options, expected in cases.items():
        rows = world.rows(
            range_for_sampling="0-8",
            negative_number=len(expected),
            sampling="top",
            on_shortage="error",
            **dict(options),
        )
        assert [values[text] for text in of(rows, 0, "mined")] == expected, options


def test_a_relative_margin_lies_below_a_negative_similarity_too():
    lowest = np.array([0.8, -0.4, np.inf], np.float32)
    found = negatives.ceilings(negatives.limits(lowest, MineConfig(relative_margin=0.05)), 3)
    np.testing.assert_allclose(found, [0.76, -0.42, np.inf], rtol=1e-6)


# ---- shortage -----------------------------------------------------------------------------------


def test_random_fill_gives_the_number_and_not_what_is_too_similar(tmp_path):
    world = simple(tmp_path, 40, 8)
    scores = world.similarity()
    options = {"range_for_sampling": "0-12", "negative_number": 15, "absolute_margin": 0.0}
    rows = world.rows(**options)
    filled = 0
    for query in range(8):
        mined, random = of(rows, query, "mined"), of(rows, query, "random")
        filled += len(random)
        ceiling = scores[query][query]
        allowed = [text for text in range(40) if scores[query][text] <= ceiling and text != query]
        seen_too_similar = {t for t in world.ranked(query)[:12] if scores[query][t] > ceiling}
        assert not seen_too_similar & set(random)
        assert len(mined) + len(random) == min(15, 39 - len(seen_too_similar)) and len(allowed) <= 39
    assert filled > 20


def test_few_texts_are_all_taken_and_no_more(tmp_path, caplog):
    world = simple(tmp_path, 5, 2)
    rows = world.rows(range_for_sampling="0-2", negative_number=9)
    assert [sorted(of(rows, query, "mined", "random")) for query in range(2)] == [[1, 2, 3, 4], [0, 2, 3, 4]]
    assert "2 queries keep too few negatives" in caplog.text


def test_drop_leaves_the_query_out(tmp_path):
    """Texts are the axes' two ends; a query along the first axis has 3 similar texts, the others have 2."""
    vectors = [[1, 0]] * 4 + [[0, 1]] * 3
    world = World(
        tmp_path, [f"text {i}" for i in range(7)], ["one", "two"], [(0, 0, 1), (1, 4, 1)], vectors, [[1, 0], [0, 1]]
    )
    options = {"range_for_sampling": "0-7", "negative_number": 3, "similarity_range": "0.5-1.5"}
    rows = world.rows(on_shortage="drop", **options)
    assert {row.query_id for row in rows} == {0}
    assert of(rows, 0, "given") == [0] and sorted(of(rows, 0, "mined")) == [1, 2, 3]
    with pytest.raises(UserError, match=r'1 queries have fewer than 3 candidates, first train\.jsonl:2: "two"'):
        world.rows(on_shortage="error", **options)


def test_an_error_leaves_the_earlier_result(tmp_path):
    world = simple(tmp_path)
    before = world.mine(range_for_sampling="0-20", negative_number=3).read_bytes()
    with pytest.raises(UserError):
        world.mine(range_for_sampling="0-2", negative_number=30, on_shortage="error")
    assert (tmp_path / "mined.parquet").read_bytes() == before


def test_draw_is_complete_distinct_and_even():
    pool = np.arange(100, 130)
    counts = np.zeros(30)
    for seed in range(600):
        found = negatives.draw(np.random.default_rng(seed), pool, 5, lambda ids: ids % 2 == 0)
        assert len(set(found.tolist())) == 5 and (found % 2 == 0).all()
        counts[found - 100] += 1
    assert counts[::2].min() > 140 and counts[::2].max() < 265, "200 expected of each"
    rare = negatives.draw(np.random.default_rng(0), np.arange(10_000), 3, lambda ids: np.isin(ids, [7, 9_998]))
    assert sorted(rare.tolist()) == [7, 9_998]
    assert len(negatives.draw(np.random.default_rng(0), pool[:0], 3, lambda ids: ids > 0)) == 0


# ---- bins, existing negatives, set-aside queries ------------------------------------------------


def test_a_bins_queries_get_the_window_of_the_bins_own_texts(tmp_path):
    rng = np.random.default_rng(5)
    n = 60
    tokens = np.where(np.arange(n) < 40, 100, 700)
    tokens[-3:] = 3000  # texts of a bin that holds no query
    names = ["len-0-500", "len-500-1000"]
    world = World(
        tmp_path, [f"text {i}" for i in range(n)], [f"query {i}" for i in range(6)], [(i, i, 1) for i in range(6)],
        rng.standard_normal((n, 8)), rng.standard_normal((6, 8)), bins=(tokens, names, [0, 1, 0, 1, 1, 0]),
    )  # fmt: skip
    rows = world.rows(pool="bin", range_for_sampling="2-9", negative_number=4, sampling="top", search_batch_size=2)
    for query, number in enumerate([0, 1, 0, 1, 1, 0]):
        inside = [t for t in world.ranked(query) if (number == 0 and t < 40) or (number == 1 and 40 <= t < 57)]
        assert of(rows, query, "mined") == [t for t in inside[2:9] if t != query][:4]
    rows = world.rows(pool="bin", range_for_sampling="0-1", negative_number=20)
    for query, number in enumerate([0, 1, 0, 1, 1, 0]):
        found = of(rows, query, "mined", "random")
        assert all((text < 40) if number == 0 else (40 <= text < 57) for text in found)
        assert len(found) == (20 if number == 0 else 17)


def test_existing_negatives_are_dropped_or_kept(tmp_path):
    world = simple(tmp_path)
    pairs = [*world.pairs, (0, 30, 0), (0, 31, 0), (2, 30, 0)]
    world = World(tmp_path, world.texts, world.queries, pairs, world.text_vectors, world.query_vectors)
    options = {"range_for_sampling": "0-40", "negative_number": 37, "on_shortage": "error"}
    rows = world.rows(keep_existing_neg=True, **options)
    assert of(rows, 0, "given") == [0, 30, 31]
    assert sorted(of(rows, 0, "mined")) == [t for t in range(40) if t not in (0, 30, 31)]
    rows = world.rows(keep_existing_neg=False, **options)
    assert of(rows, 0, "given") == [0] and {30, 31} & set(of(rows, 0, "mined"))


def test_a_candidate_that_differs_in_writing_only(tmp_path):
    """Text 1 is the positive and text 2 the query, in other letters; of two that read the same the first stands."""
    texts = ["paris is big", "Paris  IS big", "WHERE is paris", "Rome is old", "rome is OLD", "Oslo is cold"]
    world = World(tmp_path, texts, ["where is  Paris"], [(0, 0, 1)], np.linspace([1.0], [0.5], 6), [[1.0]])
    rows = world.rows(range_for_sampling="0-6", negative_number=6)
    assert sorted(of(rows, 0, "mined", "random")) == [3, 5]


def test_a_set_aside_querys_positive_is_open_to_others_only_if_it_is_also_theirs(tmp_path):
    pairs = [(0, 0, 1), (1, 1, 1), (1, 0, 1), (2, 2, 1)]
    rng = np.random.default_rng(0)
    world = World(
        tmp_path, list("vwxyz"), ["one", "two", "three"], pairs, rng.standard_normal((5, 3)),
        rng.standard_normal((3, 3)), split=["train", "dev", "train"],
    )  # fmt: skip
    rows = world.rows(range_for_sampling="0-5", negative_number=5)
    assert {row.query_id for row in rows} == {0, 2}
    assert sorted(of(rows, 0, "mined", "random")) == [2, 3, 4]  # 1 is closed
    assert sorted(of(rows, 2, "mined", "random")) == [0, 3, 4]  # 0 is a positive of query 0 as well


def test_vectors_of_another_table_are_refused(tmp_path):
    world = simple(tmp_path)
    world.text_vectors = world.text_vectors[:-1]
    with pytest.raises(UserError, match=r"39 vectors for 40 rows of .*texts\.parquet"):
        world.mine()


def test_the_query_itself_among_the_texts_is_never_taken(tmp_path):
    texts = some_texts(100)
    rng = np.random.default_rng(0)
    world = World(
        tmp_path, texts, texts[:20], [(i, i + 20, 1) for i in range(20)], rng.standard_normal((100, 16)),
        rng.standard_normal((20, 16)),
    )  # fmt: skip
    distinct = len({reads(text) for text in texts})
    rows = world.rows(range_for_sampling="0-50", negative_number=99)
    for query in range(20):
        found = of(rows, query, "mined", "random")
        assert query not in found and len(found) == distinct - 2
