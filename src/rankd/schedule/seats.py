"""A seat: an executor, the thread that works with it, and what it is working on. In and out: `scheduler.py`."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Generic, TypeVar

from rankd.schedule.ledger import Work
from rankd.schedule.waiting import NEVER

Item = TypeVar("Item")
Executor = TypeVar("Executor")
PREDICTED_TIMES = 20.0
"""A call hangs when it takes so many times what was predicted, and `hang_seconds` at least."""


@dataclass(slots=True, eq=False)
class Seat(Generic[Item, Executor]):
    """`work` since `since` (seconds). A `lost` one has been given up: its thread ends when it comes back, if ever."""

    number: int
    executor: Executor
    thread: threading.Thread | None = None
    work: Work[Item] | None = None
    since: float = NEVER
    lost: bool = False

    def given_up(self) -> bool:
        """Whether another seat has taken its place; it may at any moment."""
        return self.lost

    def hangs(self, now: float, hang_seconds: float) -> bool:
        """Whether its call takes much longer than it should."""
        if self.work is None or self.lost:
            return False
        return now - self.since > max(hang_seconds, PREDICTED_TIMES * self.work.predicted_ms / 1e3)
