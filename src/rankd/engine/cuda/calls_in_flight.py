"""How many calls an executor's streams have under way, and how much executors get done at once: measured at the start
of `CudaBackend`.

In: calls a second with 1, 2, ... executors at work. Out: k, and the curve of speed that the schedule goes by
(`schedule/shared_speed.py`). While one call is computed the next one is sent and the one before comes back; more than
pays for that only makes each of them wait longer. Two groups of streams, k at most 3:

    at work                    1      2      3      4
    calls a second, k      100    150    152               k = 2: a third call brings 1%
    both groups            100    150    160    158
    speed                  1.0    1.5    1.6    1.6        never less than with fewer: one may be left idle
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

WORTH = 1.05
"""By how much more calls a second have to be for one call more under way."""
SECONDS = 0.2


def choose(rates: Sequence[float]) -> int:
    """k of calls a second with 1, 2, ... under way: the next one up as long as each step is worth it.

    >>> choose([100.0, 150.0, 152.0]), choose([100.0, 101.0, 180.0])
    (2, 1)
    """
    chosen = 1
    while chosen < len(rates) and rates[chosen] >= WORTH * rates[chosen - 1]:
        chosen += 1
    return chosen


def speeds(rates: Sequence[float]) -> tuple[float, ...]:
    """`Backend.speed` of calls a second with 1, 2, ... executors at work. n that were measured to get more than n times
    as much done, or less than fewer do, are noise.

    >>> speeds([100.0, 210.0, 190.0])
    (1.0, 2.0, 2.0)
    """
    curve: list[float] = []
    for number, one in enumerate(rates, 1):
        curve.append(max(min(one / rates[0], float(number)), curve[-1] if curve else 1.0))
    return tuple(curve)


def described(in_flight: int, rates: Sequence[float], curve: Sequence[float]) -> str:
    """What was measured, for the log."""
    table = ", ".join(f"{n}: {rate:.0f} ({one:.2f})" for n, (rate, one) in enumerate(zip(rates, curve, strict=True), 1))
    return (
        f"{in_flight} calls in flight for each executor's streams; calls a second with the longest list, by executors "
        f"at work (of one alone): {table}"
    )


def rate(
    calls: Sequence[Callable[[], object]], seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Calls a second, each of `calls` again and again on a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as threads:
        begun = clock()
        made = list(threads.map(lambda call: repeated(call, begun + seconds, clock), calls))
        return sum(made) / (clock() - begun)


def repeated(call: Callable[[], object], end: float, clock: Callable[[], float]) -> int:
    """How often a call was done until a moment; at least once."""
    count = 0
    while count == 0 or clock() < end:
        call()
        count += 1
    return count
