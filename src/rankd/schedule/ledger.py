"""The book of the schedule: every request from its acceptance to its end, and who works on which of its candidates.

In: what happened (accepted, ready, prepared, scored, failed, cancelled), with the time. Out: what an executor does
next, and who has ended. It has no threads, no clock and no lock of its own: `scheduler.py` calls it under its lock, and
`simulation.py` with made-up time.

    accept -> comes -> next: prepare -> prepared -> next: a part -> done ... -> the last part done: it has ended
                                    \\-> waits -> comes -> next: prepare ...

A request ends once: by its last part, by `end` (failed, cancelled, out of time), or by the second executor that is lost
over it. What is being computed for one that has ended is let run, and thrown away. When nobody works on it any more it
is due to be dropped: `leave` says so once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rankd.errors import DeadlineExceeded
from rankd.schedule import admission, mixed_policy, policy
from rankd.schedule.admission import Limits, Margin, Wish
from rankd.schedule.kinds import Mix, Standing
from rankd.schedule.policy import Rules
from rankd.schedule.served import Asked, Part
from rankd.schedule.waiting import NEVER, Waiting

Item = TypeVar("Item")
MOST_LOSSES = 2
"""A request that so many executors were lost over fails; the first of them may have been no fault of its."""


@dataclass(slots=True, eq=False)
class Job(Generic[Item]):
    """A request. `given` of its candidates were handed out, `done` are scored; `workers` calls are under way for it.
    `again` are (first, count) of parts that have to be handed out once more, in calls by themselves. `close`: it was
    let in though it would need most of its time."""

    item: Item
    asked: Asked
    slot: int
    accepted: float
    close: bool
    given: int = 0
    done: int = 0
    workers: int = 0
    losses: int = 0
    over: bool = False
    dropped: bool = False
    again: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Work(Generic[Item]):
    """A call that an executor was given: `jobs`, and for each the part that is scored (none: prepare alone), padded to
    `bucket`. `unprepared` are those to prepare first, `wide`: on the threads of all executors. It is one of a
    `kind` that has it."""

    jobs: list[Job[Item]]
    parts: list[Part[Item]]
    bucket: int
    unprepared: list[Job[Item]]
    started: float
    predicted_ms: float
    wide: bool = False
    kind: int = 0
    settled: bool = False
    """Its parts are scored, or were handed out once more."""


class Ledger(Generic[Item]):
    """Not thread-safe. `rules` are of one kind of executors, or of several. `waitings` gives all that waits for the
    same cores, its own among it; None: its own alone."""

    def __init__(
        self, rules: Rules | Mix, limits: Limits, waitings: Callable[[], Sequence[Waiting]] | None = None
    ) -> None:
        self.rules, self._all, self.limits = rules.kinds[0], rules, limits
        self.waiting, self.margin = Waiting(kinds=len(rules.kinds)), Margin(limits.margin)
        self.again = NEVER
        """When an executor that was given nothing, though something can be run, should ask once more (seconds)."""
        self._waitings = waitings or (lambda: (self.waiting,))
        self._jobs: dict[int, Job[Item]] = {}

    @property
    def empty(self) -> bool:
        """Whether everything that was accepted has ended."""
        return not self.waiting.count

    def check(self, asked: Asked, now: float) -> tuple[float, float, float, bool]:
        """(place, latest, work_ms, whether it is close) of a request that may come in now.

        Raises:
            Overloaded, DeadlineExceeded: see `admission.check`.
        """
        rules = self._all
        work_ms, alone_ms = rules.estimates(asked.rows, asked.resident, asked.tokens)
        deadline = NEVER if asked.deadline is None else asked.deadline
        latest = deadline - alone_ms / 1e3
        place = policy.place(now, work_ms, asked.priority, latest, self.rules)
        wish = Wish(now, place, asked.rows, work_ms, alone_ms, deadline)
        try:
            waitings, margin = self._waitings(), self.margin.value
            close = admission.check(waitings, self.limits, margin, rules.speed, wish)
        except DeadlineExceeded:
            rules.doubt()
            raise
        return place, latest, work_ms, close

    def accept(self, item: Item, asked: Asked, now: float) -> Job[Item]:
        """Take a request in; it cannot run before `comes`.

        Raises:
            Overloaded, DeadlineExceeded: as `check`.
        """
        place, latest, work_ms, close = self.check(asked, now)
        deadline = NEVER if asked.deadline is None else asked.deadline
        slot = self.waiting.add(place, deadline, latest, work_ms, asked.rows, asked.resident)
        job = self._jobs[slot] = Job(item, asked, slot, now, close)
        return job

    def comes(self, job: Job[Item]) -> None:
        """What a request waited for is there: executors may have what is left of it."""
        if not job.over and self.waiting.rows[job.slot]:
            self.waiting.let_run(job.slot)
            self._set_tail(job)

    def next(
        self, idle: int, now: float, kind: int = 0, standings: Sequence[Standing] = (), busy: int = 0
    ) -> Work[Item] | None:
        """What one of `idle` executors does now beside `busy` ones; None: nothing can be run, or nothing is won by one
        more call at once. Where there are several kinds of executors it is one of a `kind`, and `standings` are those
        of all of them, which also say who is busy; then None may also be that what waits is left to others, and `again`
        says when to ask once more."""
        waiting, rules = self.waiting, self._all.kinds[kind]
        if standings:
            busy = standings[kind].busy
            call, self.again = mixed_policy.decide(waiting, idle, now, kind, self._all.kinds, standings)
        else:
            call = policy.decide(waiting, idle, now, rules, busy)
        if call is None:
            return None
        jobs = [self._jobs[slot] for slot in call.slots]
        unprepared = [job for job in jobs if not waiting.prepared[job.slot]]
        costs = rules.costs
        predicted_ms = sum(costs.prepare(job.asked.resident, job.asked.tokens) for job in unprepared)
        predicted_ms += costs.score(call.bucket, len(jobs)) if call.bucket else 0.0
        predicted_ms *= costs.speed.contention(busy + 1)
        parts = []
        for job in jobs:
            job.workers += 1
            if call.bucket:
                parts.append(self._next_part(job, call.bucket))
        for job in unprepared:  # nobody else can do anything for it until it is
            waiting.hold(job.slot)
        return Work(jobs, parts, call.bucket, unprepared, now, predicted_ms, call.wide, kind)

    def prepared(self, job: Job[Item]) -> None:
        """The state of a request is there: the rest of its candidates may be handed out."""
        if job.over:
            return
        self.waiting.prepared[job.slot] = True
        self._set_left(job)
        self._set_latest(job)
        self.comes(job)

    def waits(self, work: Work[Item], job: Job[Item]) -> None:
        """A request that was to be prepared has to wait for something first: it leaves its call, until it `comes`."""
        place = work.jobs.index(job)
        work.jobs.pop(place)
        work.unprepared.remove(job)
        if work.parts:
            part = work.parts.pop(place)
            if not job.over:
                self._give_back(job, part)

    def done(self, work: Work[Item]) -> list[Job[Item]]:
        """The parts of a call are scored: the requests that this was the last of, which have ended with it."""
        ended, work.settled = [], True
        for job, part in zip(work.jobs, work.parts, strict=True):
            if job.over:
                continue
            job.done += part.count
            if job.done == job.asked.rows:
                self.end(job)
                ended.append(job)
                if job.close:
                    self.margin.kept()
            else:
                self._set_left(job)
        return ended

    def lost(self, work: Work[Item]) -> list[Job[Item]]:
        """An executor was lost over a call: what it had is handed out once more, to one of another kind if there is
        any. Those that this was once too often for have ended; they are returned. Nothing happens if that was said
        before, or the call is done."""
        if work.settled:
            return []
        ended, work.settled = [], True
        for number, job in enumerate(work.jobs):
            job.losses += 1
            if job.over:
                continue
            if job.losses >= MOST_LOSSES:
                self.end(job)
                ended.append(job)
                continue
            if work.parts:
                self._give_back(job, work.parts[number])
            self.waiting.failed_on[job.slot] = work.kind + 1
            self.comes(job)
        return ended

    def late(self, now: float) -> list[Job[Item]]:
        """Requests that are out of time, or can no longer be in time; they have ended."""
        ended = [self._jobs[slot] for slot in self.waiting.passed(now)]
        for job in ended:
            self.end(job)
            self.margin.missed()
        return ended

    def next_deadline(self) -> float:
        """The earliest moment at which `late` has something to end; NEVER if there is none."""
        size = self.waiting.size
        return float(self.waiting.deadline[:size].min()) if size else NEVER

    def end(self, job: Job[Item]) -> bool:
        """A request has ended, however; whether it had not before."""
        if job.over:
            return False
        job.over = True
        del self._jobs[job.slot]
        self.waiting.remove(job.slot)
        return True

    def leave(self, jobs: Sequence[Job[Item]]) -> list[Job[Item]]:
        """A call is over: of its requests those that have ended and that nobody works on any more."""
        for job in jobs:
            job.workers -= 1
        return [job for job in jobs if self.droppable(job)]

    def droppable(self, job: Job[Item]) -> bool:
        """Whether what is held for a request can be given back; true once."""
        free = job.over and not job.workers and not job.dropped
        job.dropped |= free
        return free

    def everybody(self) -> list[Job[Item]]:
        """All that have not ended."""
        return list(self._jobs.values())

    def _next_part(self, job: Job[Item], bucket: int) -> Part[Item]:
        waiting, slot = self.waiting, job.slot
        if job.again:
            first, whole = job.again.pop()
            count = min(whole, bucket)
            if whole > count:
                job.again.append((first + count, whole - count))
        else:
            first, count = job.given, min(bucket, job.asked.rows - job.given)
            job.given += count
        waiting.rows[slot] -= count
        if waiting.rows[slot]:
            self._set_tail(job)
            if waiting.prepared[slot]:
                self._set_latest(job)
        else:
            waiting.hold(slot)
            waiting.no_tail(slot)
        return Part(job.item, first, count)

    def _give_back(self, job: Job[Item], part: Part[Item]) -> None:
        if part.first + part.count == job.given:
            job.given = part.first
        else:
            job.again.append((part.first, part.count))
        self.waiting.rows[job.slot] += part.count
        if self.waiting.prepared[job.slot]:
            self._set_latest(job)

    def _set_left(self, job: Job[Item]) -> None:
        """What is left of a prepared request."""
        self.waiting.left_ms[job.slot] = self._all.left_ms(job.asked.rows - job.done)

    def _set_latest(self, job: Job[Item]) -> None:
        """When what nobody works on of a prepared request has to begin; the other parts are under way meanwhile."""
        waiting, slot, deadline = self.waiting, job.slot, job.asked.deadline
        if deadline is not None:
            waiting.latest[slot] = deadline - self._all.soonest_ms(int(waiting.rows[slot])) / 1e3

    def _set_tail(self, job: Job[Item]) -> None:
        """A part that may share a call with those of other users: all that is left, of one that is no trouble."""
        waiting, slot = self.waiting, job.slot
        rows = int(waiting.rows[slot])
        ready = bool(waiting.prepared[slot] or waiting.resident[slot]) and not job.losses and not job.again
        for rules, tail in zip(self._all.kinds, waiting.tails, strict=True):
            cutter = rules.cutter
            bucket = cutter.first(rows, cutter.buckets[-1]) if rows else 0
            tail[slot] = bucket if ready and rows <= bucket else 0
