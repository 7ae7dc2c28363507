"""The waiting line of one model: a bounded queue and one thread for each executor.

In: items with deadlines. Out: a Future each. An item may be accepted before it is ready: it counts, and takes its place
when it is. A thread takes the oldest item and, of those right behind it, as many as `joins` lets into the same call, so
order is kept. An item whose deadline has passed when its turn comes is not run;
when the line is full an item is refused at once, with the time after which a place should be free. Each executor is
touched by its own thread alone. Every item that was accepted ends exactly once: a result, an error, or cancelled.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rankd.engine.backend import Executor
from rankd.errors import DeadlineExceeded, Overloaded, Unavailable

Item = TypeVar("Item")
When = Callable[[Callable[[], None]], None]
"""Calls what it is given once, when an item is ready; from any thread, or before it returns."""
Result = TypeVar("Result")
SMOOTHING = 0.1


@dataclass(slots=True)
class _Job(Generic[Item, Result]):
    item: Item
    deadline: float | None
    future: Future[Result] = field(default_factory=Future)


class WaitingLine(Generic[Item, Result]):
    """Runs items on executors in the order of their arrival. `start()` begins, `close()` finishes what was accepted.

    `run` computes some items in one call and answers each with a result or an error; `joins` says whether a waiting
    item may join those that are about to be run. `on_start` is called on each executor's thread, with its number,
    before the first job; it must not raise.
    """

    def __init__(
        self,
        executors: Sequence[Executor],
        run: Callable[[Sequence[Item], Executor], Sequence[Result | Exception]],
        max_waiting: int,
        joins: Callable[[Sequence[Item], Item], bool] = lambda chosen, item: False,
        name: str = "rankd",
        clock: Callable[[], float] = time.perf_counter,
        on_start: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._run, self._joins, self._on_start = run, joins, on_start
        self._num_executors, self._max_waiting, self._clock = len(executors), max_waiting, clock
        self._jobs: deque[_Job[Item, Result]] = deque()
        self._changed = threading.Condition()  # guards everything below and the deque
        self._unfinished = self._not_ready = 0
        self._closed = True
        self._mean_seconds = 0.0
        self._threads = [
            threading.Thread(target=self._work, args=(number, executor), name=f"{name}-executor-{number}", daemon=True)
            for number, executor in enumerate(executors)
        ]

    def start(self) -> None:
        """Start the threads; from here on items are accepted."""
        self._closed = False
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Accept no more, run what was accepted, end the threads."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def waiting(self) -> int:
        """Items accepted and not yet finished, those being run included."""
        return self._unfinished

    @property
    def mean_seconds(self) -> float:
        """What an item takes an executor, on the average of the latest."""
        return self._mean_seconds

    def check_room(self) -> None:
        """Do nothing if an item would be accepted now.

        Raises:
            Unavailable: the line is not started, or is closing.
            Overloaded: as many items wait as are allowed.
        """
        if self._closed:
            raise Unavailable("this model is not taking requests: it is loading or being unloaded; try again soon")
        if self._unfinished >= self._max_waiting + self._num_executors:
            seconds = self._mean_seconds * self._unfinished / self._num_executors
            raise Overloaded(
                f"{self._unfinished} requests are being served or waiting, {self._max_waiting} may wait; "
                f"try again in {seconds:.2f} s",
                retry_after_s=seconds,
            )

    def submit(self, item: Item, deadline: float | None = None, when: When | None = None) -> Future[Result]:
        """Accept an item, and queue it (`when` it is ready). `deadline` is in seconds of the line's clock.

        Raises:
            Unavailable, Overloaded: as `check_room`.
        """
        job: _Job[Item, Result] = _Job(item, deadline)
        with self._changed:
            self.check_room()
            self._unfinished += 1
            if when is None:
                self._jobs.append(job)
                self._changed.notify()
            else:
                self._not_ready += 1
        if when is not None:
            when(lambda: self._enqueue(job))
        return job.future

    def _enqueue(self, job: _Job[Item, Result]) -> None:
        with self._changed:
            self._not_ready -= 1
            self._jobs.append(job)
            # On a close every thread waits for the last of those that were accepted.
            self._changed.notify_all() if self._closed else self._changed.notify()

    def _work(self, number: int, executor: Executor) -> None:
        self._on_start(number)
        while jobs := self._next():
            try:
                self._finish(jobs, executor)
            finally:
                with self._changed:
                    self._unfinished -= len(jobs)

    def _next(self) -> list[_Job[Item, Result]]:
        """The jobs of the next call; none when the line is closed and empty."""
        with self._changed:
            while not self._jobs and (self._not_ready or not self._closed):
                self._changed.wait()
            if not self._jobs:
                return []
            chosen = [self._jobs.popleft()]
            while self._jobs and self._joins([job.item for job in chosen], self._jobs[0].item):
                chosen.append(self._jobs.popleft())
            return chosen

    def _finish(self, jobs: Sequence[_Job[Item, Result]], executor: Executor) -> None:
        started = self._clock()
        due = []
        for job in jobs:
            if not job.future.set_running_or_notify_cancel():
                continue
            if job.deadline is not None and started >= job.deadline:
                job.future.set_exception(DeadlineExceeded("the request's time was over before its turn came"))
                continue
            due.append(job)
        if not due:
            return
        try:
            results = self._run([job.item for job in due], executor)
        except BaseException as error:  # noqa: BLE001 - the edge of the thread: whatever it is belongs to the waiters
            for job in due:
                job.future.set_exception(error)
        else:
            for job, result in zip(due, results, strict=True):
                if isinstance(result, Exception):
                    job.future.set_exception(result)
                else:
                    job.future.set_result(result)
        self._mean_seconds += SMOOTHING * ((self._clock() - started) / len(due) - self._mean_seconds)
