"""The row cache against a dict that forgets nothing: it may forget, but never answers what was not put in."""

from __future__ import annotations

import mmap
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import rankd.features.cache.cache_kernels  # noqa: F401 - compiles now, before deadlines count
from rankd.errors import ConfigError
from rankd.features.cache.row_cache import AGING, WAYS, RowCache
from rankd.features.rows.row_decoding import RowDecoder, RowStatus
from rankd.features.rows.row_schema import WORD_BYTES, ColumnKind, RowColumn, RowSchema
from rankd.features.schema import Numeric
from rankd.types import Array, Float32Array, Int32Array

WIDTH = 5
SCHEMA = RowSchema("items", "item_id", (RowColumn("v", ColumnKind.EMBEDDING, WIDTH),))
DECODER = RowDecoder(SCHEMA, [Numeric(f"v.{index}") for index in range(WIDTH)], [], {})
DEFAULT = np.float32(-1.0)
FOREVER = 2**62
HERE = (RowStatus.FRESH, RowStatus.STALE)


def rows_of(numbers: list[int], versions: list[int], schema: RowSchema = SCHEMA) -> Array:
    """A row for each number: it, then its version as often as there is room."""
    rows = np.zeros((len(numbers), schema.row_words), np.uint32)
    rows[:, 0] = schema.mark
    rows[:, 2:] = np.asarray(versions, np.float32).reshape(-1, 1).view(np.uint32)
    rows[:, 2] = np.asarray(numbers, np.float32).view(np.uint32)
    return rows


def keys_of(numbers: list[int]) -> Array:
    """A key for each number; 0 is no key. Numbers that are alike modulo 3 share their upper bits, so their bucket."""
    spread = [(number % 3 * 0x9E3779B9 % 2**32) << 32 | number for number in numbers]
    return np.asarray([key if number else 0 for key, number in zip(spread, numbers, strict=True)], np.uint64)


def lines(count: int) -> tuple[Float32Array, Int32Array, Array]:
    """What a caller brings: numeric, categories and status."""
    return np.full((count, WIDTH), DEFAULT, np.float32), np.zeros((count, 0), np.int32), np.full(count, 99, np.uint8)


def budget_of(buckets: int, row_words: int = SCHEMA.row_words) -> int:
    """A budget that holds so many buckets, in whole pages."""
    return -(-buckets * WAYS * (WORD_BYTES * row_words + 32) // mmap.PAGESIZE) * mmap.PAGESIZE


def probed(cache: RowCache, numbers: list[int], now_ms: int = 0) -> list[int]:
    status = np.full(len(numbers), 99, np.uint8)
    cache.probe(keys_of(numbers), now_ms, status)
    return status.tolist()


def put(cache: RowCache, numbers: list[int], now_ms: int = 0, ttl_ms: int = FOREVER) -> None:
    rows, there = np.zeros((len(numbers), cache.row_words), np.uint32), np.ones(len(numbers), np.bool_)
    rows[:, : SCHEMA.row_words] = rows_of(numbers, numbers)
    cache.insert(keys_of(numbers), rows, there, now_ms, ttl_ms, ttl_ms)


class RowCacheMachine(RuleBasedStateMachine):
    """A cache of few buckets. `known` holds what was put in: version, whether it is there, until when, since when."""

    NUMBERS = st.lists(st.integers(0, 120), max_size=60)

    @initialize(buckets=st.integers(1, 6))
    def start(self, buckets: int) -> None:
        self.budget = budget_of(buckets)
        self.cache, self.now, self.version = RowCache(SCHEMA.row_words, self.budget), 1_000, 0
        self.known: dict[int, tuple[int, bool, int, int]] = {}

    @rule(numbers=NUMBERS, ttl=st.integers(0, 50), absent_ttl=st.integers(0, 50), seed=st.integers(0, 2**16))
    def insert(self, numbers: list[int], ttl: int, absent_ttl: int, seed: int) -> None:
        versions = list(range(self.version, self.version + len(numbers)))
        self.version += len(numbers)
        there = np.random.default_rng(seed).random(len(numbers)) < 0.7
        self.cache.insert(keys_of(numbers), rows_of(numbers, versions), there, self.now, ttl, absent_ttl)
        for number, version, present in zip(numbers, versions, there.tolist(), strict=True):
            self.known[number] = version, present, self.now + (ttl if present else absent_ttl), self.now
        self.known.pop(0, None)
        if numbers and numbers[-1]:
            assert probed(self.cache, numbers[-1:], self.now) == [self.status_of(numbers[-1])]

    @rule(numbers=NUMBERS)
    def probe(self, numbers: list[int]) -> None:
        self.check(numbers, probed(self.cache, numbers, self.now))

    @rule(numbers=NUMBERS)
    def read(self, numbers: list[int]) -> None:
        numeric, categories, status = lines(len(numbers))
        age = self.cache.read(keys_of(numbers), self.now, DECODER, numeric, categories, status)
        self.check(numbers, status.tolist())
        ages = [0]
        for number, found, line in zip(numbers, status.tolist(), numeric.tolist(), strict=True):
            if found in HERE:
                ages.append(self.now - self.known[number][3])
            assert line == ([number] + [self.known[number][0]] * 4 if found in HERE else [DEFAULT] * WIDTH)
        assert age == max(ages)

    @rule(ms=st.integers(1, 30))
    def wait(self, ms: int) -> None:
        self.now += ms

    @rule(numbers=NUMBERS)
    def drop(self, numbers: list[int]) -> None:
        self.cache.drop(keys_of(numbers))
        for number in numbers:
            self.known.pop(number, None)
        assert all(found in (RowStatus.MISSING, RowStatus.SKIPPED) for found in probed(self.cache, numbers, self.now))

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.known.clear()
        assert self.cache.used_slots == 0

    @rule()
    def expire(self) -> None:
        self.cache.expire()
        self.known = {number: (*entry[:2], 0, entry[3]) for number, entry in self.known.items()}

    @invariant()
    def nothing_is_forgotten_before_a_bucket_is_full(self) -> None:
        counts = self.cache.counts()
        assert counts.used_slots <= min(self.cache.slots, len(self.known))
        if counts.evictions == 0:
            assert counts.used_slots == len(self.known)
        assert self.cache.memory_bytes <= self.budget

    def status_of(self, number: int) -> RowStatus:
        _, present, until, _ = self.known[number]
        if present:
            return RowStatus.FRESH if self.now < until else RowStatus.STALE
        return RowStatus.ABSENT if self.now < until else RowStatus.ABSENT_STALE

    def check(self, numbers: list[int], status: list[int]) -> None:
        forgets = self.cache.counts().evictions > 0
        for number, found in zip(numbers, status, strict=True):
            if number == 0:
                assert found == RowStatus.SKIPPED
            elif number not in self.known:
                assert found == RowStatus.MISSING
            else:
                assert found == self.status_of(number) or (forgets and found == RowStatus.MISSING)


TestRowCacheMachine = RowCacheMachine.TestCase
TestRowCacheMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 600), st.integers(0, 4 << 20))
def test_memory_is_what_the_budget_says(row_words: int, budget: int) -> None:
    bucket = WAYS * (WORD_BYTES * row_words + 24) + 1
    if budget // mmap.PAGESIZE * mmap.PAGESIZE < bucket:
        with pytest.raises(
            ConfigError, match=rf"{budget} bytes was given, .* takes {-(-bucket // mmap.PAGESIZE) * mmap.PAGESIZE};"
        ):
            RowCache(row_words, budget)
        return
    cache = RowCache(row_words, budget)
    assert cache.memory_bytes <= budget
    assert cache.slots * (WORD_BYTES * row_words + 24) < cache.memory_bytes
    assert cache.memory_bytes >= 0.95 * budget or budget < 20 * (bucket + mmap.PAGESIZE)
    assert cache.counts().memory_bytes == cache.memory_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_at_the_start_and_never_grows() -> None:
    budget = 64 << 20
    before = resident_bytes()
    cache = RowCache(62, budget)
    taken = resident_bytes() - before
    assert 0.95 * budget <= taken <= 1.05 * budget
    rng, rows, there = np.random.default_rng(0), np.ones((1000, 62), np.uint32), np.ones(1000, np.bool_)
    for _ in range(400):
        cache.insert(rng.integers(1, 2**64, 1000, dtype=np.uint64), rows, there, 0, 1, 1)
    assert cache.used_slots > 0.99 * cache.slots
    assert resident_bytes() - before <= taken + (8 << 20)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_the_system_may_not_have_so_much() -> None:
    with pytest.raises(ConfigError, match="cannot be had here"):
        RowCache(64, 2**60)


def test_nothing_is_asked_and_nothing_is_kept() -> None:
    cache = RowCache(SCHEMA.row_words, budget_of(2))
    nothing, there = np.zeros(0, np.uint64), np.zeros(0, np.bool_)
    cache.insert(nothing, rows_of([], []), there, 5, 5, 5)
    cache.drop(nothing)
    numeric, categories, status = lines(0)
    cache.probe(nothing, 5, status)
    assert cache.read(nothing, 5, DECODER, numeric, categories, status) == 0
    assert cache.counts().insertions == 0


def test_counts() -> None:
    cache = RowCache(SCHEMA.row_words, budget_of(40))
    put(cache, [1, 2, 3, 3], ttl_ms=10)
    cache.insert(keys_of([4]), rows_of([4], [4]), np.zeros(1, np.bool_), 0, 10, 20)
    assert probed(cache, [1, 4, 5, 0], 9) == [
        RowStatus.FRESH,
        RowStatus.ABSENT,
        RowStatus.MISSING,
        RowStatus.SKIPPED,
    ]
    numeric, categories, status = lines(3)
    assert cache.read(keys_of([1, 2, 4]), 25, DECODER, numeric, categories, status) == 25
    counts = cache.counts()
    assert {status: number for status, number in counts.probed.items() if number} == {
        RowStatus.FRESH: 1,
        RowStatus.ABSENT: 1,
        RowStatus.MISSING: 1,
        RowStatus.SKIPPED: 1,
    }
    assert {status: number for status, number in counts.read.items() if number} == {
        RowStatus.STALE: 2,
        RowStatus.ABSENT_STALE: 1,
    }
    assert (counts.insertions, counts.evictions, counts.used_slots) == (5, 0, 4)


def test_a_row_of_another_schema_is_not_decoded() -> None:
    newer = RowSchema(SCHEMA.table, SCHEMA.key, SCHEMA.columns, version=2)
    cache = RowCache(SCHEMA.row_words, budget_of(2))
    cache.insert(keys_of([1]), rows_of([1], [1], newer), np.ones(1, np.bool_), 0, 9, 9)
    put(cache, [2])
    assert probed(cache, [1, 2]) == [RowStatus.FRESH, RowStatus.FRESH]
    numeric, categories, status = lines(2)
    cache.read(keys_of([1, 2]), 0, DECODER, numeric, categories, status)
    assert status.tolist() == [RowStatus.WRONG_SCHEMA, RowStatus.FRESH]
    assert numeric.tolist() == [[DEFAULT] * WIDTH, [2] * WIDTH]


def test_arrays_that_do_not_fit_are_refused() -> None:
    cache, keys = RowCache(SCHEMA.row_words, budget_of(2)), keys_of([1, 2])
    numeric, categories, status = lines(2)
    with pytest.raises(ValueError, match="1 places for 2 keys"):
        cache.probe(keys, 0, status[:1])
    with pytest.raises(ValueError, match="expected as many lines"):
        cache.read(keys, 0, DECODER, numeric[:, 1:], categories, status)
    with pytest.raises(ValueError, match="2 keys of rows of 7 words, and 1 lines"):
        cache.read(keys, 0, DECODER, numeric[:1], categories[:1], status)
    other = RowDecoder(RowSchema("items", "item_id", ()), [], [], {})
    with pytest.raises(ValueError, match="a decoder of rows of 2"):
        cache.read(keys, 0, other, numeric, categories, status)
    for rows, there in ((rows_of([1], [1]), [True] * 2), (rows_of([1, 2], [1, 2]), [True])):
        with pytest.raises(ValueError, match=r"expected \(2, 7\) and \(2,\)"):
            cache.insert(keys, rows, np.asarray(there), 0, 9, 9)


def test_the_least_used_row_leaves_first_and_of_these_the_oldest() -> None:
    cache = RowCache(200, budget_of(1, 200))
    assert cache.slots == WAYS
    for number in range(1, WAYS + 1):
        put(cache, [number], now_ms=number)
    favourites = [2, 5]
    probed(cache, favourites)
    put(cache, [100, 101], now_ms=100)
    assert probed(cache, [1, 2, 3, 4, 5]) == [0, 1, 0, 1, 1]
    for number in range(200, 200 + 3 * WAYS):
        put(cache, [number], now_ms=number)
    assert probed(cache, favourites) == [1, 1]
    for number in range(1000, 1000 + 4 * AGING):  # by and by it is forgotten that they were used
        put(cache, [number], now_ms=number)
    assert probed(cache, favourites) == [0, 0]


def test_a_newcomer_does_not_inherit_the_uses_of_its_slot() -> None:
    cache = RowCache(200, budget_of(1, 200))
    put(cache, list(range(1, WAYS + 1)))
    probed(cache, list(range(1, WAYS + 1)))
    put(cache, [100], now_ms=1)  # in the place of 1, whose one use was as few as any
    put(cache, [200], now_ms=2)
    assert probed(cache, [1, 2, 100, 200]) == [0, 1, 0, 1]


def test_more_is_found_than_in_the_order_of_the_last_use() -> None:
    cache = RowCache(SCHEMA.row_words, budget_of(60))
    popularity = 1.0 / np.arange(1, 10_001)
    rng, ends = np.random.default_rng(0), np.cumsum(popularity / popularity.sum())
    keys = rng.integers(1, 2**64, 10_000, dtype=np.uint64)
    status, rows = np.zeros(100, np.uint8), np.zeros((100, SCHEMA.row_words), np.uint32)
    last_used: OrderedDict[int, None] = OrderedDict()
    found = found_last_used = 0
    for request in range(1_000):
        wanted = keys[np.unique(np.searchsorted(ends, rng.random(100)).clip(max=9_999))]
        status = np.zeros(wanted.shape[0], np.uint8)
        cache.probe(wanted, request, status)
        missing = wanted[status == RowStatus.MISSING]
        there = np.ones(missing.shape[0], np.bool_)
        cache.insert(missing, rows[: missing.shape[0]], there, request, FOREVER, FOREVER)
        known = [key for key in wanted.tolist() if key in last_used]
        for key in wanted.tolist():
            last_used[key] = None
            last_used.move_to_end(key)
        while len(last_used) > cache.slots:
            last_used.popitem(last=False)
        if request >= 500:
            found, found_last_used = found + wanted.shape[0] - missing.shape[0], found_last_used + len(known)
    assert found > 1.03 * found_last_used


def test_no_thread_reads_half_a_row() -> None:
    width = 300
    schema = RowSchema("items", "item_id", (RowColumn("v", ColumnKind.EMBEDDING, width),))
    decoder = RowDecoder(schema, [Numeric(f"v.{index}") for index in range(width)], [], {})
    cache = RowCache(schema.row_words, budget_of(3, schema.row_words))
    numbers, wrong, stop = list(range(1, 81)), [], threading.Event()
    keys, there = keys_of(numbers), np.ones(len(numbers), np.bool_)

    def write(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(400):
            versions = [1000 * number + int(rng.integers(1000)) for number in numbers]
            rows = rows_of(numbers, versions, schema)
            rows[:, 2] = rows[:, 3]
            cache.insert(keys, rows, there, 0, 9, 9)
            cache.drop(keys[:: int(rng.integers(5, 40))])

    def look() -> None:
        numeric, categories, status = np.zeros((80, width), np.float32), np.zeros((80, 0), np.int32), lines(80)[2]
        while not stop.is_set():
            cache.read(keys, 0, decoder, numeric, categories, status)
            found = numeric[status == RowStatus.FRESH]
            own = np.asarray(numbers)[status == RowStatus.FRESH]
            if (found != found[:, :1]).any() or (found[:, 0] // 1000 != own).any():
                wrong.append(found)

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    readers = [threading.Thread(target=look) for _ in range(2)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert wrong == []
    assert cache.counts().read[RowStatus.FRESH] > 0
