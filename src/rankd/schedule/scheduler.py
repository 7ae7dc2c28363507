"""The schedule of one model: a thread for each executor that works on what the policy says, and one that watches them.

In: items with what they need (`served.Asked`). Out: a Future each. `submit` admits or refuses at once. Then a request
is prepared, its candidates are scored in one call or several, on one executor or several, and it is finished; one that
is cancelled or out of time leaves at once. `ledger.py` keeps the book, `policy.py` decides.

An executor that raises what is no error of a request, or that takes much longer than it should, is lost: another one
takes its place, and what it had is run once more. Meanwhile the others work, and while there is none requests fail. The
thread of one that hangs is left alone; it ends when its call does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

from rankd.errors import EngineFailure, RankdError, Unavailable
from rankd.observe.schedule_metrics import KindCounts, ScheduleFigures, worst
from rankd.schedule.admission import Limits
from rankd.schedule.core_sharing import Cores, Sharer
from rankd.schedule.endings import Answers, guarded
from rankd.schedule.kinds import Mix
from rankd.schedule.ledger import Job, Ledger, Work
from rankd.schedule.policy import Rules
from rankd.schedule.seats import Seat, kind_figures, seats_of, standings
from rankd.schedule.served import Asked, Part, Served, When
from rankd.schedule.waiting import NEVER
from rankd.schedule.watch import Watch

log = logging.getLogger("rankd")
Item = TypeVar("Item")
Result = TypeVar("Result")
Executor = TypeVar("Executor")
Answer = TypeVar("Answer")
JOIN_SECONDS = 0.2


class Scheduler(Generic[Item, Result, Executor]):
    """Runs requests on executors: of one kind, or of as many as there are `rules.kinds`, those of the first first.
    `on_start` is called on each executor's thread, with its number, before the first call. `new_executors` make one
    of each kind in place of one that was lost. `cores` are those that it shares with others; None: with nobody."""

    def __init__(
        self,
        executors: Sequence[Executor],
        served: Served[Item, Result, Executor],
        rules: Rules | Mix,
        limits: Limits,
        new_executors: Sequence[Callable[[], Executor]],
        hang_seconds: float = 10.0,
        name: str = "rankd",
        clock: Callable[[], float] = time.perf_counter,
        on_start: Callable[[int], None] = lambda number: None,
        cores: Cores | None = None,
    ) -> None:
        self.rules, self.all_rules, self._served, self._clock, self._name = rules.kinds[0], rules, served, clock, name
        self._new_executors, self._on_start, self._hang_seconds = new_executors, on_start, hang_seconds
        self._cores = cores or Cores()
        self._ledger: Ledger[Item] = Ledger(rules, limits, self._cores.waitings)
        self._seats: list[Seat[Item, Executor]] = seats_of(executors, rules.kinds)
        self._kind_counts = [KindCounts() for _ in rules.kinds]
        self._closed = True
        self._lock = self._cores.lock  # guards everything above
        self._changed, self._all_ended = threading.Condition(self._lock), threading.Condition(self._lock)
        waiting, count = self._ledger.waiting, len(self._seats)
        self._sharer = Sharer(waiting, count, self._changed, kinds=len(rules.kinds), speed=rules.speed)
        self._answers: Answers[Item, Result] = Answers(self._lock, self._ledger, served, self._some_ended, clock)
        self._watch = Watch(self._lock, self._look, self._due, f"{name}-watch")

    def start(self) -> None:
        """Start the threads; from here on requests are accepted."""
        with self._lock:
            self._cores.join(self._sharer)
        self._closed = False
        for seat in self._seats:
            self._start(seat)
        self._watch.start()

    def close(self) -> None:
        """Accept no more, finish what was accepted, end the threads; one that hangs is left behind."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._all_ended.wait_for(lambda: self._ledger.empty)
            self._changed.notify_all()
        while left := [thread for seat in self._seats if (thread := seat.coming_back())]:
            left[0].join(JOIN_SECONDS)  # not for ever: it may be found to hang
        with self._lock:
            self._cores.leave(self._sharer)
        self._watch.stop()

    @property
    def executors(self) -> list[Executor]:
        """Those that work now, or are being replaced."""
        with self._lock:
            return [seat.executor for seat in self._seats]

    @property
    def unfinished(self) -> int:
        """Requests accepted and not answered."""
        return self._ledger.waiting.count

    def figures(self) -> ScheduleFigures:
        """A snapshot."""
        with self._lock:
            waiting, kinds = self._ledger.waiting, kind_figures(self.all_rules.kinds, self._kind_counts)
            counts, margin = replace(self._answers.counts), self._ledger.margin.value
            before = waiting.count, waiting.total_rows(), waiting.total_ms()
            return ScheduleFigures(counts, *before, worst([one.errors for one in kinds]), margin, kinds)

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
        with self._lock:
            job = self._admitted(lambda: self._ledger.accept(item, asked, self._clock()))
            future = self._answers.promise(job)
            if when is None:
                self._come(job)
            if asked.deadline is not None:
                self._watch.by(asked.deadline)
        self._answers.watch(job, future)
        if when is not None:
            self._call_when(when, job)
        return future

    def _admitted(self, ask: Callable[[], Answer]) -> Answer:
        if self._closed:
            raise Unavailable("this model is not taking requests: it is loading or being unloaded; try again soon")
        try:
            return ask()
        except RankdError:
            self._answers.counts.refused += 1
            raise

    def _call_when(self, when: When, job: Job[Item]) -> None:
        def come() -> None:
            with self._lock:
                self._come(job)

        try:
            when(come)
        except Exception as error:  # noqa: BLE001 - it would be waited for without end
            self._answers.end(job, error)

    def _come(self, job: Job[Item]) -> None:
        """Under the lock."""
        self._ledger.comes(job)
        self._sharer.tell()

    def _some_ended(self) -> None:
        """Under the lock, whenever requests have: on a close everybody waits for the last one."""
        if self._closed and self._ledger.empty:
            self._changed.notify_all()
            self._all_ended.notify_all()

    def _start(self, seat: Seat[Item, Executor]) -> None:
        name = f"{self._name}-executor-{seat.number}"
        seat.thread = threading.Thread(target=self._sit, args=(seat,), name=name, daemon=True)
        seat.thread.start()

    def _sit(self, seat: Seat[Item, Executor] | None) -> None:
        """The thread of a seat, and of those that take its place after a fault."""
        while seat is not None:
            self._on_start(seat.number)
            failed = self._work(seat)
            seat = self._replacement(seat) if failed else None

    def _work(self, seat: Seat[Item, Executor]) -> bool:
        """Do what there is to do; whether the executor has failed. If not the seat's time is over."""
        failed = False
        while not failed and (work := self._next(seat)) is not None:
            try:
                self._run(work, seat)
            except Exception as error:  # noqa: BLE001 - the edge of the thread: the executor is in doubt
                failed = self._fault(work, seat, error)
            self._leave(work, seat)
        seat.failing = False
        return failed

    def _next(self, seat: Seat[Item, Executor]) -> Work[Item] | None:
        """What this executor does now; None when the schedule is closed and all is done, or the seat is given up."""
        while True:
            with self._lock:
                self._sharer.idle += 1
                try:
                    late, ended = self._wait_for_work(seat)
                finally:
                    self._sharer.idle -= 1
            self._answers.end_late(late)
            if ended or seat.work is not None:
                return seat.work

    def _wait_for_work(self, seat: Seat[Item, Executor]) -> tuple[list[Job[Item]], bool]:
        """Under the lock: give the seat work, as soon as there is some. Requests that are late, and whether the seat's
        time is over."""
        while not seat.lost:
            started = self._clock()
            late = self._ledger.late(started)
            work = self._decide(seat, started)
            self._answers.counts.decisions += 1
            self._answers.counts.decision_seconds += self._clock() - started
            if work is not None:
                seat.work, seat.since = work, started
                self._cores.take(seat, self._sharer, seat.kind)
                if self._sharer.idle > 1:
                    self._sharer.tell()  # there may be something for another one too
            if late or work is not None:
                return late, False
            if self._closed and self._ledger.empty:
                return [], True
            again = self._ledger.again
            self._changed.wait(None if again == NEVER else max(again - started, 0.0))
        return [], True

    def _decide(self, seat: Seat[Item, Executor], now: float) -> Work[Item] | None:
        """Under the lock: what the seat's executor does now."""
        self._ledger.again, kinds = NEVER, len(self._kind_counts)
        idle = self._cores.idle_for(self._sharer)
        if not idle or kinds == 1:
            return self._ledger.next(idle, now, busy=self._cores.busy()) if idle else None
        standing = standings(self._seats, kinds, self._cores)
        return self._ledger.next(min(idle, standing[seat.kind].idle), now, seat.kind, standing)

    def _run(self, work: Work[Item], seat: Seat[Item, Executor]) -> None:
        """A call: prepare who is not prepared, assemble, score.

        Raises:
            Exception: the executor failed, and not a request.
        """
        for job in list(work.unprepared):
            if not job.over and not seat.given_up():
                self._prepare(job, work, seat)
        if not work.bucket or seat.given_up():
            return
        started, parts = self._clock(), list[Part[Item]]()
        for job, part in zip(work.jobs, work.parts, strict=True):
            if job.over:
                continue
            try:
                self._served.assemble(part, work.bucket, len(parts), seat.executor)
            except EngineFailure:
                raise
            except Exception as error:  # noqa: BLE001 - no news of the engine: it is this request's
                self._answers.end(job, error)
            else:
                parts.append(part)
        if not parts:
            return
        assembled, busy = self._clock(), self._cores.busy(seat.kind)
        logits = self._served.score(parts, work.bucket, seat.executor)
        scored, costs = self._clock(), self.all_rules.kinds[seat.kind].costs
        contention = costs.speed.between(busy, self._cores.busy(seat.kind))
        with self._lock:
            if seat.given_up():
                return
            rows = sum(part.count for part in parts)
            for part, one in zip(parts, logits, strict=True):
                self._served.take(part, one)
            ended = self._ledger.done(work)
            self._some_ended()
            self._answers.counts.calls += 1
            self._answers.counts.rows += rows
            self._kind_counts[seat.kind].calls += 1
            self._kind_counts[seat.kind].rows += rows
            self._answers.counts.padded_rows += work.bucket * len(parts) - rows
        for job in ended:
            self._answers.finish(job)
        milliseconds = (assembled - started) * 1e3, (scored - assembled) * 1e3
        costs.saw_score(work.bucket, len(parts), rows, *milliseconds, contention)

    def _prepare(self, job: Job[Item], work: Work[Item], seat: Seat[Item, Executor]) -> None:
        started, busy = self._clock(), self._cores.busy(seat.kind)
        try:
            when = self._served.prepare(job.item, seat.executor, job.losses > 0, work.wide)
        except EngineFailure:
            raise
        except Exception as error:  # noqa: BLE001 - no news of the engine: it is this request's
            self._answers.end(job, error)
            return
        with self._lock:
            if seat.given_up():
                return
            if when is None:
                self._ledger.prepared(job)
                self._sharer.tell()
            else:
                self._ledger.waits(work, job)
                free = self._ledger.leave([job])
        if when is None:
            asked, taken_ms = job.asked, (self._clock() - started) * 1e3
            if not work.wide:  # predictions are for a machine with more to do
                costs = self.all_rules.kinds[seat.kind].costs
                contention = costs.speed.between(busy, self._cores.busy(seat.kind))
                costs.saw_prepare(asked.resident, asked.tokens, taken_ms, contention)
        else:
            self._answers.drop(free)
            self._call_when(when, job)

    def _leave(self, work: Work[Item], seat: Seat[Item, Executor]) -> None:
        with self._lock:
            self._kind_counts[seat.kind].busy_seconds += self._clock() - seat.since
            seat.work, seat.since = None, NEVER
            self._cores.give_back(seat)
            free = self._ledger.leave(work.jobs)
        self._answers.drop(free)

    def _fault(self, work: Work[Item], seat: Seat[Item, Executor], error: Exception) -> bool:
        """The executor raised: the seat is lost with it, if it had not been given up before; whether it had not."""
        with self._lock:
            if seat.given_up():
                return False
            seat.lost = seat.failing = True
            self._cores.give_back(seat)
        log.error("executor %d of '%s' failed and is replaced", seat.number, self._name, exc_info=error)
        self._lose(work, error)
        guarded(partial(self._served.let_go, seat.executor))
        return True

    def _lose(self, work: Work[Item], error: Exception) -> None:
        """What a lost executor had is run again, or fails."""
        with self._lock:
            again, ended = not work.settled, self._ledger.lost(work)
            self._some_ended()
            self._answers.counts.lost_executors += 1
            self._answers.counts.run_again += again and sum(not job.over for job in work.jobs)
            self._changed.notify_all()
        self._answers.fail(ended, error)

    def _look(self) -> None:
        """End requests whose time is over, and give up executors that hang."""
        with self._lock:
            now = self._clock()
            late = self._ledger.late(now)
            hung = [(one, one.work) for one in self._seats if one.work and one.hangs(now, self._hang_seconds)]
            for seat, _ in hung:
                seat.lost = True
                self._cores.give_back(seat)
        self._answers.end_late(late)
        for seat, work in hung:
            self._give_up(seat, work)

    def _due(self) -> tuple[float, float]:
        """When to look again: at the next deadline, and often enough to find what hangs."""
        moment = self._ledger.next_deadline()
        return moment, min(moment - self._clock(), self._hang_seconds / 4)

    def _give_up(self, seat: Seat[Item, Executor], work: Work[Item]) -> None:
        """Leave an executor that hangs alone, hand out what it had, and begin to put another one into its place."""
        log.error("executor %d of '%s' hangs and is replaced", seat.number, self._name)
        for job in work.unprepared:
            guarded(partial(self._served.abandon, job.item, seat.executor))
        self._lose(work, EngineFailure(f"the engine did not answer for {self._hang_seconds:g} s, twice"))
        guarded(partial(self._served.let_go, seat.executor))
        name, replace = f"{self._name}-replacing", lambda: self._sit(self._replacement(seat))
        threading.Thread(target=replace, name=name, daemon=True).start()

    def _replacement(self, lost: Seat[Item, Executor]) -> Seat[Item, Executor] | None:
        """A seat in place of a lost one, with another executor, however often making one fails; None if it is not
        needed any more."""
        seat = None
        while seat is None and not self._watch.ended:
            try:
                executor = self._new_executors[lost.kind]()
                seat = Seat[Item, Executor](lost.number, executor, lost.kind, threading.current_thread())
            except Exception:
                log.exception("executor %d of '%s' could not be replaced", lost.number, self._name)
                with self._lock:
                    nobody = self._ledger.everybody() if all(one.lost for one in self._seats) else []
                for job in nobody:
                    self._answers.end(job, EngineFailure("the engine was lost, and cannot be started anew"))
                time.sleep(self._hang_seconds / 4)
        with self._lock:
            if seat is not None and not self._watch.ended:
                self._seats[seat.number] = seat
                return seat
        if seat is not None:
            guarded(partial(self._served.let_go, seat.executor))
        return None
