"""The dict in the place of the row cache: the same answers as RowCache while nothing leaves, and the oldest leaves."""

from __future__ import annotations

import numpy as np

from rankd.bench.feature_suite.dict_cache import DictCache
from rankd.features.cache.row_cache import RowCache
from rankd.features.rows.row_decoding import RowDecoder, RowStatus
from rankd.features.rows.row_schema import ColumnKind, RowColumn, RowSchema
from rankd.features.schema import Categorical, Numeric
from rankd.features.stores.store_keys import hash_id
from rankd.types import Array, Float32Array, Int32Array

SCHEMA = RowSchema(
    "items", "item_id", (RowColumn("price", ColumnKind.NUMERIC), RowColumn("genre", ColumnKind.CATEGORICAL))
)
DECODER = RowDecoder(SCHEMA, (Numeric("price"),), (Categorical("genre", offset=1, size=2),), {"genre": ("pop", "jazz")})
BUDGET = 1 << 16
Found = tuple[list[int], list[int], Float32Array, Int32Array, int]


def rows_of(prices: list[float], mark: int = SCHEMA.mark) -> Array:
    rows = np.zeros((len(prices), SCHEMA.row_words), np.uint32)
    rows[:, 0] = mark
    rows[:, 2] = np.asarray(prices, np.float32).view(np.uint32)
    rows[:, 3:5] = np.asarray([hash_id("jazz")], np.uint64).view(np.uint32)
    return rows


def look(cache: DictCache | RowCache, keys: Array, now_ms: int) -> Found:
    count = len(keys)
    probed, read = np.zeros(count, np.uint8), np.zeros(count, np.uint8)
    numeric, categories = np.full((count, 1), 7, np.float32), np.full((count, 1), 7, np.int32)
    cache.probe(keys, now_ms, probed)
    oldest = cache.read(keys, now_ms, DECODER, numeric, categories, read)
    return probed.tolist(), read.tolist(), numeric, categories, oldest


def filled(cache: DictCache | RowCache) -> None:
    keys = np.asarray([5, 6, 8, 0], np.uint64)
    present = np.asarray([True, True, False, True])
    cache.insert(keys, rows_of([1.5, 2.5, 0.0, 9.0]), present, 100, 1000, 50)
    cache.insert(np.asarray([9], np.uint64), rows_of([3.5], mark=1), np.ones(1, bool), 200, 1000, 50)


def test_it_answers_as_the_row_cache() -> None:
    keys = np.asarray([5, 0, 6, 7, 8, 9], np.uint64)
    caches: list[DictCache | RowCache] = [DictCache(SCHEMA.row_words, BUDGET), RowCache(SCHEMA.row_words, BUDGET)]
    for cache in caches:
        filled(cache)
    for now_ms in (120, 160, 1100, 1300):
        mine, other = (look(cache, keys, now_ms) for cache in caches)
        assert mine[:2] == other[:2]
        assert np.array_equal(mine[2], other[2])
        assert np.array_equal(mine[3], other[3])
        assert mine[0][1] == RowStatus.SKIPPED
        assert mine[1][5] == RowStatus.WRONG_SCHEMA
    for cache in caches:
        cache.expire()
        assert look(cache, keys[:1], 120)[0] == [RowStatus.STALE]
        assert cache.used_slots == 4
    assert look(caches[0], keys, 1300)[4] >= 1200


def test_the_least_recently_used_leaves() -> None:
    cache = DictCache(SCHEMA.row_words, 3 * (SCHEMA.row_bytes + 25))
    assert cache.slots == 3
    for key in (1, 2, 3):
        cache.insert(np.asarray([key], np.uint64), rows_of([key]), np.ones(1, bool), 0, 1000, 50)
    cache.probe(np.asarray([1], np.uint64), 10, np.zeros(1, np.uint8))
    cache.insert(np.asarray([4], np.uint64), rows_of([4]), np.ones(1, bool), 0, 1000, 50)
    found, _, numeric, _, _ = look(cache, np.asarray([1, 2, 3, 4], np.uint64), 10)
    assert found == [RowStatus.FRESH, RowStatus.MISSING, RowStatus.FRESH, RowStatus.FRESH]
    assert numeric[:, 0].tolist() == [1.0, 7.0, 3.0, 4.0]
    assert cache.counts().evictions == 1
    assert cache.memory_bytes > 3 * SCHEMA.row_bytes


def test_the_same_budget_holds_about_as_many_rows() -> None:
    mine, other = DictCache(64, 1 << 20), RowCache(64, 1 << 20)
    assert abs(mine.slots - other.slots) < 32
