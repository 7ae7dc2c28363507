"""What an idle executor does next: a pure function of what waits, how many executors are idle, and the time.

In: `Waiting`, `Rules`. Out: a `Call`. The real schedule (`scheduler.py`) and the simulated one (`simulation.py`) ask
the same functions. Where executors are of several kinds, `mixed_policy.py` says whether one takes what is first at all.

- *Order.* A request's place is fixed when it comes: its arrival plus a patience that grows with its work, so that short
  ones pass long ones, but never one that came more than `fairness_ms` before them. A deadline moves it forward.
- *Cuts.* A call takes about `quantum_ms`, so that who comes next waits no longer than that: long requests go in
  even pieces. If nobody else waits, the pieces are spread over the idle executors.
- *Deadlines.* Of the sizes that a call may have it takes the largest that makes nobody else late.
- *Calls for several users*, where that was measured to pay: pieces of the same bucket join, in order.
- *A shared device.* Where executors get less done at once than each alone, no more calls are begun than that is worth:
  others wait, and join. What is spread, and whether users join or have calls side by side, is decided with the time
  that calls take beside each other (`shared_speed.py`).
- *States first.* A history that has to be encoded is a call by itself, so that the other executors work meanwhile and
  its candidates can then be spread. While all are idle it gets the threads of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from rankd.schedule.costs import CostModel
from rankd.schedule.cutting import Cutter
from rankd.schedule.waiting import NEVER, Waiting
from rankd.types import Int64Array

CALL_MS = 0.1
"""What a call takes beside the engine: deciding, handing over, booking."""
WORTH = 0.8
"""Work is spread over idle executors if that ends in this part of the time or less."""


class Priority(Enum):
    """Interactive requests pass batch ones, which wait `batch_ms` longer at most."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Rules:
    """What the policy goes by. `largest` is the bucket of the quantum; `most_users(bucket)` is how many users a call
    of a bucket may serve; with `encode_wide` a history is encoded on the threads of all executors if all are idle.

    They are of one kind of executors, called `name`. What a `kinds.Mix` of several kinds is asked, these answer too:
    `kinds`, `speed`, `estimates`, `left_ms`, `soonest_ms` and `doubt`.
    """

    cutter: Cutter
    costs: CostModel
    most_users: Callable[[int], int]
    num_executors: int
    largest: int
    stretch: float
    fairness_ms: float
    batch_ms: float
    spread: bool = True
    encode_wide: bool = False
    name: str = ""

    @property
    def kinds(self) -> tuple[Rules, ...]:
        """Those of each kind of executors."""
        return (self,)

    @property
    def speed(self) -> float:
        """How much all executors get done, in units of one alone, as many at once as that is worth."""
        speed = self.costs.speed
        return speed.of(speed.most(self.num_executors))

    def estimates(self, rows: int, resident: bool, tokens: int | None) -> tuple[float, float]:
        """All that a request takes, and how soon it can be done if all executors work for it, in milliseconds."""
        prepare_ms = self.costs.prepare(resident, tokens)
        return self.work_ms(rows, prepare_ms), self.shortest_ms(rows, prepare_ms)

    def left_ms(self, rows: int) -> float:
        """All that so many candidates of a prepared request take."""
        return self.work_ms(rows, 0.0)

    def soonest_ms(self, rows: int) -> float:
        """How soon so many candidates of a prepared request can be done if all executors work for them."""
        return self.shortest_ms(rows, 0.0)

    def doubt(self) -> None:
        """Somebody was sent away because of the predictions (`CostModel.doubt`)."""
        self.costs.doubt()

    def work_ms(self, rows: int, prepare_ms: float) -> float:
        """All that a request takes, in pieces."""
        pieces = self.cutter.pieces(rows, self.cutter.even(rows, self.largest))
        return prepare_ms + self.costs.rows(rows) + self.costs.calls(pieces) + CALL_MS * len(pieces)

    def shortest_ms(self, rows: int, prepare_ms: float) -> float:
        """How soon it can be done if all executors work for it, or fewer, where that is quicker on a shared device."""
        speed = self.costs.speed
        most = speed.most(self.num_executors)
        shares = (most,) if speed.curve is None else range(1, most + 1)
        return prepare_ms + min(self.work_ms(-(-rows // n), 0.0) * speed.contention(n) for n in shares)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an executor. `bucket` 0: prepare the request in `slots`, no more. Else score, for each of `slots`, as
    many candidates as are left, at most `bucket`; who is not prepared is prepared first. `wide`: on the threads of all
    executors."""

    slots: tuple[int, ...]
    bucket: int
    wide: bool = False


def place(arrival: float, work_ms: float, priority: Priority, latest: float, rules: Rules) -> float:
    """A request's place in the order, in seconds: never before its arrival.

    >>> arrival 10.0 s, 5 ms of work, stretch 4 -> 10.020; 100 ms of work, fairness 200 ms -> 10.200
    """
    patience_ms = min(rules.stretch * work_ms, rules.fairness_ms)
    if priority is Priority.BATCH:
        patience_ms += rules.batch_ms
    return max(min(arrival + patience_ms / 1e3, latest), arrival)


def decide(waiting: Waiting, idle: int, now: float, rules: Rules, busy: int = 0) -> Call | None:
    """The next call of one of `idle` executors beside `busy` ones; None if nothing can be run, or nothing is won by
    one more call at once."""
    room = rules.costs.speed.room(idle, busy)
    if not waiting.runnable or not room:
        return None
    first = int(waiting.turn[: waiting.size].argmin())
    largest = largest_bucket(waiting, first, room, waiting.runnable - 1, now, rules, busy)
    return call_for(waiting, first, largest, room, rules, waiting.tail, busy)


def call_for(
    waiting: Waiting, first: int, largest: int, idle: int, rules: Rules, tail: Int64Array, busy: int = 0
) -> Call:
    """The call that begins with the request in slot `first`, none of its buckets above `largest`. `tail` is the column
    of who may join it; `idle` executors may have calls beside `busy` ones."""
    rows, others = int(waiting.rows[first]), waiting.runnable - 1
    bucket = rules.cutter.first(rows, largest)
    if not (waiting.prepared[first] or waiting.resident[first]):
        alone = idle > 1 or rows > bucket or others > 0
        wide = rules.encode_wide and not others and idle == rules.num_executors
        return Call((first,), 0, wide) if alone else Call((first,), bucket)
    most = rules.most_users(bucket)
    if tail[first] != bucket or most == 1 or not others:
        return Call((first,), bucket)
    slots = (first, *_joining(waiting, tail, first, bucket, most - 1))
    return Call(slots[: _users(len(slots), bucket, idle, busy, rules.costs)], bucket)


def _users(most: int, bucket: int, idle: int, busy: int, costs: CostModel) -> int:
    """How many of so many users of a bucket share a call: all. Where executors share a device, as many as have all of
    them scored soonest, the others in calls beside this one.

    >>> 1 ms for one and 1.2 ms for two: one call takes 1.2, and two at once, which get 1.5 times as much done, 1.33
    """
    sizes = [1 << power for power in range(most.bit_length())]  # calls are warmed for 1, 2, 4, 8 users
    if costs.speed.curve is None or idle == 1:
        return sizes[-1]
    return min(reversed(sizes), key=lambda users: costs.together_ms(bucket, users, sizes[-1] // users, idle, busy))


def largest_bucket(
    waiting: Waiting, first: int, idle: int, others: int, now: float, rules: Rules, busy: int = 0
) -> int:
    """The largest bucket that a call for the request in slot `first` may have, while `others` want executors too.
    `idle` executors may have calls beside `busy` ones."""
    cutter, rows = rules.cutter, int(waiting.rows[first])
    largest = cutter.even(rows, rules.largest)
    if rules.spread and others < idle - 1 and rows > cutter.buckets[0]:
        helpers = idle - others
        share = cutter.bucket_for(-(-rows // helpers))
        if share < largest or rows > share:
            beside, pieces = rules.costs.speed.beside, min(-(-rows // share), helpers)
            together = cutter.cost_ms(-(-rows // helpers), share) * beside(busy + others, pieces)
            if together <= WORTH * cutter.cost_ms(rows, largest) * beside(busy + others, 1):
                return min(share, largest)
    if others and idle == 1:
        return _in_time(waiting, first, largest, now, rules, busy)
    return largest


def _in_time(waiting: Waiting, first: int, largest: int, now: float, rules: Rules, busy: int) -> int:
    """The largest bucket up to `largest` whose call, beside `busy` ones, makes the fewest others late."""
    size, slow = waiting.size, rules.costs.speed.contention(busy + 1)
    latest, end = waiting.latest[:size], now + slow * rules.costs.score(largest) / 1e3
    if latest.min() >= end:
        return largest
    exposed = latest[(latest < end) & (waiting.turn[:size] < NEVER)]
    if not exposed.size:
        return largest
    ends = {
        bucket: now + slow * rules.costs.score(bucket) / 1e3 for bucket in rules.cutter.buckets if bucket <= largest
    }
    own = waiting.latest[first]
    late = {bucket: int(np.count_nonzero(exposed < end)) - (own < end) for bucket, end in ends.items()}
    return min(ends, key=lambda bucket: (late[bucket], -bucket))


def _joining(waiting: Waiting, tail: Int64Array, first: int, bucket: int, most: int) -> list[int]:
    """Up to `most` others whose rest is one piece of this bucket, in their order."""
    turns = waiting.turn[: waiting.size]
    fitting = np.flatnonzero((tail[: waiting.size] == bucket) & (turns < NEVER))
    fitting = fitting[fitting != first]
    if fitting.size > most:
        fitting = fitting[np.argpartition(turns[fitting], most - 1)[:most]]
    return [int(slot) for slot in fitting[np.argsort(turns[fitting], kind="stable")]]
