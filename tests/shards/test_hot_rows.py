"""Rows that are kept in the main process: sums are those without them, and they are never old ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.local_tables import LocalTables
from rankd.embeddings.table_file import open_table
from rankd.embeddings.table_spec import TablePart, TableSpec, TableStorage
from rankd.embeddings.table_writing import write_table
from rankd.errors import Unavailable
from rankd.shards.hot_row_cache import HotRowCache
from rankd.shards.kept_rows import INDEX_BYTES, KeptRows, pack
from rankd.shards.routing import Router
from rankd.shards.row_counting import HALVED_EVERY, LEAST, RowCounter
from rankd.shards.shard_config import ShardServerConfig
from rankd.shards.shard_layout import Net, Shard, ShardLayout
from rankd.shards.shard_server import ShardServer
from rankd.types import Float32Array, Int64Array
from tests.free_ports import free_port
from tests.shards.plain_tables import (
    PlainPooling,
    asking,
    jagged,
    layouts,
    make_server,
    one_shard,
    part_of,
    questions,
    quick,
    serving,
    specs_of,
    until,
    values_of,
    whole,
)
from tests.shards.test_routing import answered


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sums_with_kept_rows_are_those_without(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    router, plain = Router(layout), whole(layout)
    some = {}
    for name, spec in specs_of(layout).items():
        ids = data.draw(st.lists(st.integers(0, min(spec.rows, 20) - 1) | st.integers(0, spec.rows - 1), max_size=30))
        rows = np.unique(np.asarray(ids, np.int64))
        some[name] = pack(spec, rows, values_of(spec)[rows])
    kept = KeptRows(router, some, generation=0)
    asked = data.draw(st.lists(questions(layout, most_samples=150), max_size=2))
    routed = router.route(asked, kept.index)
    into, columns = routed.room()
    answers = [answered(layout, call) for call in routed.calls]
    routed.add_up(answers, into, columns, kept.answer(routed.kept) if routed.kept is not None else None)
    for one, values in zip(asked, into, strict=True):
        np.testing.assert_allclose(values, plain.pool(one), rtol=1e-5, atol=1e-5)


def test_rows_that_are_kept_are_not_asked_for() -> None:
    layout = one_shard()
    (spec,) = specs_of(layout).values()
    router, rows = Router(layout), np.arange(0, 100, 2)
    kept = KeptRows(router, {"item": pack(spec, rows, values_of(spec)[rows])}, generation=0)
    routed = router.route([jagged(["item"], [[[0, 1, 2], [4], [3, 98]]])], kept.index)
    (call,) = routed.calls
    assert (routed.num_ids(call), routed.kept is not None and routed.num_ids(routed.kept)) == (2, 4)
    assert router.route([jagged(["item"], [[[0, 2], [98]]])], kept.index).calls == ()


@pytest.mark.parametrize("storage", TableStorage)
def test_kept_rows_of_any_storage_are_the_shards(tmp_path: Path, storage: TableStorage) -> None:
    """What is packed anew from a shard's numbers gives these numbers."""
    spec = TableSpec("t", 200, 37, storage)
    values = np.random.default_rng(3).standard_normal((200, 37), np.float32) * 7
    table = open_table(write_table(tmp_path, spec, [values]))
    layout = ShardLayout("p", (Net("n", (spec,)),), (Shard("a", ("h:1",), (TablePart("t"),)),))
    with LocalTables([table]) as here:
        each = JaggedIds(("t",), np.arange(101), np.arange(0, 200, 2))
        kept = KeptRows(Router(layout), {"t": pack(spec, each.ids, here.pool(each))}, generation=0)
        asked = jagged(["t"], [[[0, 2, 4, 4], [198], [], [6] * 20]])
        routed = Router(layout).route([asked], kept.index)
        assert routed.kept is not None
        (values,), columns = routed.room()
        routed.add_up([], [values], columns, kept.answer(routed.kept))
        np.testing.assert_allclose(values, here.pool(asked), rtol=1e-5, atol=1e-4)


@given(st.lists(st.lists(st.integers(0, 30), max_size=20), max_size=30), st.integers(1, 8))
def test_the_hottest_rows_are_those_that_were_asked_for_most(requests: list[list[int]], wanted: int) -> None:
    counter = RowCounter(wanted)
    counts = np.zeros(31)
    for ids in requests:
        counter.saw(np.asarray(ids, np.int64))
        np.add.at(counts, ids, 1)
    hottest = counter.hottest().tolist()
    assert hottest == sorted(set(hottest))
    assert len(hottest) == min(wanted, (counts >= 2).sum())
    others = np.delete(counts, hottest)
    assert not hottest or counts[hottest].min() >= max(2, others.max(initial=0) if len(hottest) == wanted else 0)


def test_rows_that_have_become_cold_are_forgotten_and_memory_is_bounded() -> None:
    counter = RowCounter(1)
    counter.saw(np.full(100, 5))
    for _ in range(8 * HALVED_EVERY):
        counter.saw(np.full(1, 6))
    assert counter.hottest().tolist() == [6]
    counter = RowCounter(2)
    counter.saw(np.repeat([1, 2], 50))
    for number in range(10):
        counter.saw(np.arange(number * LEAST, (number + 1) * LEAST))
    assert counter.hottest().tolist() == [1, 2]
    assert len(counter._rows) <= 2 * LEAST


class Fetched:
    """A shard's rows, and which were asked for."""

    def __init__(self, values: Float32Array) -> None:
        self.values, self.asked = values, list[list[int]]()

    def __call__(self, table: str, rows: Int64Array) -> Float32Array:
        self.asked.append(rows.tolist())
        return self.values[rows]


def cache_of(fetched: Fetched, generations: Sequence[int], rows: int) -> HotRowCache:
    return HotRowCache(Router(one_shard()), {"item": rows}, fetched, lambda: generations[-1])


def kept_by(cache: HotRowCache) -> list[int]:
    """The rows of table item."""
    rows: list[int] = [] if cache.kept is None else cache.kept.some["item"].rows.tolist()
    return rows


def test_the_hottest_rows_are_fetched_once_and_again_after_a_new_connection() -> None:
    (spec,) = specs_of(one_shard()).values()
    fetched, generations = Fetched(values_of(spec)), [1]
    cache = cache_of(fetched, generations, 50)
    assert kept_by(cache) == []
    cache.learn([jagged(["item"], [[[1, 1, 2], [2, 3]]])])
    cache.refresh()
    cache.refresh()
    assert fetched.asked == [[1, 2]]
    cache.learn([jagged(["item"], [[[7, 7]]])])
    cache.refresh()
    assert fetched.asked == [[1, 2], [7]]
    assert kept_by(cache) == [1, 2, 7]
    generations.append(2)
    assert kept_by(cache) == []
    cache.refresh()
    assert fetched.asked[-1] == [1, 2, 7]
    assert kept_by(cache) == [1, 2, 7]


def test_a_connection_that_is_made_while_rows_come_leaves_them_unused() -> None:
    (spec,) = specs_of(one_shard()).values()
    generations = [1]

    class Reconnecting(Fetched):
        def __call__(self, table: str, rows: Int64Array) -> Float32Array:
            generations.append(2)
            return super().__call__(table, rows)

    cache = cache_of(Reconnecting(values_of(spec)), generations, 50)
    cache.learn([jagged(["item"], [[[1, 1]]])])
    cache.refresh()
    assert kept_by(cache) == []
    cache.refresh()
    assert kept_by(cache) == [1]


@given(st.integers(1, 60))
def test_the_byte_budget_is_kept(rows: int) -> None:
    """That of the plan is of so many rows; what it takes to find them is in it, too."""
    (spec,) = specs_of(one_shard()).values()
    cache = cache_of(Fetched(values_of(spec)), [1], rows)
    cache.learn([jagged(["item"], [[list(range(101)) * 2]])])
    cache.refresh()
    budget = rows * spec.row_bytes
    if cache.kept is not None:
        size = cache.kept.size_bytes
        assert cache.kept.index.rows.nbytes + sum(one.records.nbytes for one in cache.kept.some.values()) <= size
        assert budget - spec.row_bytes - INDEX_BYTES < size <= budget
    else:
        assert budget < spec.row_bytes + INDEX_BYTES


@contextmanager
def hot_server(values: Float32Array, port: int) -> Iterator[ShardServer]:
    """The only shard of `one_shard`, with these rows."""
    layout = one_shard()
    (served,) = (layout.served_by(shard) for shard in layout.shards)
    server = ShardServer(PlainPooling({"item": values}), layout.plan, served, ShardServerConfig(port=port))
    with serving(server):
        yield server


def test_a_shard_that_comes_back_with_other_rows_is_never_mixed_with_the_old_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rankd.shards.hot_row_cache.SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr("rankd.shards.hot_row_cache.REFRESH_SECONDS", 0.05)
    (spec,) = specs_of(one_shard()).values()
    asked = jagged(["item"], [[[1, 1, 2], [2, 50, 3]]])
    old, new = values_of(spec), values_of(spec) + 1
    port, config = free_port(), quick(timeout_ms=10_000.0)
    with hot_server(old, port) as server, asking(one_shard(server.address), config, {"item": 90}) as pooling:
        expected = PlainPooling({"item": old}).pool(asked)
        end = time.perf_counter() + 10
        while not pooling.rows()["kept"]:
            np.testing.assert_allclose(pooling.pool(asked), expected, rtol=1e-5)
            assert time.perf_counter() < end
        assert 0 < pooling.kept_bytes() <= 90 * spec.row_bytes
        server.close()
        with hot_server(new, port):
            until(lambda: pooling.replicas_up() == {"a": 1})
            expected, before = PlainPooling({"item": new}).pool(asked), pooling.rows()["kept"]
            while pooling.rows()["kept"] == before:
                np.testing.assert_allclose(pooling.pool(asked), expected, rtol=1e-5)
                assert time.perf_counter() < end + 10


def test_rows_that_cannot_be_had_cost_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankd.shards.hot_row_cache.SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr("rankd.shards.hot_row_cache.REFRESH_SECONDS", 0.0)

    def refused(*_: object) -> Float32Array:
        raise Unavailable("not now")

    monkeypatch.setattr("rankd.shards.sharded_pooling.ShardedPooling._rows_of", refused)
    layout = one_shard()
    asked = jagged(["item"], [[[1, 1, 2]]])
    with (
        serving(make_server(layout)) as (address,),
        asking(one_shard(address), hot_rows={"item": 90}) as pooling,
    ):
        for _ in range(20):
            np.testing.assert_allclose(pooling.pool(asked), part_of(layout, layout.shards[0]).pool(asked), rtol=1e-5)
        assert pooling.kept_bytes() == 0
