"""The loops over hashes and rows, compiled by numba: look-ups in a hash table, and rows into a model's columns.

In: arrays. Out: what the caller's arrays hold afterwards. Importing this file compiles it, or reads the machine code
that an earlier process kept, and imports numba: `hash_index.py` and `row_decoding.py` do so when something is
constructed, not when they are imported. Next: `cache/cache_kernels.py`, which decodes rows where the cache keeps them.

A hash table is (slots, 2) uint64, key and value side by side so that a look-up reads one cache line. The slots are a
power of two and at most half of them taken; a key lies in slot key % slots or in the next free one; key 0 marks a free
slot.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rankd.features.rows.row_decoding import Decoding
from rankd.machine_code import kernel, part, prefetch, read, types, written
from rankd.types import Array, Float32Array, Int32Array, Int64Array

AHEAD = 16
"""Keys whose slot is asked for before it is read."""
_LARGEST = np.finfo(np.float32).max
_INFINITY = np.float32(np.inf)
_OWN_LOG1P = np.float32(2e-8)
_ROOT_HALF = np.int64(0x3FE6A09E667F3BCD)  # the bits of sqrt(1/2) in float64
_MANTISSA_BITS = np.int64(52)
_LOG_2 = math.log(2.0)
_WORD_BITS = np.uint64(32)


@kernel(types.boolean(written(types.uint64, 2), read(types.uint64, 1), read(types.int32, 1)))
def fill_table(table: Array, keys: Array, values: Int32Array) -> bool:
    """Put keys (n,) uint64 with their values into an empty table; key 0 is passed over. False: a key came twice."""
    last = np.uint64(table.shape[0] - 1)
    for number in range(keys.shape[0]):
        key = keys[number]
        if key == 0:
            continue
        slot = np.int64(key & last)
        while table[slot, 0] != 0:
            if table[slot, 0] == key:
                return False
            slot = np.int64(np.uint64(slot + 1) & last)
        table[slot, 0], table[slot, 1] = key, np.uint64(values[number])
    return True


@part
def value_of(table: Array, start: int, last: int, key: Any, missing: int) -> int:
    """The value of a key in the table of last + 1 slots that begins at slot `start`."""
    if key == 0:
        return missing
    slot = int(np.int64(key & np.uint64(last)))
    while True:
        found = table[start + slot, 0]
        if found == key:
            return int(np.int32(table[start + slot, 1]))
        if found == 0:
            return missing
        slot = (slot + 1) & last


@kernel(types.void(read(types.uint64, 2, "C"), read(types.uint64, 1), written(types.int32, 1), types.int64))
def find_values(table: Array, keys: Array, out: Int32Array, missing: int) -> None:
    """The values of keys (m,) uint64 into out (m,) int32."""
    last = table.shape[0] - 1
    for number in range(keys.shape[0]):
        if number + AHEAD < keys.shape[0]:
            prefetch(table, int(np.int64(keys[number + AHEAD] & np.uint64(last))), 0)
        out[number] = value_of(table, 0, last, keys[number], missing)


@part
def _log1p(value: Any) -> Any:
    """log(1 + value) of a float32 that is not negative, rounded once from float64; NaN and infinity as they are.

    2^e m = 1 + value with m in sqrt(1/2)..sqrt(2), and log(m) = 2 artanh((m - 1) / (m + 1)) by its series. The
    processor takes 8 values at once: 1 ns each instead of 14 to 18 with the C library's log1pf.
    """
    bits = np.float64(1.0 + np.float64(value)).view(np.int64)
    exponent = (bits - _ROOT_HALF) >> _MANTISSA_BITS
    mantissa = np.int64(bits - (exponent << _MANTISSA_BITS)).view(np.float64)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = 1 / 13
    for odd in (11, 9, 7, 5, 3, 1):
        series = series * square + 1 / odd
    logarithm = np.float32(exponent * _LOG_2 + 2.0 * ratio * series)
    # A smaller value is its own logarithm, and is lost when 1 is added to it.
    return value if value < _OWN_LOG1P or not value < _INFINITY else logarithm


@part
def _scaled(value: Any, mean: Any, std: Any) -> Any:
    scaled = (value - mean) / std
    return np.float32(0.0) if math.isnan(scaled) else min(max(scaled, -_LARGEST), _LARGEST)


@part
def write_numbers(
    raws: Float32Array, row: int, runs: Int64Array, scales: Float32Array, numeric: Float32Array, line: int
) -> None:
    """As `tables.normalise`, with float32 throughout as NumPy has it.

    The places are unsigned, for numba looks at each that may be negative; so both loops go 16 numbers at a time.
    """
    for run in range(runs.shape[0]):
        word, column, length = np.uint64(runs[run, 0]), np.uint64(runs[run, 1]), np.uint64(runs[run, 2])
        if runs[run, 3]:
            for number in range(length):
                place, value = column + number, raws[row, word + number]
                value = _log1p(np.float32(0.0) if value < 0.0 else value)
                numeric[line, place] = _scaled(value, scales[0, place], scales[1, place])
        else:
            for number in range(length):
                place, value = column + number, raws[row, word + number]
                numeric[line, place] = _scaled(value, scales[0, place], scales[1, place])


@part
def _is_there(categories: Int32Array, line: int, column: int, count: int, code: int) -> bool:
    """Whether a code is among `count` of a line that begin at a column."""
    there = False
    for place in range(count):
        there = there or categories[line, column + place] == code
    return there


@part
def write_codes(rows: Array, row: int, lists: Int64Array, table: Array, categories: Int32Array, line: int) -> None:
    """As `tables.encode_values`: known values in their order, each once, then zeros."""
    for number in range(lists.shape[0]):
        word, column, width = lists[number, 0], lists[number, 2], lists[number, 3]
        known = 0
        for place in range(lists[number, 1]):
            low, high = np.uint64(rows[row, word + 2 * place]), np.uint64(rows[row, word + 2 * place + 1])
            code = value_of(table, lists[number, 4], lists[number, 5], low | (high << _WORD_BITS), 0)
            if code != 0 and known < width and not _is_there(categories, line, column, known, code):
                categories[line, column + known] = code
                known += 1
        for place in range(known, width):
            categories[line, column + place] = 0


DECODING = types.NamedTuple(
    [
        types.int64,
        written(types.int64, 2),
        written(types.float32, 2),
        written(types.int64, 2),
        written(types.uint64, 2),
    ],
    Decoding,
)


@kernel(
    types.int64(
        read(types.uint32, 2, "C"),
        DECODING,
        written(types.float32, 2),
        written(types.int32, 2),
        read(types.int64, 1),
        written(types.boolean, 1),
    )
)
def write_rows(
    rows: Array,
    decoding: Decoding,
    numeric: Float32Array,
    categories: Int32Array,
    at: Int64Array,
    decoded: Array,
) -> int:
    """Row i of rows (m, words) uint32 into line at[i] of numeric and categories; decoded[i] says whether it was.

    Returns -1, or the first i whose line there is not; then nothing is written.
    """
    for number in range(at.shape[0]):
        if at[number] < 0 or at[number] >= numeric.shape[0]:
            return number
    mark, runs, scales, lists, table = decoding
    raws = rows.view(np.float32)
    for number in range(at.shape[0]):
        decoded[number] = rows[number, 0] == mark
        if decoded[number]:
            write_numbers(raws, number, runs, scales, numeric, at[number])
            write_codes(rows, number, lists, table, categories, at[number])
    return -1
