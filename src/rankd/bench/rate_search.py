"""The highest rate at which a server still keeps a promise, found with few probes. No clock, no sockets."""

from __future__ import annotations

from collections.abc import Callable

STEP = 1.25
"""From probe to probe until one keeps the promise and one does not; later probes halve what is between the two."""


def highest_rate(keeps: Callable[[float], bool], guess: float, probes: int) -> float:
    """The highest rate tried that `keeps` the promise, by at most `probes` probes that begin at `guess`.

    If none does, the lowest one that was tried: the truth is below it.

    >>> highest_rate(lambda rate: rate <= 130, 100, 5)  # 100, 125, 156, 140, 132
    125.0
    """
    good, bad = 0.0, float("inf")
    rate = guess
    for _ in range(probes):
        if keeps(rate):
            good = rate
        else:
            bad = rate
        if bad == float("inf"):
            rate = good * STEP
        elif good == 0.0:
            rate = bad / STEP
        else:
            rate = (good * bad) ** 0.5
    return good or bad
