"""What an idle executor does next where executors are of several kinds: its part of a plan for all of them.

In: `Waiting`, the rules of each kind and how it stands. Out: a `Call`, or nothing: what waits is left to others. A pure
function, as `policy.py`, which makes the call.

- *The plan.* Each request goes to the kind that is done with it first: when an executor of that is free, after what was
  planned for it before. Those are planned first for which it matters most who does them, so a kind that is quick with
  everything still leaves to another what that is nearly as good at. Whoever asks makes the same plan.
- *The call.* An executor takes the first request in the order that the plan has for its kind; if there is none, a part
  of another one, if all of that ends clearly sooner then. So a request that is alone is shared by all kinds.
- *A shared device.* Executors of a kind that share one are planned with no more calls at once than that is worth, each
  as much slower as others are at work there then (`shared_speed.py`).
- *After a failure.* What an executor was lost over goes to one of another kind, as long as there is any: a GPU that has
  no memory left for a call fails it again.
- *Fairness.* Planned together are those whose places are within `fairness_ms` of the first one's: it is passed by none
  behind them, nor for ever. Whoever is busy longer than was predicted is reckoned to be so for as long again as that
  is late: others take what it does not come to.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace

import numpy as np

from rankd.schedule.kinds import Standing
from rankd.schedule.policy import WORTH, Call, Rules, call_for, largest_bucket
from rankd.schedule.shared_speed import Speed
from rankd.schedule.waiting import NEVER, Waiting

DEPTH = 24
"""Requests that are planned at once: executors are busy with them for longer than a plan holds."""
ELSEWHERE_S = 3600.0
"""What a request is reckoned to take on a kind that has failed it."""
SOON_MS = 0.5
"""Who left everything to others does not ask again before that, unless something happens."""


def decide(
    waiting: Waiting, idle: int, now: float, kind: int, kinds: Sequence[Rules], standings: Sequence[Standing]
) -> tuple[Call | None, float]:
    """The next call of one of `idle` executors of a kind, and, if there is none though something can be run, when to
    ask again (seconds)."""
    rules, busy = kinds[kind], standings[kind].busy
    idle = rules.costs.speed.room(idle, busy)
    if not waiting.runnable or not idle:
        return None, NEVER
    lines = [_line(one, now, there.costs.speed) for one, there in zip(standings, kinds, strict=True)]
    plan = _Plan(waiting, kinds, lines)
    again = min((line[0] for number, line in enumerate(plan.lines) if line and number != kind), default=now)
    slots = _in_order(waiting, rules.fairness_ms / 1e3)
    plan.make(slots)
    spare = min(plan.lines[kind].count(now), idle)
    for slot in slots:
        chosen = plan.chosen[slot]
        helpers = spare + (chosen.kind == kind)
        if not helpers or (chosen.kind != kind and plan.failed(slot, kind)):
            continue
        others = idle - helpers if idle > 1 else waiting.runnable - 1
        largest = largest_bucket(waiting, slot, idle, others, now, rules, busy)
        part, other = 0, _other(plan, chosen, kind, now)
        if other is not None and not plan.failed(slot, other.kind):
            slow = rules.costs.speed.contention(busy + helpers), plan.contention(other.kind, other.start)
            split = _Split(waiting, slot, rules, kinds[other.kind], helpers, now, other.start, slow)
            part = split.bucket(largest, now + WORTH * (chosen.end - now))
        if part or chosen.kind == kind:
            tail = np.where(waiting.turn >= waiting.turn[slot], waiting.tails[kind], 0)
            return call_for(waiting, slot, part or largest, idle, rules, tail, busy), NEVER
    return None, max(again, now) + SOON_MS / 1e3


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Of a request: the kind that does it, and from when to when (seconds)."""

    kind: int
    start: float
    end: float


@dataclass(slots=True)
class _Plan:
    """Who does which request. `lines` are, of each kind, a heap of when its executors are free (seconds)."""

    waiting: Waiting
    kinds: Sequence[Rules]
    lines: list[list[float]]
    chosen: dict[int, _Chosen] = field(default_factory=dict)

    def make(self, slots: Sequence[int]) -> None:
        """Plan requests, given in their order."""
        there = [kind for kind, line in enumerate(self.lines) if line]
        takes = {slot: [self._takes_s(slot, kind) for kind in there] for slot in slots}
        for slot in sorted(slots, key=lambda slot: _indifference(takes[slot])):
            ends = [self._end(kind, seconds) for kind, seconds in zip(there, takes[slot], strict=True)]
            end = min(ends)
            kind = there[ends.index(end)]
            start = heapreplace(self.lines[kind], end)
            self.chosen[slot] = _Chosen(kind, start, end)

    def contention(self, kind: int, start: float, more: int = 0) -> float:
        """How many times as long as alone a call of a kind takes from `start` on, beside those that were planned for
        then and `more`."""
        speed = self.kinds[kind].costs.speed
        return 1.0 if speed.curve is None else speed.contention(more + sum(free > start for free in self.lines[kind]))

    def _end(self, kind: int, seconds: float) -> float:
        """When a call that takes so long alone is over, on the executor of a kind that is free first."""
        start = self.lines[kind][0]
        return start + seconds * self.contention(kind, start, 1)

    def failed(self, slot: int, kind: int) -> bool:
        """Whether a request goes to others than this kind, since one of that was lost over it."""
        there = (line for number, line in enumerate(self.lines) if number != kind)
        return bool(self.waiting.failed_on[slot] == kind + 1) and any(there)

    def _takes_s(self, slot: int, kind: int) -> float:
        """What is left of a request, on one executor of a kind."""
        if self.failed(slot, kind):
            return ELSEWHERE_S
        rules = self.kinds[kind]
        return rules.work_ms(int(self.waiting.rows[slot]), _prepare_ms(self.waiting, slot, rules)) / 1e3


def _indifference(takes: Sequence[float]) -> float:
    """How little it matters who does a request: of two kinds of which one takes twice as long, .5."""
    best, *others = sorted(takes)
    return best / max(others[0], 1e-9) if others else 1.0


def _other(plan: _Plan, chosen: _Chosen, kind: int, now: float) -> _Chosen | None:
    """With whom an executor of a kind may share a request: the kind that was to do it, or one of that nothing was
    planned for."""
    if chosen.kind != kind:
        return chosen
    unused = (number for number, line in enumerate(plan.lines) if number != kind and line and line[0] <= now)
    return next((_Chosen(number, now, now) for number in unused), None)


@dataclass(frozen=True, slots=True)
class _Split:
    """A request in two parts: a call of each of `helpers` executors that are idle `now`, and the rest, if any, on one
    of another kind from `free` on (seconds). `slow`: how many times as long as alone a call takes here, and there."""

    waiting: Waiting
    slot: int
    here: Rules
    there: Rules
    helpers: int
    now: float
    free: float
    slow: tuple[float, float]

    def bucket(self, largest: int, bound: float) -> int:
        """The bucket, up to `largest`, of the calls here with which all is done soonest; 0: it would be done after
        `bound`, or its history has to be encoded first."""
        waiting, slot, rows = self.waiting, self.slot, int(self.waiting.rows[self.slot])
        if not self.here.spread or not (waiting.prepared[slot] or waiting.resident[slot]):
            return 0
        share = -(-rows // self.helpers)
        buckets = [one for one in self.here.cutter.buckets if one <= largest and one < share]
        longer = bisect_left(buckets, True, key=lambda one: self._ends_here(one) >= self._ends_there(rows, one))
        ends = {one: self._ends(rows, one) for one in buckets[max(longer - 1, 0) : longer + 1]}
        whole = min(self.here.cutter.bucket_for(share), largest)
        ends[whole] = min(self._ends_here(share), ends.get(whole, NEVER))
        found = min(ends, key=ends.__getitem__)
        return found if ends[found] <= bound else 0

    def _ends(self, rows: int, bucket: int) -> float:
        return max(self._ends_here(bucket), self._ends_there(rows, bucket))

    def _ends_here(self, rows: int) -> float:
        work_ms = self.here.work_ms(rows, _prepare_ms(self.waiting, self.slot, self.here))
        return self.now + self.slow[0] * work_ms / 1e3

    def _ends_there(self, rows: int, bucket: int) -> float:
        return self.free + self.slow[1] * self.there.work_ms(rows - bucket * self.helpers, 0.0) / 1e3


def _line(standing: Standing, now: float, speed: Speed) -> list[float]:
    """A heap of when each executor of a kind is free, of those that may have calls."""
    line = [now] * speed.room(standing.idle, standing.busy) + [
        max(until, 2 * now - until) for until in standing.busy_until
    ]
    heapify(line)
    return line


def _in_order(waiting: Waiting, fairness_s: float) -> list[int]:
    """The first requests that can be run, in their order."""
    order = waiting.order
    slots = order[waiting.turn[order] < NEVER][:DEPTH]
    turns = waiting.turn[slots]
    near: list[int] = slots[: int(turns.searchsorted(turns[0] + fairness_s, side="right"))].tolist()
    return near


def _prepare_ms(waiting: Waiting, slot: int, rules: Rules) -> float:
    return 0.0 if waiting.prepared[slot] else rules.costs.prepare(bool(waiting.resident[slot]))
