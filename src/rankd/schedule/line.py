"""The waiting line of one model: a bounded queue and one thread for each executor.

In: a job (a function of an Executor) with a deadline. Out: a Future. A job whose deadline has passed when its turn
comes is not run; when the line is full a job is refused at once with the time after which a place should be free. Each
executor is touched by its own thread alone. Every job that was accepted ends exactly once: a result, an error, or
cancelled.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rankd.engine.backend import Executor
from rankd.errors import DeadlineExceeded, Overloaded, Unavailable

T = TypeVar("T")
SMOOTHING = 0.1


@dataclass(slots=True)
class _Job:
    run: Callable[[Executor], Any]
    deadline: float | None
    future: Future[Any] = field(default_factory=Future)


class WaitingLine:
    """Runs jobs on executors in the order of their arrival. `start()` begins, `close()` finishes what was accepted."""

    def __init__(
        self,
        executors: list[Executor],
        max_waiting: int,
        name: str = "rankd",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._executors, self._max_waiting, self._clock = executors, max_waiting, clock
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unfinished = 0
        self._closed = True
        self._mean_seconds = 0.0
        self._threads = [
            threading.Thread(target=self._work, args=(executor,), name=f"{name}-executor-{number}", daemon=True)
            for number, executor in enumerate(executors)
        ]

    def start(self) -> None:
        """Start the threads; from here on jobs are accepted."""
        self._closed = False
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Accept no more, run what was accepted, end the threads."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    @property
    def waiting(self) -> int:
        """Jobs accepted and not yet finished, those being run included."""
        return self._unfinished

    def submit(self, run: Callable[[Executor], T], deadline: float | None = None) -> Future[T]:
        """Queue a job. `deadline` is in seconds of the line's clock.

        Raises:
            Unavailable: the line is not started, or is closing.
            Overloaded: as many jobs wait as are allowed.
        """
        job = _Job(run, deadline)
        with self._lock:
            if self._closed:
                raise Unavailable("this model is not taking requests: it is loading or being unloaded; try again soon")
            if self._unfinished >= self._max_waiting + len(self._executors):
                seconds = self._mean_seconds * self._unfinished / len(self._executors)
                raise Overloaded(
                    f"{self._unfinished} requests are being served or waiting, {self._max_waiting} may wait; "
                    f"try again in {seconds:.2f} s",
                    retry_after_s=seconds,
                )
            self._unfinished += 1
            self._jobs.put(job)
        return job.future

    def _work(self, executor: Executor) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._run(job, executor)
            finally:
                with self._lock:
                    self._unfinished -= 1

    def _run(self, job: _Job, executor: Executor) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        started = self._clock()
        if job.deadline is not None and started >= job.deadline:
            job.future.set_exception(DeadlineExceeded("the request's time was over before its turn came"))
            return
        try:
            result = job.run(executor)
        except BaseException as error:  # noqa: BLE001 - the edge of the thread: whatever it is belongs to the waiter
            job.future.set_exception(error)
        else:
            job.future.set_result(result)
        self._mean_seconds += SMOOTHING * (self._clock() - started - self._mean_seconds)
