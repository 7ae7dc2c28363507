"""How many users one call should serve, and what calls take: measured once at warm-up, then a table.

A call for few candidates reads all weights for little work; a call for several users reads them once. What that
is worth depends on the machine, the model and the number of candidates, so it is measured: the milliseconds of scoring
1, 2, 4, ... users of each candidate bucket. More users share a call only while each doubling makes a user at least GAIN
cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

GAIN = 0.1
"""A user's share of a call has to fall by this much: less is noise, and costs the first user the wait for the last."""
SIZES = (1, 2, 4, 8)


class Packing:
    """The number of users a call may serve, by candidate bucket."""

    def __init__(self, most: Mapping[int, int] | None = None, call_ms: Mapping[tuple[int, int], float] | None = None):
        self._most = dict(most or {})
        self.call_ms = dict(call_ms or {})
        """Of what was measured, by (bucket, users)."""

    def most(self, bucket: int) -> int:
        """Users in one call of a candidate bucket, at most."""
        return self._most.get(bucket, 1)

    def sizes(self, bucket: int) -> tuple[int, ...]:
        """The numbers of users that calls of this bucket are made of: they are warmed, others are not used."""
        return tuple(size for size in SIZES if size <= self.most(bucket))

    def fits(self, bucket: int, count: int) -> int:
        """Of `count` waiting users the number that the next call takes."""
        return max(size for size in self.sizes(bucket) if size <= max(count, 1))


def measure(bucket_ms: Callable[[int, int], float], buckets: tuple[int, ...]) -> Packing:
    """Find how many users pay. `bucket_ms(bucket, users)` measures one call in milliseconds."""
    most, call_ms = {}, {}
    for bucket in buckets:
        best, cost = 1, bucket_ms(bucket, 1)
        call_ms[bucket, 1] = cost
        for size in SIZES[1:]:
            call_ms[bucket, size] = bucket_ms(bucket, size)
            each = call_ms[bucket, size] / size
            if each > (1.0 - GAIN) * cost:
                break
            best, cost = size, each
        most[bucket] = best
    return Packing(most, call_ms)
