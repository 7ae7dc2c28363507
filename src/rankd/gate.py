"""Waiting for several Futures without a thread: a gate opens when all have come, or when its time is over.

A gate calls what is behind it exactly once, from the thread that brought the last Future, from the alarm's, or at once.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any, Protocol

log = logging.getLogger("rankd")


class Due(Protocol):
    """What an alarm calls."""

    def call(self) -> None:
        """Its moment has come."""
        ...

    def over(self) -> bool:
        """Whether it needs no call any more."""
        ...


class Alarm:
    """One thread that calls what is due. `start()` is implied by the first `at`; `close()` calls nothing more.

    What is over before its moment is dropped without a call when the thread looks next, so that it does not wake for
    each of thousands of requests that were answered in time.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._due: list[tuple[float, int, Due]] = []
        self._numbers = count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def at(self, moment: float, due: Due) -> None:
        """Call at a moment of the clock, in seconds; what is called has to be quick."""
        with self._changed:
            heapq.heappush(self._due, (moment, next(self._numbers), due))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="rankd-alarm", daemon=True)
                self._thread.start()
            elif self._due[0][0] == moment:
                self._changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._due or self._due[0][0] > self._clock()):
                    if self._due and self._due[0][2].over():
                        heapq.heappop(self._due)
                    else:
                        self._changed.wait(max(self._due[0][0] - self._clock(), 0.0) if self._due else None)
                if self._closed:
                    return
                _, _, due = heapq.heappop(self._due)
            try:
                due.call()
            except Exception:  # one that fails must not silence all that come after it
                log.exception("a request could not be woken")


class Gate:
    """Calls `then` once: when all Futures are done, at `until` (seconds of the alarm's clock), or now if nothing is
    waited for. A Future that fails counts as done."""

    def __init__(
        self, futures: Sequence[Future[Any]], until: float | None, alarm: Alarm, then: Callable[[], None]
    ) -> None:
        self._then = then
        self._left = len(futures)
        self._open = False
        self._lock = threading.Lock()
        if not futures:
            self.call()
            return
        for future in futures:
            future.add_done_callback(self._came)
        if until is not None and not self._open:
            alarm.at(until, self)

    def _came(self, _: Future[Any]) -> None:
        with self._lock:
            self._left -= 1
            left = self._left
        if left == 0:
            self.call()

    def call(self) -> None:
        """Open."""
        with self._lock:
            first, self._open = not self._open, True
        if first:
            self._then()

    def over(self) -> bool:
        """Whether it is open."""
        return self._open
