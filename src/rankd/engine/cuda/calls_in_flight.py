"""How many calls an executor's streams have under way, chosen by what was measured: `CudaBackend` asks at its start.

In: executors that share their streams, and a call. Out: k. While one call is computed the next one is sent and the one
before comes back; more than pays for that only makes each of them wait longer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rankd.engine.backend import MOST_IN_FLIGHT

log = logging.getLogger("rankd")
WORTH = 1.05
"""By how much more calls a second have to be for one call more under way."""
SECONDS = 0.1


def choose(rates: Mapping[int, float]) -> int:
    """k of calls a second by k: the next one up as long as each step is worth it.

    >>> choose({1: 100.0, 2: 150.0, 3: 152.0}), choose({1: 100.0, 2: 101.0, 3: 180.0})
    (2, 1)
    """
    chosen = 1
    while chosen + 1 in rates and rates[chosen + 1] >= WORTH * rates[chosen]:
        chosen += 1
    return chosen


def measured(
    calls: Sequence[Callable[[], object]],
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """k of at most as many calls as there are, each of them of an executor of its own, which has run it before."""
    most = min(len(calls), MOST_IN_FLIGHT)
    rates = {number: rate(calls[:number], seconds, clock) for number in range(1, most + 1)}
    chosen = choose(rates)
    said = ", ".join(f"{number}: {rate:.0f}" for number, rate in rates.items())
    log.info("%d calls in flight for each executor; calls a second, with the longest list, by k: %s", chosen, said)
    return chosen


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
