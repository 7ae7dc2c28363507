"""Made-up time, and the cores that tasks run on in it: more tasks than cores get equal shares of them, as an operating
system gives them to threads (processor sharing).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

Happens = Callable[[float], None]
"""Is told when it happens, in us."""


class Events:
    """What happens when, in the order of time, and of asking where times are equal."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Happens]] = []
        self._numbers = count()

    def at(self, moment: float, happens: Happens) -> None:
        """Let something happen."""
        heapq.heappush(self._waiting, (moment, next(self._numbers), happens))

    def run(self) -> float:
        """Until nothing is left; returns the moment of the last event."""
        now = 0.0
        while self._waiting:
            now, _, happens = heapq.heappop(self._waiting)
            happens(now)
        return now


class SharedCores:
    """`cores` for all tasks that run: each has one if they are enough, else an equal share of them.

    All running tasks advance at one speed, so the next to end is the one that was to be given the least when it began,
    counted from `_given`: what a task that runs since the start would have been given.
    """

    def __init__(self, events: Events, cores: int) -> None:
        self._events, self._cores = events, cores
        self._running: list[tuple[float, int, Happens]] = []
        self._numbers = count()
        self._given = self._last = 0.0
        self._expected = 0

    def run(self, takes_us: float, ends: Happens, now: float) -> None:
        """Begin a task."""
        self._advance(now)
        heapq.heappush(self._running, (self._given + takes_us, next(self._numbers), ends))
        self._expect()

    @property
    def _speed(self) -> float:
        return min(1.0, self._cores / len(self._running))

    def _advance(self, now: float) -> None:
        if self._running:
            self._given += (now - self._last) * self._speed
        self._last = now

    def _expect(self) -> None:
        """Let the next end happen; one that was expected before counts no more."""
        self._expected += 1
        if self._running:
            left = max(self._running[0][0] - self._given, 0.0)
            self._events.at(self._last + left / self._speed, self._end(self._expected))

    def _end(self, expected: int) -> Happens:
        def end(now: float) -> None:
            if expected != self._expected:
                return
            self._advance(now)
            self._given, _, ends = heapq.heappop(self._running)
            self._expect()
            ends(now)

        return end
