"""The loops of assembly over candidates, compiled by numba: rows gathered from tables, and the match features.

In: arrays. Out: what the caller's views hold afterwards. Importing this file imports numba and compiles what follows,
or reads the machine code that an earlier process kept: `matching.py` does so when it is first needed, or at warm-up.

The items of a history are found in an open hash table, whose size follows the history and not the number of items: 16
KiB of slots for 1,000 events stay in the L1 cache, where one weight for each of 1,000,000 items (4 MB) does not, and
nothing has to be sorted. Worked example, history 7 3 7 at the seconds 10, 20, 30 in 16 slots:

    slots    7 in slot 4 -> place 0, 3 in slot 13 -> place 1, all others 0 (row 0 pads, so it marks a free slot)
    seen     place 0: count 2, first 10, last 30; place 1: count 1, first 20, last 20
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rankd.features.schema import FIRST_ITEM_ROW, PADDING_ROW
from rankd.machine_code import from_dtype, kernel, part, prefetch, read, types, written
from rankd.types import Array, Float32Array, Int32Array, Int64Array

ORDER = ("seen", "count", "recency", "cadence", "affinity", "recent_affinity", "events", "idle")
"""The match features as `columns` counts them; the code below counts on this order."""
SECONDS_A_DAY = 86_400.0
RECENT_DAYS = 30.0
SLOTS_A_PLACE = 4
"""A quarter of the slots is taken at most, so that a row that was never seen is known by 1.4 looks on average."""
AHEAD = 8
"""Rows of a table are asked for this many candidates before they are read: random rows of a large table are what
assembly waits for. 512 candidates, 1,000,000 items: 95 us instead of 177 (32 neighbours each), 10 us instead of 27 (6
columns); 4 to 32 measure the same."""
SEEN = np.dtype([("count", np.int64), ("first", np.int64), ("last", np.int64), ("weight", np.float64)])
"""A distinct item of a history: its events, the seconds of the first and the last of them, and exp(-days / 30) since
the last, or -1 while nobody has asked for it."""

_SEEN = from_dtype(SEEN)
_LINE = 64 // 4  # 32-bit numbers of a cache line
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / the golden ratio, whose multiples lie apart in their upper bits
_HIGH = np.uint64(40)
_IN_HISTORY, _COUNT, _RECENCY, _CADENCE, _AFFINITY, _RECENT, _EVENTS, _IDLE = range(len(ORDER))


@part
def _ask_for(table: Array, rows: Int32Array, number: int) -> None:
    """Prefetch the row of candidate `number`, if there is one."""
    if number < rows.shape[0]:
        for column in range(0, table.shape[1], _LINE):
            prefetch(table, rows[number], column)
        prefetch(table, rows[number], table.shape[1] - 1)  # a row need not begin with a cache line


@part
def _slot_of(slots: Int32Array, row: int) -> int:
    """The slot of a row, or the free one in which it would be put."""
    last: int = slots.shape[1] - 1
    slot = int(np.int64((np.uint64(row) * _SPREAD) >> _HIGH)) & last
    while slots[0, slot] != PADDING_ROW and slots[0, slot] != row:
        slot = (slot + 1) & last
    return slot


@part
def _days(now: int, then: int) -> float:
    """Float32 as in training, none below 0."""
    return float(np.float32(max((now - then) / SECONDS_A_DAY, 0.0)))


@kernel(
    types.int64(
        read(types.int32, 1),
        read(types.int32, 1),
        read(types.int64, 1),
        read(types.boolean, 1),
        written(types.int32, 2),
        written(_SEEN, 1),
    )
)
def note_seen(
    rows: Int32Array, events: Int32Array, times: Int64Array, wanted: Array, slots: Int32Array, seen: Array
) -> int:
    """Put the distinct items of a history (n,) into `slots` and `seen`; returns how many they are.

    Args:
        wanted: (event types,) bool, which of them match.
        slots: (2, a power of two above n) int32: the row in a slot, and its place in `seen`.
        seen: (n or more,) of SEEN.
    """
    slots[0, :] = PADDING_ROW
    places = 0
    for number in range(rows.shape[0]):
        row, event = rows[number], events[number]
        if row < FIRST_ITEM_ROW or event < 0 or event >= wanted.shape[0] or not wanted[event]:
            continue
        slot = _slot_of(slots, row)
        if slots[0, slot] == PADDING_ROW:
            slots[0, slot], slots[1, slot] = row, places
            seen[places].count, seen[places].first, seen[places].weight = 0, times[number], -1.0
            places += 1
        place = slots[1, slot]
        seen[place].count += 1
        seen[place].last = times[number]
    return places


@part
def _write_own(item: Any, now: int, columns: Int64Array, line: Float32Array) -> None:
    """The columns of a candidate that is in the history."""
    days = _days(now, item.last)
    if columns[_IN_HISTORY] >= 0:
        line[columns[_IN_HISTORY]] = 1.0
    if columns[_COUNT] >= 0:
        line[columns[_COUNT]] = math.log1p(item.count)
    if columns[_RECENCY] >= 0:
        line[columns[_RECENCY]] = math.log1p(days)
    if columns[_CADENCE] >= 0 and item.count > 1:
        gap = (_days(now, item.first) - days) / (item.count - 1)
        line[columns[_CADENCE]] = math.log1p(days / max(gap, 1.0))


@part
def _affinities(
    neighbours: Int32Array, similarities: Float32Array, row: int, slots: Int32Array, seen: Array, now: int
) -> tuple[float, float]:
    """The sums of a row's similarities to what was seen: each as it is, and by how recent it was seen."""
    plain = recent = 0.0
    for number in range(neighbours.shape[1]):
        near = neighbours[row, number]
        slot = _slot_of(slots, near)
        if slots[0, slot] == PADDING_ROW:
            continue
        item = seen[slots[1, slot]]
        if item.weight < 0.0:
            item.weight = math.exp(-_days(now, item.last) / RECENT_DAYS)
        plain += similarities[row, number]
        recent += similarities[row, number] * item.weight
    return plain, recent


@kernel(
    types.void(
        read(types.int32, 1),
        read(types.int32, 2),
        read(types.float32, 2),
        written(types.int32, 2),
        written(_SEEN, 1),
        types.int64,
        read(types.int64, 1),
        written(types.float32, 2, "A"),
    )
)
def write_matches(
    candidates: Int32Array,
    neighbours: Int32Array,
    similarities: Float32Array,
    slots: Int32Array,
    seen: Array,
    now: int,
    columns: Int64Array,
    out: Float32Array,
) -> None:
    """The match features of candidate rows (C,) at second `now` into (C, M), after `note_seen`.

    Args:
        seen: the distinct items alone, (u,) of SEEN.
        columns: (8,) int64 in the order of ORDER, the column of each match feature in `out`; -1: it is not wanted.
        out: (C, M) float32 of any strides.

    Raises:
        IndexError: a candidate row that the tables do not have.
    """
    events, idle = 0, float(np.float32(np.inf))
    for place in range(seen.shape[0]):
        events += seen[place].count
        idle = min(idle, _days(now, seen[place].last))
    of_events, of_idle = math.log1p(events), math.log1p(idle) if events else 0.0
    for number in range(AHEAD):
        _ask_for(neighbours, candidates, number)
    for number in range(candidates.shape[0]):
        _ask_for(neighbours, candidates, number + AHEAD)
        row, line = candidates[number], out[number]
        if row < 0 or row >= neighbours.shape[0]:
            raise IndexError("a candidate row is outside the item table")
        line[:] = 0.0
        if columns[_EVENTS] >= 0:
            line[columns[_EVENTS]] = of_events
        if columns[_IDLE] >= 0:
            line[columns[_IDLE]] = of_idle
        slot = _slot_of(slots, row)
        if slots[0, slot] != PADDING_ROW:
            _write_own(seen[slots[1, slot]], now, columns, line)
        if columns[_AFFINITY] >= 0 or columns[_RECENT] >= 0:
            plain, recent = _affinities(neighbours, similarities, row, slots, seen, now)
            if columns[_AFFINITY] >= 0:
                line[columns[_AFFINITY]] = math.log1p(plain)
            if columns[_RECENT] >= 0:
                line[columns[_RECENT]] = math.log1p(recent)


@kernel(
    types.void(read(types.int32, 2), read(types.int32, 1), written(types.int32, 2, "A")),
    types.void(read(types.float32, 2), read(types.int32, 1), written(types.float32, 2, "A")),
)
def gather_rows(table: Array, rows: Int32Array, out: Array) -> None:
    """Rows (n,) of a table (I, F) into (n, F) of any strides, of the same type.

    Raises:
        IndexError: a row that the table does not have.
    """
    for number in range(AHEAD):
        _ask_for(table, rows, number)
    for number in range(rows.shape[0]):
        _ask_for(table, rows, number + AHEAD)
        row = rows[number]
        if row < 0 or row >= table.shape[0]:
            raise IndexError("a row is outside the item table")
        for column in range(table.shape[1]):
            out[number, column] = table[row, column]
