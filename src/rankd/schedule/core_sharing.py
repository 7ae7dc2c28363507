"""Schedules that share cores: each has executors of its own for all of them, but together they run no more calls than
there are cores, and the next core goes to the schedule whose first request stands first.

In and out: `scheduler.py`. Places are moments of one clock (`policy.place`), so requests of several schedules have one
order. A schedule by itself has cores of its own, as many as it has executors, and waits for nobody.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

from rankd.schedule.waiting import NEVER, Waiting


@dataclass(slots=True, eq=False)
class Sharer:
    """One schedule: its requests, how many executors it has and how many of them are idle, and whom to tell when one of
    them may have something to do. Where they are of several `kinds`, all are told: what the one leaves to others is for
    them. `speed` is what all of them get done, in units of one alone; 0: they are independent."""

    waiting: Waiting
    num_executors: int
    changed: threading.Condition
    idle: int = 0
    kinds: int = 1
    speed: float = 0.0

    def tell(self) -> None:
        """Under the lock: there may be something to do for an executor that is idle."""
        if self.kinds == 1:
            self.changed.notify()
        else:
            self.changed.notify_all()

    def first(self, beside: int = 0) -> float:
        """The place of its first request that can run, if somebody is there to run it, `beside` so many that are idle
        no longer; else NEVER."""
        if self.idle <= beside or not self.waiting.runnable:
            return NEVER
        return float(self.waiting.turn[: self.waiting.size].min())


class Cores:
    """Cores for one schedule or several: as many as the largest of them has executors. `lock` guards all of this and
    all of the schedules."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._sharers: tuple[Sharer, ...] = ()  # replaced as a whole, so that `count` needs no lock
        self._taken = dict[object, int]()
        self._busy = Counter[int]()

    @property
    def count(self) -> int:
        """How many calls run at once; with the lock or without."""
        return max((one.num_executors for one in self._sharers), default=1)

    @property
    def speed(self) -> float:
        """How much all cores get done, in units of one alone: as much as there are, or less, where what they are is
        executors that share a device. With the lock or without."""
        return max((one.speed or float(one.num_executors) for one in self._sharers), default=1.0)

    def busy(self, kind: int = 0) -> int:
        """How many executors of a kind have a call under way, whosever they are; with the lock or without."""
        return self._busy[kind]

    def join(self, sharer: Sharer) -> None:
        """Under the lock: one more schedule."""
        self._sharers = (*self._sharers, sharer)

    def leave(self, sharer: Sharer) -> None:
        """Under the lock: a schedule is closed."""
        self._sharers = tuple(one for one in self._sharers if one is not sharer)
        self._tell()

    def waitings(self) -> list[Waiting]:
        """Under the lock: the requests of all schedules, each by itself."""
        return [one.waiting for one in self._sharers]

    def waiting_ms(self) -> float:
        """Predicted work of all schedules that is not done, as the milliseconds that all cores take for it."""
        with self.lock:
            return sum(one.waiting.total_ms() for one in self._sharers) / self.speed

    def idle_for(self, sharer: Sharer) -> int:
        """Under the lock: how many executors a schedule may reckon with for its next call; 0 if it has to wait, since
        no core is free, or it is another one's turn, which is told so. While others have something to run it is 1: then
        nothing is spread."""
        free = self.count - len(self._taken)
        if free <= 0:
            return 0
        others = [one for one in self._sharers if one is not sharer and one.first() < NEVER]
        if not others:
            return min(sharer.idle, free)
        first = min(others, key=Sharer.first)
        if first.first() < sharer.first():
            first.tell()
            return 0
        return 1

    def take(self, seat: object, sharer: Sharer, kind: int = 0) -> None:
        """Under the lock: a seat of a schedule, which counts as idle until now, has a call to run and a core for it.
        `kind` is that of its executor."""
        self._taken[seat] = kind
        self._busy[kind] += 1
        self._tell(sharer)

    def give_back(self, seat: object) -> None:
        """Under the lock: its call is over, or it was given up; if it has a core, others may have it."""
        if seat in self._taken:
            self._busy[self._taken.pop(seat)] -= 1
            self._tell()

    def _tell(self, taking: Sharer | None = None) -> None:
        """Tell whose turn it is, if a core is free; a schedule by itself knows without that. One that has just taken a
        core has one idle executor less than it says."""
        if len(self._sharers) > 1 and len(self._taken) < self.count:
            places = [one.first(int(one is taking)) for one in self._sharers]
            if min(places) < NEVER:
                self._sharers[places.index(min(places))].tell()
