"""The requests that a model has accepted and not answered, as columns: a slot each, so that a decision over a thousand
of them is a few vector operations.

In: what is known of a request. Out: the columns that `policy.py` and `admission.py` read. Times are seconds of the
schedule's clock, work is in milliseconds. Not thread-safe: the scheduler's lock guards it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rankd.schedule import waiting_kernels
from rankd.types import Array, Int64Array

NEVER = math.inf
FIRST_CAPACITY = 64


class Backlog(NamedTuple):
    """What a newcomer finds: all predicted work and candidates that wait; the work of those that come before it; and
    the least time, in milliseconds, that any of those behind it has to spare, of those that have some (inf: nobody)."""

    work_ms: float
    rows: int
    ahead_ms: float
    spare_ms: float


class Waiting:
    """Columns over slots 0..size - 1; a free slot has `turn` and `place` NEVER and nothing left.

    turn      the place in the order, of those that an executor may be given now; NEVER for all others (not ready, or
              all that is left of them is being run)
    place     the place in the order, whether it can run now or not: the smallest comes first (`policy.place`)
    deadline  when the answer has to be there; NEVER if nobody says
    latest    when what nobody works on has to begin to be in time
    left_ms   predicted work that is not finished
    rows      candidates that no executor has been given yet
    tail      the bucket of the rest if that may share a call: one piece, of a user who is prepared or resident; else 0.
              `tails` has the column of each kind of executors, which cut lists each in its way; `tail` is the first's
    prepared  the state is there
    resident  (before it is prepared) it is in memory, so that preparing it is quick
    failed_on the kind of executors of which one was lost over it, counted from 1; 0: none was

    `order` and `places` are the slots that are taken, and their places, in the order of these: kept so, since sorting
    a thousand of them for each newcomer is a quarter of all that the schedule does for it.
    """

    def __init__(self, capacity: int = FIRST_CAPACITY, kinds: int = 1) -> None:
        self.size = 0
        self.count = 0
        self.runnable = 0
        """Slots that an executor may be given now."""
        self._free: list[int] = []
        self.turn = np.full(capacity, NEVER)
        self.place = np.full(capacity, NEVER)
        self.deadline = np.full(capacity, NEVER)
        self.latest = np.full(capacity, NEVER)
        self.left_ms = np.zeros(capacity)
        self.rows = np.zeros(capacity, np.int64)
        self.tails = [np.zeros(capacity, np.int64) for _ in range(kinds)]
        self.prepared = np.zeros(capacity, bool)
        self.resident = np.zeros(capacity, bool)
        self.failed_on = np.zeros(capacity, np.int64)
        self._order = np.zeros(capacity, np.int64)
        self._places = np.full(capacity, NEVER)
        self._found = np.zeros(capacity, np.int64)

    @property
    def tail(self) -> Int64Array:
        """Of the first kind of executors, which often is the only one."""
        return self.tails[0]

    @property
    def order(self) -> Int64Array:
        """(count,) slots by place; of equal places the one that came first is first. A view."""
        return self._order[: self.count]

    @property
    def places(self) -> Array:
        """(count,) ascending. A view."""
        return self._places[: self.count]

    def add(self, place: float, deadline: float, latest: float, left_ms: float, rows: int, resident: bool) -> int:
        """A slot for a request that cannot run yet."""
        slot = self._take()
        self.place[slot], self.deadline[slot], self.latest[slot] = place, deadline, latest
        self.left_ms[slot], self.rows[slot], self.resident[slot] = left_ms, rows, resident
        rank, count = int(self.places.searchsorted(place, side="right")), self.count
        for column, value in ((self._order, slot), (self._places, place)):
            column[rank + 1 : count + 1] = column[rank:count]
            column[rank] = value
        self.count += 1
        return slot

    def remove(self, slot: int) -> None:
        """Free a slot."""
        rank, count = int(self.places.searchsorted(self.place[slot], side="left")), self.count
        while self._order[rank] != slot:
            rank += 1
        for column in (self._order, self._places):
            column[rank : count - 1] = column[rank + 1 : count]
        self.hold(slot)
        self.place[slot] = self.deadline[slot] = self.latest[slot] = NEVER
        self.left_ms[slot] = 0.0
        self.rows[slot] = self.failed_on[slot] = 0
        self.no_tail(slot)
        self.prepared[slot] = self.resident[slot] = False
        self._free.append(slot)
        self.count -= 1

    def no_tail(self, slot: int) -> None:
        """Nobody shares a call with it."""
        for tail in self.tails:
            tail[slot] = 0

    def let_run(self, slot: int) -> None:
        """An executor may be given it, when it is its turn."""
        self.runnable += int(self.turn[slot] == NEVER)
        self.turn[slot] = self.place[slot]

    def hold(self, slot: int) -> None:
        """No executor may be given it now."""
        self.runnable -= int(self.turn[slot] != NEVER)
        self.turn[slot] = NEVER

    def backlog(self, place: float, factor: float, now: float) -> Backlog:
        """What a request at a place finds at `now`; the work of those before it, and of those behind it together with
        these, counts times `factor`."""
        work_ms, rows, ahead_ms, spare_ms = waiting_kernels.backlog(
            self.order, self.places, self.left_ms, self.rows, self.deadline, place, factor, now
        )
        return Backlog(work_ms, int(rows), ahead_ms, spare_ms)

    def passed(self, now: float) -> list[int]:
        """Slots that are out of time, or that nobody works on and that cannot be in time any more, whatever is done."""
        size = self.size
        count = waiting_kernels.passed(self.deadline[:size], self.latest[:size], self.turn[:size], now, self._found)
        return self._found[:count].tolist() if count else []

    def total_rows(self) -> int:
        """Candidates that wait."""
        return int(self.rows[: self.size].sum())

    def total_ms(self) -> float:
        """Predicted work of all."""
        return float(self.left_ms[: self.size].sum())

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self.size == self.turn.shape[0]:
            self._grow()
        self.size += 1
        return self.size - 1

    def _grow(self) -> None:
        for name in ("turn", "place", "deadline", "latest", "_places"):
            setattr(self, name, _longer(getattr(self, name), NEVER))
        for name in ("left_ms", "rows", "prepared", "resident", "failed_on", "_order", "_found"):
            setattr(self, name, _longer(getattr(self, name), 0))
        self.tails = [_longer(tail, 0) for tail in self.tails]


def backlog_of(waitings: Sequence[Waiting], place: float, factor: float, now: float) -> Backlog:
    """What a request finds that waits for the same cores as several schedules' requests: as `Waiting.backlog`, with all
    of them in one order."""
    some = [waiting for waiting in waitings if waiting.count]
    if len(some) == 1:
        return some[0].backlog(place, factor, now)
    places = np.concatenate([np.zeros(0), *(waiting.places for waiting in some)])
    order = places.argsort(kind="stable")
    left_ms, rows, deadline = (
        np.concatenate([np.zeros(0, kind), *(getattr(waiting, name)[waiting.order] for waiting in some)])
        for name, kind in (("left_ms", np.float64), ("rows", np.int64), ("deadline", np.float64))
    )
    work_ms, count, ahead_ms, spare_ms = waiting_kernels.backlog(
        order, places[order], left_ms, rows, deadline, place, factor, now
    )
    return Backlog(work_ms, int(count), ahead_ms, spare_ms)


def _longer(column: Array, value: float) -> Array:
    """Twice as long."""
    return np.concatenate([column, np.full(column.shape, value, column.dtype)])
