"""Questions over all that waits, each one loop over its columns, compiled by numba.

In place of a dozen vector operations, each of which costs as much to begin as to do for a thousand requests.

In: columns of `waiting.py`. Out: numbers. Times are in seconds, work in milliseconds.
"""

from __future__ import annotations

from rankd.machine_code import kernel, read, types, written
from rankd.types import Array, Int64Array


@kernel(
    types.UniTuple(types.float64, 4)(
        read(types.int64, 1),
        read(types.float64, 1),
        read(types.float64, 1),
        read(types.int64, 1),
        read(types.float64, 1),
        types.float64,
        types.float64,
        types.float64,
    )
)
def backlog(
    order: Int64Array,
    places: Array,
    left_ms: Array,
    rows: Int64Array,
    deadline: Array,
    place: float,
    factor: float,
    now: float,
) -> tuple[float, float, float, float]:
    """What a request at `place` finds: all work that is left and all candidates that wait; the work, times `factor`,
    of those that come before it; and the least time that any of those behind it has to spare, in milliseconds, of those
    that have some (inf: nobody)."""
    done_ms, candidates, ahead_ms, spare_ms = 0.0, 0, 0.0, float("inf")
    for rank in range(order.shape[0]):
        slot = order[rank]
        done_ms += left_ms[slot]
        candidates += rows[slot]
        if places[rank] <= place:
            ahead_ms = done_ms
        else:
            spare = (deadline[slot] - now) * 1e3 - done_ms * factor
            if 0.0 <= spare < spare_ms:
                spare_ms = spare
    return done_ms, float(candidates), ahead_ms * factor, spare_ms


@kernel(
    types.int64(
        read(types.float64, 1),
        read(types.float64, 1),
        read(types.float64, 1),
        types.float64,
        written(types.int64, 1),
    )
)
def passed(deadline: Array, latest: Array, turn: Array, now: float, into: Int64Array) -> int:
    """Write the slots whose deadline is over, or that nobody works on and that would have had to begin by now; returns
    how many there are. Slots of nobody have deadlines at infinity."""
    count = 0
    for slot in range(deadline.shape[0]):
        if deadline[slot] <= now or (latest[slot] < now and turn[slot] < float("inf")):
            into[count] = slot
            count += 1
    return count
