"""The loops over the row cache, compiled by numba. In and out: the arrays of `row_cache.py`; the caller holds its lock.

A key belongs to one bucket of WAYS slots, chosen by its upper 32 bits. The keys of a bucket lie side by side, and so do
its marks, two int64 a slot:

    until      the time in ms from which on the row is stale, x 8; + 4 if the store has the row; + its uses, 0 to 3
    written    the time in ms at which it came

Who leaves a full bucket is the least used slot, of several the one that came first. A newcomer has no uses yet; every
AGING evictions the uses of a bucket are halved.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from rankd.features.cache.row_cache import AGING, EVICTED, INSERTED, PROBED, READ, USED, WAYS, Slots
from rankd.features.rows.decoding_kernels import DECODING, write_codes, write_numbers
from rankd.features.rows.row_decoding import Decoding, RowStatus
from rankd.machine_code import kernel, part, prefetch, read, types, written
from rankd.types import Array, Float32Array, Int32Array, Int64Array

# Without stubs; `importlib` keeps them Any for the type checker.
_ir: Any = importlib.import_module("llvmlite.ir")
_cgutils: Any = importlib.import_module("numba.core.cgutils")

MOST_USES = 3
"""Uses that are counted, for who leaves. Requests of 512 of 1,000,000 items (Zipf 1.0), room for 100,000: of the keys
74.1 % are found, with the least recently used leaving 68.9 %, with the 100,000 most popular kept 77.7 %; where a tenth
of the items swap popularity every 1,000 requests 71.4 % and 68.4 %. Counting to 7 or 15, or halving twice as seldom,
finds no more and follows such swaps more slowly; halving twice as often finds 1 % less."""
BLOCK = 32
"""Rows that are asked for before the first of them is decoded: the gaps between random rows are what reading waits for.
1,000 keys in 100,000 rows of 256 bytes: 85 us instead of 140; 8 to 128 measure the same."""
_MOST_LINES = 8  # of a row; what follows is read in order, which the processor sees by itself
_LINE_WORDS = 64 // 4
_PRESENT, _PRESENT_BIT = 4, 2
_TIME_BIT = 3
WITHOUT_TIME = _PRESENT | MOST_USES
_UPPER = np.uint64(32)
_NOTHING = np.uint64(0)
_MISSING, _FRESH, _SKIPPED, _WRONG_SCHEMA, _STALE = (
    int(status)
    for status in (RowStatus.MISSING, RowStatus.FRESH, RowStatus.SKIPPED, RowStatus.WRONG_SCHEMA, RowStatus.STALE)
)

_SLOTS = types.NamedTuple(
    [
        written(types.uint64, 2),
        written(types.int64, 3),
        written(types.uint32, 2),
        written(types.uint8, 1),
        written(types.int64, 2),
    ],
    Slots,
)
_KEYS = read(types.uint64, 1)
_STATUS = written(types.uint8, 1)


def _ways_of(_context: Any, keys: Any, bucket: Any, key: Any) -> tuple[Any, Any]:
    """Which ways of a bucket hold a key, a bit each. All are compared at once: half the time of a loop over them."""
    whole, index, number = _ir.VectorType(_ir.IntType(64), WAYS), _ir.IntType(32), _ir.IntType(64)

    def codegen(context: Any, code: Any, signature: Any, arguments: Any) -> Any:
        array, bucket, key = arguments
        array = context.make_array(signature.args[0])(context, code, array)
        place = _cgutils.get_item_pointer(context, code, signature.args[0], array, [bucket, number(0)])
        nothing = _ir.Constant(whole, _ir.Undefined)
        first = code.insert_element(nothing, key, index(0))
        same = code.shuffle_vector(first, nothing, _ir.Constant(_ir.VectorType(index, WAYS), [0] * WAYS))
        found = code.load(code.bitcast(place, whole.as_pointer()), align=64)
        return code.zext(code.bitcast(code.icmp_unsigned("==", found, same), _ir.IntType(WAYS)), number)

    return types.int64(keys, bucket, key), codegen


def _lowest_bit(_context: Any, bits: Any) -> tuple[Any, Any]:
    """The number of the lowest bit that is set; one is."""

    def codegen(_context: Any, code: Any, _signature: Any, arguments: Any) -> Any:
        return code.cttz(arguments[0], _ir.IntType(1)(1))

    return types.int64(bits), codegen


_intrinsic: Any = importlib.import_module("numba.extending").intrinsic
ways_of: Callable[[Array, int, Any], int] = _intrinsic(_ways_of)
lowest_bit: Callable[[int], int] = _intrinsic(_lowest_bit)


@part
def _bucket_of(keys: Array, key: Any) -> int:
    return int(np.int64(((key >> _UPPER) * np.uint64(keys.shape[0])) >> _UPPER))


@part
def _slot_of(keys: Array, key: Any) -> int:
    """The slot of a key; -1 if it is not here."""
    bucket = _bucket_of(keys, key)
    ways = ways_of(keys, bucket, key)
    return bucket * WAYS + lowest_bit(ways) if ways else -1


@part
def _status_of(mark: int, now: int) -> int:
    absent = 1 - ((mark >> _PRESENT_BIT) & 1)
    return _FRESH + 2 * absent + int((mark >> _TIME_BIT) <= now)


@kernel(types.void(_SLOTS, _KEYS, types.int64, _STATUS))
def probe_keys(slots: Slots, keys: Array, now: int, status: Array) -> None:
    """The RowStatus of keys (n,) into status (n,); those that are here are used once more."""
    known, marks, _, _, counters = slots
    for number in range(keys.shape[0]):
        found = _SKIPPED
        if keys[number] != _NOTHING:
            slot = _slot_of(known, keys[number])
            found = _MISSING
            if slot >= 0:
                mark = marks[slot // WAYS, slot % WAYS, 0]
                if (mark & MOST_USES) < MOST_USES:
                    marks[slot // WAYS, slot % WAYS, 0] = mark + 1
                found = _status_of(mark, now)
        status[number] = found
        counters[PROBED, found] += 1


@part
def _ask_for(values: Array, slot: int) -> None:
    for line in range(min(-(-values.shape[1] // _LINE_WORDS), _MOST_LINES)):
        prefetch(values, slot, line * _LINE_WORDS)


@kernel(types.int64(_SLOTS, _KEYS, types.int64, DECODING, written(types.float32, 2), written(types.int32, 2), _STATUS))
def read_keys(
    slots: Slots,
    keys: Array,
    now: int,
    decoding: Decoding,
    numeric: Float32Array,
    categories: Int32Array,
    status: Array,
) -> int:
    """Rows that are here into their lines of numeric and categories; the RowStatus of all keys (n,) into status (n,).

    Returns the age in ms of the oldest row that was decoded, 0 if none was.
    """
    mark, runs, scales, lists, table = decoding
    known, marks, values, _, counters = slots
    raws = values.view(np.float32)
    places = np.empty(BLOCK, np.int64)
    oldest = now
    for start in range(0, keys.shape[0], BLOCK):
        count = min(BLOCK, keys.shape[0] - start)
        for number in range(count):
            key = keys[start + number]
            slot = _slot_of(known, key) if key != _NOTHING else -1
            found = _SKIPPED if key == _NOTHING else _MISSING
            if slot >= 0:
                found = _status_of(marks[slot // WAYS, slot % WAYS, 0], now)
                _ask_for(values, slot)
            places[number], status[start + number] = slot, found
        for number in range(count):
            line, slot = start + number, places[number]
            if status[line] == _FRESH or status[line] == _STALE:
                if values[slot, 0] == mark:
                    write_numbers(raws, slot, runs, scales, numeric, line)
                    write_codes(values, slot, lists, table, categories, line)
                    oldest = min(oldest, marks[slot // WAYS, slot % WAYS, 1])
                else:
                    status[line] = _WRONG_SCHEMA
            counters[READ, status[line]] += 1
    return now - oldest


@part
def _make_room(marks: Int64Array, ages: Array, bucket: int) -> int:
    """The way of a full bucket whose row leaves."""
    leaving, least = 0, marks[bucket, 0, 0] & MOST_USES
    for way in range(1, WAYS):
        uses = marks[bucket, way, 0] & MOST_USES
        if uses < least or (uses == least and marks[bucket, way, 1] < marks[bucket, leaving, 1]):
            leaving, least = way, uses
    ages[bucket] += 1
    if ages[bucket] == AGING:
        ages[bucket] = 0
        for way in range(WAYS):
            mark = marks[bucket, way, 0]
            marks[bucket, way, 0] = mark - (mark & MOST_USES) + ((mark & MOST_USES) >> 1)
    return leaving


@part
def _place_for(known: Array, marks: Int64Array, ages: Array, counters: Int64Array, key: Any) -> int:
    """The slot of a key, which is its own from now on; a new one has no uses."""
    bucket = _bucket_of(known, key)
    ways = ways_of(known, bucket, key)
    if ways == 0:
        ways = ways_of(known, bucket, _NOTHING)
        if ways:
            way = lowest_bit(ways)
            counters[USED, 0] += 1
        else:
            way = _make_room(marks, ages, bucket)
            counters[EVICTED, 0] += 1
        known[bucket, way], marks[bucket, way, 0] = key, 0
    else:
        way = lowest_bit(ways)
    return bucket * WAYS + way


@kernel(
    types.void(_SLOTS, _KEYS, read(types.uint32, 2, "C"), read(types.boolean, 1), types.int64, types.int64, types.int64)
)
def insert_rows(
    slots: Slots, keys: Array, rows: Array, present: Array, now: int, until: int, absent_until: int
) -> None:
    """Keep rows (m, words) under keys (m,): fresh before `until`, or known to be absent before `absent_until`."""
    known, marks, values, ages, counters = slots
    for number in range(keys.shape[0]):
        if keys[number] == _NOTHING:
            continue
        slot = _place_for(known, marks, ages, counters, keys[number])
        bucket, way = slot // WAYS, slot % WAYS
        time, there = (until, _PRESENT) if present[number] else (absent_until, 0)
        marks[bucket, way, 0] = (time << _TIME_BIT) + there + (marks[bucket, way, 0] & MOST_USES)
        marks[bucket, way, 1] = now
        counters[INSERTED, 0] += 1
        if present[number]:
            for word in range(values.shape[1]):
                values[slot, word] = rows[number, word]


@kernel(types.void(_SLOTS, _KEYS))
def drop_keys(slots: Slots, keys: Array) -> None:
    """Forget keys (n,)."""
    known, _, _, _, counters = slots
    for number in range(keys.shape[0]):
        slot = _slot_of(known, keys[number]) if keys[number] != _NOTHING else -1
        if slot >= 0:
            known[slot // WAYS, slot % WAYS] = _NOTHING
            counters[USED, 0] -= 1
