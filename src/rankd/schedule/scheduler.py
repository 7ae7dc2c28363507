"""The schedule of one model: a thread for each executor that works on what the policy says, and one that watches them.

In: items with what they need (`served.Asked`). Out: a Future each. `submit` admits or refuses at once. Then a request
is prepared, its candidates are scored in one call or several, on one executor or several, and it is finished: it ends
exactly once (`ledger.py` keeps the book). One that is cancelled or out of time leaves at once; what is being computed
for it is thrown away when it comes.

An executor that raises what is no error of a request, or that takes much longer than it should, is lost: another one
takes its place, and what it had is run once more. The thread of one that hangs cannot be ended; it is left alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Generic, TypeVar

from rankd.errors import DeadlineExceeded, EngineFailure, RankdError, Unavailable
from rankd.observe.schedule_metrics import ScheduleCounts, ScheduleFigures
from rankd.schedule.admission import Limits
from rankd.schedule.ledger import Job, Ledger, Work
from rankd.schedule.policy import Rules
from rankd.schedule.seats import Seat
from rankd.schedule.served import Asked, Part, Served, When
from rankd.schedule.waiting import NEVER

log = logging.getLogger("rankd")
Item = TypeVar("Item")
Result = TypeVar("Result")
Executor = TypeVar("Executor")
Answer = TypeVar("Answer")
JOIN_SECONDS = 0.2


class Scheduler(Generic[Item, Result, Executor]):
    """Runs requests on executors. `start()` begins, `close()` finishes what was accepted.

    `on_start` is called on each executor's thread, with its number, before the first call; it must not raise.
    `new_executor` makes one in place of one that was lost.
    """

    def __init__(
        self,
        executors: Sequence[Executor],
        served: Served[Item, Result, Executor],
        rules: Rules,
        limits: Limits,
        new_executor: Callable[[], Executor],
        hang_seconds: float = 10.0,
        name: str = "rankd",
        clock: Callable[[], float] = time.perf_counter,
        on_start: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.rules, self._served, self._clock, self._name = rules, served, clock, name
        self._new_executor, self._on_start, self._hang_seconds = new_executor, on_start, hang_seconds
        self._ledger: Ledger[Item] = Ledger(rules, limits)
        self._futures: dict[Job[Item], Future[Result]] = {}
        self._counts = ScheduleCounts()
        self._seats = [Seat[Item, Executor](number, executor) for number, executor in enumerate(executors)]
        self._idle, self._closed, self._ended = 0, True, False
        self._lock = threading.Lock()  # guards everything above
        self._changed, self._watched = threading.Condition(self._lock), threading.Condition(self._lock)
        self._watch_until = NEVER
        self._watcher = threading.Thread(target=self._watch, name=f"{name}-watch", daemon=True)

    def start(self) -> None:
        """Start the threads; from here on requests are accepted."""
        self._closed = False
        for seat in self._seats:
            self._start(seat)
        self._watcher.start()

    def close(self) -> None:
        """Accept no more, finish what was accepted, end the threads."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        while left := [seat.thread for seat in self._seats if seat.thread is not None and seat.thread.is_alive()]:
            left[0].join(JOIN_SECONDS)  # not for ever: another one may take the seat of one that hangs
        with self._lock:
            self._ended = True
            self._watched.notify()
        self._watcher.join()

    @property
    def unfinished(self) -> int:
        """Requests accepted and not answered."""
        return self._ledger.waiting.count

    def figures(self) -> ScheduleFigures:
        """A snapshot."""
        with self._lock:
            waiting, errors = self._ledger.waiting, self.rules.costs.errors()
            return ScheduleFigures(
                replace(self._counts), waiting.count, waiting.total_rows(), waiting.total_ms(), errors
            )

    def check_room(self, asked: Asked) -> None:
        """Do nothing if a request would be accepted now.

        Raises:
            Unavailable: the schedule is not started, or is closing.
            Overloaded, DeadlineExceeded: see `admission.check`.
        """
        with self._lock:
            self._admitted(lambda: self._ledger.check(asked, self._clock()))

    def submit(self, item: Item, asked: Asked, when: When | None = None) -> Future[Result]:
        """Accept a request; it is run when it is its turn and, if `when` is given, that has called.

        Raises:
            Unavailable, Overloaded, DeadlineExceeded: as `check_room`.
        """
        future: Future[Result] = Future()
        with self._lock:
            job = self._admitted(lambda: self._ledger.accept(item, asked, self._clock()))
            self._counts.accepted += 1
            self._futures[job] = future
            if when is None:
                self._come(job)
            if asked.deadline is not None and asked.deadline < self._watch_until:
                self._watched.notify()
        future.add_done_callback(lambda done: self._cancelled(job, done) if done.cancelled() else None)
        if when is not None:
            self._call_when(when, job)
        return future

    def _admitted(self, ask: Callable[[], Answer]) -> Answer:
        if self._closed:
            raise Unavailable("this model is not taking requests: it is loading or being unloaded; try again soon")
        try:
            return ask()
        except RankdError:
            self._counts.refused += 1
            raise

    def _call_when(self, when: When, job: Job[Item]) -> None:
        def come() -> None:
            with self._lock:
                self._come(job)

        try:
            when(come)
        except Exception as error:  # noqa: BLE001 - it would be waited for without end
            self._end(job, error)

    def _come(self, job: Job[Item]) -> None:
        """Under the lock."""
        self._ledger.comes(job)
        # On a close every thread waits for the last of those that were accepted.
        self._changed.notify_all() if self._closed else self._changed.notify()

    def _start(self, seat: Seat[Item, Executor]) -> None:
        name = f"{self._name}-executor-{seat.number}"
        seat.thread = threading.Thread(target=self._sit, args=(seat,), name=name, daemon=True)
        seat.thread.start()

    def _sit(self, seat: Seat[Item, Executor]) -> None:
        self._on_start(seat.number)
        while (work := self._next(seat)) is not None:
            try:
                self._run(work, seat)
            except Exception as error:  # noqa: BLE001 - the edge of the thread: the executor is in doubt
                self._fault(work, seat, error)
            self._leave(work, seat)

    def _next(self, seat: Seat[Item, Executor]) -> Work[Item] | None:
        """What this executor does now; None when the schedule is closed and all is done, or the seat is given up."""
        while True:
            with self._lock:
                self._idle += 1
                late, ended = self._wait_for_work(seat)
                self._idle -= 1
            self._end_late(late)
            if ended or seat.work is not None:
                return seat.work

    def _wait_for_work(self, seat: Seat[Item, Executor]) -> tuple[list[Job[Item]], bool]:
        """Under the lock: give the seat work, as soon as there is some. Requests that are late, and whether the seat's
        time is over."""
        while not seat.lost:
            started = self._clock()
            late = self._ledger.late(started)
            work = self._ledger.next(self._idle, started)
            self._counts.decisions += 1
            self._counts.decision_seconds += self._clock() - started
            if work is not None:
                seat.work, seat.since = work, started
                if self._idle > 1:
                    self._changed.notify()  # there may be something for another one too
            if late or work is not None:
                return late, False
            if self._closed and self._ledger.empty:
                self._changed.notify_all()
                return [], True
            self._changed.wait()
        return [], True

    def _run(self, work: Work[Item], seat: Seat[Item, Executor]) -> None:
        """A call: prepare who is not prepared, assemble, score.

        Raises:
            Exception: the executor failed, and not a request.
        """
        for job in list(work.unprepared):
            if not job.over:
                self._prepare(job, work, seat)
        if not work.bucket:
            return
        if seat.given_up():
            return
        started, parts = self._clock(), list[Part[Item]]()
        for job, part in zip(work.jobs, work.parts, strict=True):
            if job.over:
                continue
            try:
                self._served.assemble(part, work.bucket, len(parts), seat.executor)
            except EngineFailure:
                raise
            except RankdError as error:
                self._end(job, error)
            else:
                parts.append(part)
        if not parts:
            return
        assembled = self._clock()
        logits = self._served.score(parts, work.bucket, seat.executor)
        scored = self._clock()
        with self._lock:
            if seat.given_up():
                return
            rows = sum(part.count for part in parts)
            for part, one in zip(parts, logits, strict=True):
                self._served.take(part, one)
            ended = self._ledger.done(work)
            self._counts.calls += 1
            self._counts.rows += rows
            self._counts.padded_rows += work.bucket * len(parts) - rows
        milliseconds = (assembled - started) * 1e3, (scored - assembled) * 1e3
        self.rules.costs.saw_score(work.bucket, len(parts), rows, *milliseconds)
        for job in ended:
            self._finish(job)

    def _prepare(self, job: Job[Item], work: Work[Item], seat: Seat[Item, Executor]) -> None:
        started = self._clock()
        try:
            when = self._served.prepare(job.item, seat.executor, job.losses > 0)
        except EngineFailure:
            raise
        except RankdError as error:
            self._end(job, error)
            return
        with self._lock:
            if seat.given_up():
                return
            if when is None:
                self._ledger.prepared(job)
                self._changed.notify()
            else:
                self._ledger.waits(work, job)
                free = self._ledger.leave([job])
        if when is None:
            self.rules.costs.saw_prepare(job.asked.resident, (self._clock() - started) * 1e3)
        else:
            self._drop(free)
            self._call_when(when, job)

    def _finish(self, job: Job[Item]) -> None:
        """Answer a request whose parts are all there."""
        future = self._futures.pop(job)
        try:
            result = self._served.finish(job.item)
        except Exception as error:  # noqa: BLE001 - it belongs to who waits for it
            _fail(future, error)
            self._count("failed")
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(result)
            self._count("finished")

    def _end(self, job: Job[Item], error: Exception) -> None:
        """A request has failed, if it had not ended before."""
        if (future := self._taken_out(job)) is not None:
            _fail(future, error)
            self._count("late" if isinstance(error, DeadlineExceeded) else "failed")

    def _taken_out(self, job: Job[Item]) -> Future[Result] | None:
        """End a request; its Future, if it had not ended before."""
        with self._lock:
            first = self._ledger.end(job)
            free = [job] if self._ledger.droppable(job) else []
            future = self._futures.pop(job) if first else None
        self._drop(free)
        return future

    def _end_late(self, jobs: Sequence[Job[Item]]) -> None:
        for job in jobs:
            waited_ms = (self._clock() - job.accepted) * 1e3
            message = (
                f"timeout_ms passed, or could not be kept any more, {waited_ms:.0f} ms after the request came: "
                f"{job.done} of {job.asked.rows} candidates were scored"
            )
            _fail(self._futures.pop(job), DeadlineExceeded(message))
            self._count("late")
        with self._lock:
            free = [job for job in jobs if self._ledger.droppable(job)]
        self._drop(free)

    def _cancelled(self, job: Job[Item], future: Future[Result]) -> None:
        if self._taken_out(job) is not None:
            future.set_running_or_notify_cancel()
            self._count("cancelled")

    def _leave(self, work: Work[Item], seat: Seat[Item, Executor]) -> None:
        with self._lock:
            seat.work, seat.since = None, NEVER
            free = self._ledger.leave(work.jobs)
            if self._closed and self._ledger.empty:
                self._changed.notify_all()
        self._drop(free)

    def _drop(self, jobs: Sequence[Job[Item]]) -> None:
        for job in jobs:
            self._served.drop(job.item)

    def _count(self, what: str) -> None:
        with self._lock:
            setattr(self._counts, what, getattr(self._counts, what) + 1)

    def _fault(self, work: Work[Item], seat: Seat[Item, Executor], error: Exception) -> None:
        """The executor raised: another one in its place, on the same thread."""
        log.error("executor %d of '%s' failed and is replaced", seat.number, self._name, exc_info=error)
        with self._lock:
            if seat.given_up():
                return
        try:
            seat.executor = self._new_executor()
        except Exception:  # the old one may still do
            log.exception("executor %d of '%s' could not be replaced", seat.number, self._name)
        self._lose(work, error)

    def _lose(self, work: Work[Item], error: Exception) -> None:
        """What a lost executor had is run again, or fails."""
        with self._lock:
            ended = self._ledger.lost(work)
            self._counts.lost_executors += 1
            self._counts.run_again += len(work.jobs) - len(ended)
            self._changed.notify_all()
        for job in ended:
            _fail(self._futures.pop(job), error)
            self._count("failed")

    def _watch(self) -> None:
        """End requests whose time is over, and give up executors that hang."""
        while True:
            with self._lock:
                if self._ended:
                    return
                now = self._clock()
                late = self._ledger.late(now)
                hung = [seat for seat in self._seats if seat.hangs(now, self._hang_seconds)]
                for seat in hung:
                    seat.lost = True
            self._end_late(late)
            for seat in hung:
                self._replace(seat)
            with self._lock:
                self._watch_until = self._ledger.next_deadline()
                left = min(self._watch_until - self._clock(), self._hang_seconds / 4)
                if not self._ended and left > 0:
                    self._watched.wait(left)

    def _replace(self, seat: Seat[Item, Executor]) -> None:
        """Put another executor on a thread of its own into the place of one that hangs."""
        work = seat.work
        assert work is not None  # noqa: S101 - it hangs in it
        log.error("executor %d of '%s' hangs and is replaced", seat.number, self._name)
        for job in work.unprepared:
            self._served.abandon(job.item)
        other = Seat[Item, Executor](seat.number, seat.executor)
        try:
            other.executor = self._new_executor()
        except Exception:  # then there is one executor less, for the old one is in use
            log.exception("executor %d of '%s' could not be replaced", seat.number, self._name)
        else:
            with self._lock:
                self._seats[seat.number] = other
                self._start(other)
        self._lose(work, EngineFailure(f"the engine did not answer for {self._hang_seconds:g} s, twice"))


def _fail(future: Future[Result], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
