"""Stage clocks: how long each stage of one request took, in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Lap(NamedTuple):
    """What was booked to a stage at once; seconds of the clock."""

    stage: str
    begin: float
    end: float


class StageClock:
    """Started when a request is; `lap(stage)` books the time since the lap before to a stage. With `keep_laps` each lap
    is kept in `laps` too.

    >>> clock = StageClock(); ...; clock.lap("features"); ...; clock.lap("encode"); clock.timings_ms()
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter, keep_laps: bool = False) -> None:
        self._now = now
        self.started = self._last = now()
        self._laps: dict[str, float] = {}
        self._kept = list[Lap]() if keep_laps else None

    @property
    def laps(self) -> tuple[Lap, ...]:
        """All laps so far, in their order; none if they are not kept."""
        return tuple(self._kept or ())

    def lap(self, stage: str) -> None:
        """Book the time since the last lap to `stage`."""
        now = self._now()
        self._laps[stage] = self._laps.get(stage, 0.0) + (now - self._last) * 1e3
        if self._kept is not None:
            self._kept.append(Lap(stage, self._last, now))
        self._last = now

    def timings_ms(self) -> dict[str, float]:
        """Milliseconds of each stage, and their `total`."""
        return {**self._laps, "total": (self._last - self.started) * 1e3}
