"""The schedule without executors: made-up arrivals, made-up time, the same ledger and the same policy.

In: arrivals with what they take, and rules of one kind of executors or of several. Out: how each of them ended, faster
than real time (an hour of requests in seconds). What is simulated: admission, order, cuts, calls for several users,
deadlines. What is not: the network, the interpreter, and executors that slow each other down.
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


@dataclass(slots=True)
class _Executors:
    """Of one kind: how many are idle, the calls of the others, and what they take."""

    kind: int
    rules: Rules
    call_ms: Callable[[int, int], float]
    idle: int
    calls: list[Work[Outcome]] = field(default_factory=list)
    busy_s: float = 0.0


class _Simulation:
    def __init__(self, rules: Rules | Mix, limits: Limits, calls_ms: Sequence[Callable[[int, int], float]]) -> None:
        self._ledger: Ledger[Outcome] = Ledger(rules, limits)
        self.executors = [
            _Executors(kind, one, call_ms, one.num_executors)
            for kind, (one, call_ms) in enumerate(zip(rules.kinds, calls_ms, strict=True))
        ]
        self._looks_again = NEVER
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = count()
        self.rows = self.padded_rows = self.calls = 0

    def at(self, moment: float, happens: Callable[[float], None]) -> None:
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
            self._prepare(work, executors, now)
        return given

    def _next(self, executors: _Executors, now: float) -> Work[Outcome] | None:
        if len(self.executors) == 1:
            return self._ledger.next(executors.idle, now)
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

        self.at(now + job.item.arrival.prepare_ms[executors.kind] / 1e3, prepared)

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
            executors.idle += 1
            executors.busy_s += then - work.started

        self.at(now + ms / 1e3, scored)


def simulate(
    arrivals: Sequence[Arrival],
    rules: Rules | Mix,
    limits: Limits,
    calls_ms: Sequence[Callable[[int, int], float]] = (),
) -> Simulated:
    """Run all arrivals. `calls_ms` are (bucket, users) -> what calls really take, one for each kind of executors, if
    that is not what their models of costs say.

    Raises:
        ValueError: an arrival has more candidates than the largest bucket's cuts are known for.
    """
    most = min(one.cutter.most_rows for one in rules.kinds)
    if any(arrival.rows > most for arrival in arrivals):
        raise ValueError(f"an arrival has more than {most} candidates")
    simulation = _Simulation(rules, limits, calls_ms or [one.costs.score for one in rules.kinds])
    outcomes = [Outcome(arrival) for arrival in arrivals]
    for outcome in outcomes:
        simulation.at(outcome.arrival.at, lambda now, outcome=outcome: simulation.arrives(outcome, now))  # type: ignore[misc]
    ended = simulation.run()
    busy_s = tuple(executors.busy_s for executors in simulation.executors)
    return Simulated(outcomes, simulation.rows, simulation.padded_rows, simulation.calls, ended, busy_s)


def _ends(job: Job[Outcome], now: float, how: str) -> None:
    job.item.ended, job.item.how = now, how
