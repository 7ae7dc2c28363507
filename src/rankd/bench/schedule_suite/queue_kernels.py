"""Two queues with a threshold between them, first come first served, in one loop over all arrivals: a sweep has a
thousand of them. In: arrivals as columns. Out: when each is answered."""

from __future__ import annotations

from rankd.machine_code import kernel, read, types, written
from rankd.types import Array, Int64Array


@kernel(
    types.void(
        read(types.float64, 1),
        read(types.int64, 1),
        read(types.float64, 2),
        types.int64,
        types.int64,
        written(types.float64, 2),
        written(types.float64, 1),
    )
)
def threshold_latencies(
    at: Array, rows: Int64Array, takes_s: Array, threshold: int, small: int, free: Array, into: Array
) -> None:
    """Write the seconds that each request takes from its arrival `at` on: those of up to `threshold` rows on the kind
    `small` (0 or 1), the others on the other one. `takes_s` (2, N) is what each takes on each kind, `free` (2, E) when
    its executors are free: infinity for those that there are not."""
    for number in range(at.shape[0]):
        kind = small if rows[number] <= threshold else 1 - small
        line, first = free[kind], 0
        for one in range(1, line.shape[0]):
            if line[one] < line[first]:
                first = one
        line[first] = max(line[first], at[number]) + takes_s[kind, number]
        into[number] = line[first] - at[number]
