"""The schedule without executors: made-up arrivals, made-up time, the same ledger and the same policy.

In: arrivals with what they take, and rules. Out: how each of them ended, faster than real time (an hour of requests in
seconds). What is simulated: admission, order, cuts, calls for several users, deadlines. What is not: the network, the
interpreter, and executors that slow each other down.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from rankd.errors import DeadlineExceeded, Overloaded
from rankd.schedule.admission import Limits
from rankd.schedule.ledger import Job, Ledger, Work
from rankd.schedule.policy import Priority, Rules
from rankd.schedule.served import Asked


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes (seconds), its candidates, what its history and state take, and whether the state is in
    memory, which is all that the schedule is told of that. `timeout_ms` None: it waits for ever."""

    at: float
    rows: int
    prepare_ms: float = 0.2
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
    """All outcomes in the order of arrival, rows that were scored and that only padded calls, and when all was over."""

    outcomes: Sequence[Outcome]
    rows: int
    padded_rows: int
    calls: int
    ended: float


class _Simulation:
    def __init__(self, rules: Rules, limits: Limits, call_ms: Callable[[int, int], float]) -> None:
        self._ledger: Ledger[Outcome] = Ledger(rules, limits)
        self._call_ms, self._row_ms = call_ms, rules.costs.rows
        self._idle = rules.num_executors
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
            while self._idle and (work := self._ledger.next(self._idle, now)) is not None:
                self._idle -= 1
                self._prepare(work, now)
        return now

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

    def _prepare(self, work: Work[Outcome], now: float) -> None:
        """Those of a call that are not prepared one after the other, then its score."""
        if not work.unprepared:
            self._score(work, now)
            return
        job = work.unprepared.pop(0)

        def prepared(then: float) -> None:
            self._ledger.prepared(job)
            self._prepare(work, then)

        self.at(now + job.item.arrival.prepare_ms / 1e3, prepared)

    def _score(self, work: Work[Outcome], now: float) -> None:
        rows = sum(part.count for part in work.parts)
        if work.bucket:
            self.calls += 1
            self.rows += rows
            self.padded_rows += work.bucket * len(work.parts) - rows
        ms = self._call_ms(work.bucket, len(work.parts)) + self._row_ms(rows) if work.bucket else 0.0

        def scored(then: float) -> None:
            for job in self._ledger.done(work) if work.parts else ():
                _ends(job, then, "scored")
            self._ledger.leave(work.jobs)
            self._idle += 1

        self.at(now + ms / 1e3, scored)


def simulate(
    arrivals: Sequence[Arrival], rules: Rules, limits: Limits, call_ms: Callable[[int, int], float] | None = None
) -> Simulated:
    """Run all arrivals. `call_ms(bucket, users)` is what calls really take, if not what the rules' model of costs says.

    Raises:
        ValueError: an arrival has more candidates than the largest bucket's cuts are known for.
    """
    most = rules.cutter.most_rows
    if any(arrival.rows > most for arrival in arrivals):
        raise ValueError(f"an arrival has more than {most} candidates")
    simulation = _Simulation(rules, limits, call_ms or rules.costs.score)
    outcomes = [Outcome(arrival) for arrival in arrivals]
    for outcome in outcomes:
        simulation.at(outcome.arrival.at, lambda now, outcome=outcome: simulation.arrives(outcome, now))  # type: ignore[misc]
    ended = simulation.run()
    return Simulated(outcomes, simulation.rows, simulation.padded_rows, simulation.calls, ended)


def _ends(job: Job[Outcome], now: float, how: str) -> None:
    job.item.ended, job.item.how = now, how
