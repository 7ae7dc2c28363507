"""How requests end: their Futures are answered, which owners may have cancelled, and what they held is given back.

In: jobs of the ledger and what became of them. Out: nothing; whoever asked is told. Each Future is answered once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, TypeVar

from rankd.errors import DeadlineExceeded
from rankd.observe.schedule_metrics import ScheduleCounts
from rankd.schedule.ledger import Job, Ledger
from rankd.schedule.served import Served

log = logging.getLogger("rankd")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Answers(Generic[Item, Result]):
    """The Futures of a ledger's requests, and what was counted of them. `lock` guards the ledger, the Futures and the
    counts; `on_end` is called under it whenever requests have ended. Nobody is told anything under the lock."""

    def __init__(
        self,
        lock: threading.Lock,
        ledger: Ledger[Item],
        served: Served[Item, Result, Any],
        on_end: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._lock, self._ledger, self._served, self._on_end, self._clock = lock, ledger, served, on_end, clock
        self._futures: dict[Job[Item], Future[Result]] = {}
        self.counts = ScheduleCounts()

    def promise(self, job: Job[Item]) -> Future[Result]:
        """Under the lock: the Future of a request that was accepted."""
        self.counts.accepted += 1
        future: Future[Result] = Future()
        self._futures[job] = future
        return future

    def watch(self, job: Job[Item], future: Future[Result]) -> None:
        """Without the lock: a request ends when its Future is cancelled."""
        future.add_done_callback(lambda done: self._cancelled(job, done) if done.cancelled() else None)

    def finish(self, job: Job[Item]) -> None:
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

    def end(self, job: Job[Item], error: Exception) -> None:
        """A request has failed, if it had not ended before."""
        if (future := self._taken_out(job)) is not None:
            _fail(future, error)
            self._count("late" if isinstance(error, DeadlineExceeded) else "failed")

    def fail(self, jobs: Sequence[Job[Item]], error: Exception) -> None:
        """The ledger has ended these."""
        for job in jobs:
            _fail(self._futures.pop(job), error)
            self._count("failed")

    def end_late(self, jobs: Sequence[Job[Item]]) -> None:
        """The ledger has ended these, since their time is over."""
        for job in jobs:
            _fail(self._futures.pop(job), _too_late(job, self._clock()))
            self._count("late")
        with self._lock:
            self._on_end()
            free = [job for job in jobs if self._ledger.droppable(job)]
        self.drop(free)

    def drop(self, jobs: Sequence[Job[Item]]) -> None:
        """Give back what is held for requests that nobody works on any more."""
        for job in jobs:
            guarded(partial(self._served.drop, job.item))

    def _taken_out(self, job: Job[Item]) -> Future[Result] | None:
        """End a request; its Future, if it had not ended before."""
        with self._lock:
            first = self._ledger.end(job)
            self._on_end()
            free = [job] if self._ledger.droppable(job) else []
            future = self._futures.pop(job) if first else None
        self.drop(free)
        return future

    def _cancelled(self, job: Job[Item], future: Future[Result]) -> None:
        if self._taken_out(job) is not None:
            future.set_running_or_notify_cancel()
            self._count("cancelled")

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts.add(what)


def guarded(call: Callable[[], object]) -> None:
    """Call, and log what is raised: it must end neither this thread nor the requests that come after."""
    try:
        call()
    except Exception:  # whatever it is
        log.exception("what a request held could not be given back")


def _fail(future: Future[Result], error: Exception) -> None:
    """Give an error, unless it was cancelled."""
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def _too_late(job: Job[Item], now: float) -> DeadlineExceeded:
    """What a request is told whose time is over."""
    waited_ms = (now - job.accepted) * 1e3
    return DeadlineExceeded(
        f"timeout_ms passed, or could not be kept any more, {waited_ms:.0f} ms after the request came: {job.done} of "
        f"{job.asked.rows} candidates were scored"
    )
