"""A seat: an executor, the thread that works with it, and what it is working on. In and out: `scheduler.py`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from rankd.observe.schedule_metrics import KindCounts, KindFigures
from rankd.schedule.core_sharing import Cores
from rankd.schedule.kinds import Standing
from rankd.schedule.ledger import Work
from rankd.schedule.policy import Rules
from rankd.schedule.waiting import NEVER

Item = TypeVar("Item")
Executor = TypeVar("Executor")
PREDICTED_TIMES = 20.0
"""A call hangs when it takes so many times what was predicted, and `hang_seconds` at least."""


@dataclass(slots=True, eq=False)
class Seat(Generic[Item, Executor]):
    """`work` since `since` (seconds). A `lost` one has been given up: its thread ends when it comes back, if ever. That
    of a `failing` one has come back, and hands over what it had. `kind` is the place of its executor's kind among the
    rules."""

    number: int
    executor: Executor
    kind: int = 0
    thread: threading.Thread | None = None
    work: Work[Item] | None = None
    since: float = NEVER
    lost: bool = False
    failing: bool = False

    def coming_back(self) -> threading.Thread | None:
        """Its thread, if that still has something to hand over, and will unless it is found to hang."""
        waited_for = not self.lost or self.failing
        return self.thread if waited_for and self.thread is not None and self.thread.is_alive() else None

    def given_up(self) -> bool:
        """Whether another seat has taken its place; it may at any moment."""
        return self.lost

    def hangs(self, now: float, hang_seconds: float) -> bool:
        """Whether its call takes much longer than it should."""
        if self.work is None or self.lost:
            return False
        return now - self.since > max(hang_seconds, PREDICTED_TIMES * self.work.predicted_ms / 1e3)


def seats_of(executors: Sequence[Executor], kinds: Sequence[Rules]) -> list[Seat[Any, Executor]]:
    """Seats for executors, those of the first kind first, as many of each as its rules are for."""
    numbers = [kind for kind, rules in enumerate(kinds) for _ in range(rules.num_executors)]
    return [
        Seat(number, executor, kind) for number, (executor, kind) in enumerate(zip(executors, numbers, strict=True))
    ]


def kind_figures(kinds: Sequence[Rules], counts: Sequence[KindCounts]) -> tuple[KindFigures, ...]:
    """A snapshot of each kind: what its executors did, and how good predictions are."""
    return tuple(
        KindFigures(
            rules.name,
            rules.num_executors,
            replace(one),
            rules.costs.errors(),
            rules.costs.speed.most(rules.num_executors),
            rules.speed,
        )
        for rules, one in zip(kinds, counts, strict=True)
    )


def standings(seats: Sequence[Seat[Any, Any]], kinds: int, cores: Cores) -> list[Standing]:
    """How each of so many kinds stands; executors that are being replaced count for nothing."""
    idle, busy_until = [0] * kinds, list[list[float]]([] for _ in range(kinds))
    for seat in seats:
        if seat.lost:
            continue
        if seat.work is None:
            idle[seat.kind] += 1
        else:
            busy_until[seat.kind].append(seat.since + seat.work.predicted_ms / 1e3)
    return [
        Standing(one, tuple(until), cores.busy(kind) - len(until))
        for kind, (one, until) in enumerate(zip(idle, busy_until, strict=True))
    ]
