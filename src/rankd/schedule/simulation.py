"""The schedule without executors: made-up arrivals, made-up time, the same ledger and the same policy.

In: arrivals with what they take, and rules of one kind of executors or of several. Out: how each of them ended, faster
than real time (an hour of requests in seconds). What is simulated: admission, order, cuts, calls for several users,
deadlines, and executors that share a device. What is not: the network and the interpreter.

Of executors that share a device all calls under way go on equally fast, as fast as `shared_speed.Speed` has it for so
many: with a curve of 1, 1.5 a call of 6 ms that a second one joins after 2 ms has 4 ms left, and takes 4 x 1.33 = 5.3
for them, if the other one does not end before.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from rankd.errors import DeadlineExceeded, Overloaded
from rankd.schedule.admission import Limits
from rankd.schedule.kinds import Mix, Standing
from rankd.schedule.ledger import Job, Ledger, Work
from rankd.schedule.policy import Priority, Rules
from rankd.schedule.served import Asked
from rankd.schedule.shared_speed import Speed
from rankd.schedule.waiting import NEVER


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes (seconds), its candidates, what its history and state take on each kind of executors,
    and whether the state is in memory, which is all that the schedule is told of that. `timeout_ms` None: it waits
    for ever."""

    at: float
    rows: int
    prepare_ms: tuple[float, ...] = (0.2,)
    resident: bool = True
    timeout_ms: float | None = None
    priority: Priority = Priority.INTERACTIVE


@dataclass(slots=True)
class Outcome:
    """How a request ended: "scored", "refused" or "late", and when (seconds)."""

    arrival: Arrival
    ended: float = 0.0
    how: str = ""

    @property
    def latency_ms(self) -> float:
        """From its arrival to its end."""
        return (self.ended - self.arrival.at) * 1e3


@dataclass(frozen=True, slots=True)
class Simulated:
    """All outcomes in the order of arrival, rows that were scored and that only padded calls, and when all was over;
    `busy_s` are the seconds that each kind of executors computed."""

    outcomes: Sequence[Outcome]
    rows: int
    padded_rows: int
    calls: int
    ended: float
    busy_s: tuple[float, ...]


Happens = Callable[[float], None]
At = Callable[[float, Happens], None]
"""Has something happen at a moment (seconds)."""


class _Device:
    """What calls at once get done. `done` are the seconds that each of them would have had to itself until `since`, if
    it had begun with the first one: what is to happen after so much work of its own happens when `done` is there."""

    def __init__(self, speed: Speed, at: At) -> None:
        self._speed, self._at = speed, at
        self._rate, self._done, self._since = 1.0, 0.0, 0.0
        self._ends: list[tuple[float, int, Happens]] = []
        self._numbers, self._latest = count(), 0

    def busy(self, number: int, now: float) -> None:
        """So many calls are under way from now on."""
        if self._speed.curve is not None:
            self._go_on(now)
            self._rate = 1.0 / self._speed.contention(number)
            self._look(now)

    def after(self, seconds: float, now: float, happens: Happens) -> None:
        """Have something happen when a call has gone on as far as it does in so many seconds alone."""
        if self._speed.curve is None:
            self._at(now + seconds, happens)
            return
        self._go_on(now)
        heapq.heappush(self._ends, (self._done + seconds, next(self._numbers), happens))
        self._look(now)

    def _go_on(self, now: float) -> None:
        self._done, self._since = self._done + (now - self._since) * self._rate, now

    def _look(self, now: float) -> None:
        """Come back when the first one is there, if nothing changes before."""
        self._latest += 1
        if self._ends:
            number, end = self._latest, self._ends[0][0]
            self._at(now + max(end - self._done, 0.0) / self._rate, lambda then: self._come(number, then))

    def _come(self, number: int, now: float) -> None:
        if number == self._latest:
            end, _, happens = heapq.heappop(self._ends)
            self._done, self._since = end, now
            self._look(now)
            happens(now)


@dataclass(slots=True)
class _Executors:
    """Of one kind: how many are idle, the calls of the others, what they take, and what they compute on."""

    kind: int
    rules: Rules
    call_ms: Callable[[int, int], float]
    device: _Device
    idle: int
    calls: list[Work[Outcome]] = field(default_factory=list)
    busy_s: float = 0.0


class _Simulation:
    def __init__(
        self,
        rules: Rules | Mix,
        limits: Limits,
        calls_ms: Sequence[Callable[[int, int], float]],
        speeds: Sequence[Speed],
    ) -> None:
        self._ledger: Ledger[Outcome] = Ledger(rules, limits)
        self.executors = [
            _Executors(kind, one, call_ms, _Device(speed, self.at), one.num_executors)
            for kind, (one, call_ms, speed) in enumerate(zip(rules.kinds, calls_ms, speeds, strict=True))
        ]
        self._looks_again = NEVER
        self._events: list[tuple[float, int, Happens]] = []
        self._numbers = count()
        self.rows = self.padded_rows = self.calls = 0

    def at(self, moment: float, happens: Happens) -> None:
        heapq.heappush(self._events, (moment, next(self._numbers), happens))

    def run(self) -> float:
        now = 0.0
        while self._events:
            now, _, happens = heapq.heappop(self._events)
            for job in self._ledger.late(now):
                _ends(job, now, "late")
            happens(now)
            while any(self._give(executors, now) for executors in self.executors):
                pass
        return now

    def _give(self, executors: _Executors, now: float) -> bool:
        """Give idle executors of a kind what there is for them; whether there was something."""
        given = False
        while executors.idle and (work := self._next(executors, now)) is not None:
            executors.idle, given = executors.idle - 1, True
            executors.calls.append(work)
            executors.device.busy(len(executors.calls), now)
            self._prepare(work, executors, now)
        return given

    def _next(self, executors: _Executors, now: float) -> Work[Outcome] | None:
        if len(self.executors) == 1:
            return self._ledger.next(executors.idle, now, busy=len(executors.calls))
        standings = [
            Standing(one.idle, tuple(work.started + work.predicted_ms / 1e3 for work in one.calls))
            for one in self.executors
        ]
        work = self._ledger.next(executors.idle, now, executors.kind, standings)
        again = self._ledger.again
        if work is None and again < NEVER and not now < self._looks_again <= again:
            self._looks_again = again
            self.at(again, lambda _: None)
        return work

    def arrives(self, outcome: Outcome, now: float) -> None:
        arrival = outcome.arrival
        deadline = None if arrival.timeout_ms is None else arrival.at + arrival.timeout_ms / 1e3
        try:
            job = self._ledger.accept(outcome, Asked(arrival.rows, arrival.resident, deadline, arrival.priority), now)
        except (Overloaded, DeadlineExceeded):
            outcome.ended, outcome.how = now, "refused"
            return
        self._ledger.comes(job)
        if deadline is not None:
            self.at(deadline, lambda _: None)  # whoever is late is found then

    def _prepare(self, work: Work[Outcome], executors: _Executors, now: float) -> None:
        """Those of a call that are not prepared one after the other, then its score."""
        if not work.unprepared:
            self._score(work, executors, now)
            return
        job = work.unprepared.pop(0)

        def prepared(then: float) -> None:
            self._ledger.prepared(job)
            self._prepare(work, executors, then)

        executors.device.after(job.item.arrival.prepare_ms[executors.kind] / 1e3, now, prepared)

    def _score(self, work: Work[Outcome], executors: _Executors, now: float) -> None:
        rows = sum(part.count for part in work.parts)
        if work.bucket:
            self.calls += 1
            self.rows += rows
            self.padded_rows += work.bucket * len(work.parts) - rows
        ms = 0.0
        if work.bucket:
            ms = executors.call_ms(work.bucket, len(work.parts)) + executors.rules.costs.rows(rows)

        def scored(then: float) -> None:
            for job in self._ledger.done(work) if work.parts else ():
                _ends(job, then, "scored")
            self._ledger.leave(work.jobs)
            executors.calls.remove(work)
            executors.device.busy(len(executors.calls), then)
            executors.idle += 1
            executors.busy_s += then - work.started

        executors.device.after(ms / 1e3, now, scored)


def simulate(
    arrivals: Sequence[Arrival],
    rules: Rules | Mix,
    limits: Limits,
    calls_ms: Sequence[Callable[[int, int], float]] = (),
    speeds: Sequence[Speed] = (),
) -> Simulated:
    """Run all arrivals. `calls_ms` are (bucket, users) -> what calls really take alone, one for each kind of executors,
    and `speeds` what these really get done at once, if that is not what their models of costs say.

    Raises:
        ValueError: an arrival has more candidates than the largest bucket's cuts are known for.
    """
    most = min(one.cutter.most_rows for one in rules.kinds)
    if any(arrival.rows > most for arrival in arrivals):
        raise ValueError(f"an arrival has more than {most} candidates")
    costs = [one.costs for one in rules.kinds]
    simulation = _Simulation(
        rules, limits, calls_ms or [one.score for one in costs], speeds or [one.speed for one in costs]
    )
    outcomes = [Outcome(arrival) for arrival in arrivals]
    for outcome in outcomes:
        simulation.at(outcome.arrival.at, lambda now, outcome=outcome: simulation.arrives(outcome, now))  # type: ignore[misc]
    ended = simulation.run()
    busy_s = tuple(executors.busy_s for executors in simulation.executors)
    return Simulated(outcomes, simulation.rows, simulation.padded_rows, simulation.calls, ended, busy_s)


def _ends(job: Job[Outcome], now: float, how: str) -> None:
    job.item.ended, job.item.how = now, how
