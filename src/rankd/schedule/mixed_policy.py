"""What an idle executor does next where executors are of several kinds: it works on what is done first with it.

In: `Waiting`, the rules of each kind and how it stands. Out: a `Call`, or nothing: what waits is left to others. A pure
function, as `policy.py`, which makes the call.

An executor goes through the requests in their order. It compares when a request is done with it, from now on, with when
it is done by another kind: when one of that is free, after all before it in the order that is left to that kind too. It
takes the first that it is not slower for; or a part of one, if the others end the rest enough earlier then, which is
how a request that is alone is spread over executors of all kinds.

Nobody waits for ever. If all are idle, the kind that does the first request soonest takes it. One that is busy with
another call gets it when that is over, and of a call that takes longer than was predicted it is reckoned that it takes
as long again as it is late: sooner or later somebody else is sooner.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

import numpy as np

from rankd.schedule.kinds import Standing
from rankd.schedule.policy import WORTH, Call, Rules, call_for, largest_bucket
from rankd.schedule.waiting import NEVER, Waiting

DEPTH = 32
"""Requests that an executor leaves to others before it looks no further. Whoever reads on finds hardly ever something:
the others have that much to do."""
SOON_MS = 0.5
"""Who left everything to others does not ask again before that, unless something happens."""


def decide(
    waiting: Waiting, idle: int, now: float, kind: int, kinds: Sequence[Rules], standings: Sequence[Standing]
) -> tuple[Call | None, float]:
    """The next call of one of `idle` executors of a kind, and, if there is none though something can be run, when to
    ask again (seconds)."""
    if not waiting.runnable:
        return None, NEVER
    rules, others = kinds[kind], waiting.runnable - 1
    lines = _lines(kind, standings, now)
    again = min((line[0] for line in lines.values()), default=now) + SOON_MS / 1e3
    unused = others < sum(standing.idle for number, standing in enumerate(standings) if number != kind)
    for slot in _in_order(waiting):
        here = now + _takes_ms(waiting, slot, rules, idle - others) / 1e3
        there, best = NEVER, kind
        for number, line in lines.items():
            end = line[0] + _takes_ms(waiting, slot, kinds[number], standings[number].idle - others) / 1e3
            if end < there:
                there, best = end, number
        largest = largest_bucket(waiting, slot, idle, now, rules)
        part = 0
        if best != kind and (unused or there < here):
            split = _Split(waiting, slot, rules, kinds[best], max(idle - others, 1), now, lines[best][0])
            part = split.bucket(largest, now + WORTH * (min(here, there) - now))
        if part or here <= there:
            tail = np.where(waiting.turn >= waiting.turn[slot], waiting.tails[kind], 0)
            return call_for(waiting, slot, part or largest, idle, rules, tail), NEVER
        heapreplace(lines[best], there)
    return None, again


@dataclass(frozen=True, slots=True)
class _Split:
    """A request in two parts: a call of each of `helpers` executors that are idle `now`, and the rest on one of another
    kind from `free` on (seconds)."""

    waiting: Waiting
    slot: int
    here: Rules
    there: Rules
    helpers: int
    now: float
    free: float

    def bucket(self, largest: int, bound: float) -> int:
        """The bucket, up to `largest`, of the calls here with which all is done soonest; 0: it would be done after
        `bound`, or its history has to be encoded first."""
        waiting, slot, rows = self.waiting, self.slot, int(self.waiting.rows[self.slot])
        if not self.here.spread or not (waiting.prepared[slot] or waiting.resident[slot]):
            return 0
        buckets = [one for one in self.here.cutter.buckets if one <= largest and one * self.helpers < rows]
        longer = bisect_left(buckets, True, key=lambda one: self._ends_here(one) >= self._ends_there(rows, one))
        ends = {one: self._ends(rows, one) for one in buckets[max(longer - 1, 0) : longer + 1]}
        found = min(ends, key=ends.__getitem__, default=0)
        return found if found and ends[found] <= bound else 0

    def _ends(self, rows: int, bucket: int) -> float:
        return max(self._ends_here(bucket), self._ends_there(rows, bucket))

    def _ends_here(self, bucket: int) -> float:
        return self.now + self.here.work_ms(bucket, _prepare_ms(self.waiting, self.slot, self.here)) / 1e3

    def _ends_there(self, rows: int, bucket: int) -> float:
        return self.free + self.there.work_ms(rows - bucket * self.helpers, 0.0) / 1e3


def _lines(kind: int, standings: Sequence[Standing], now: float) -> dict[int, list[float]]:
    """Of each other kind that has executors, a heap of when each of these is free."""
    lines = {}
    for number, standing in enumerate(standings):
        line = [now] * standing.idle + [max(until, 2 * now - until) for until in standing.busy_until]
        if number != kind and line:
            heapify(line)
            lines[number] = line
    return lines


def _in_order(waiting: Waiting) -> list[int]:
    """The first DEPTH requests that can be run, in their order."""
    order = waiting.order
    slots: list[int] = order[waiting.turn[order] < NEVER][:DEPTH].tolist()
    return slots


def _takes_ms(waiting: Waiting, slot: int, rules: Rules, helpers: int) -> float:
    """What is left of a request, shared by executors of a kind that have nothing else to do."""
    rows = int(waiting.rows[slot])
    if helpers > 1 and rules.spread:
        rows = -(-rows // helpers)
    return rules.work_ms(rows, _prepare_ms(waiting, slot, rules))


def _prepare_ms(waiting: Waiting, slot: int, rules: Rules) -> float:
    return 0.0 if waiting.prepared[slot] else rules.costs.prepare(bool(waiting.resident[slot]))
