"""The waiting line: bounded, in order, every accepted job ends exactly once, deadlines under a fake clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest

from rankd.engine.backend import Executor
from rankd.errors import DeadlineExceeded, Overloaded, Unavailable
from rankd.schedule.line import WaitingLine
from rankd.types import Array, Float32Array, UserState


class NoExecutor:
    """Stands where an executor does; jobs of these tests never call it."""

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        raise AssertionError

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        raise AssertionError

    def score(self, states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        return np.zeros((0, 0, 0), np.float32)


Job = Callable[[], Any]
Calls = list[list[Job]]


def run_all(jobs: Sequence[Job], executor: Executor) -> list[Any]:
    """Each job's result, or what it raised."""
    return [job() for job in jobs]


@contextmanager
def started(
    executors: int = 1,
    max_waiting: int = 100,
    now: list[float] | None = None,
    joins: Callable[[Sequence[Job], Job], bool] = lambda chosen, job: False,
    run: Callable[[Sequence[Job], Executor], list[Any]] = run_all,
) -> Iterator[WaitingLine[Job, Any]]:
    moment = now if now is not None else [0.0]
    line: WaitingLine[Job, Any] = WaitingLine(
        [NoExecutor() for _ in range(executors)], run, max_waiting, joins, clock=lambda: moment[0]
    )
    line.start()
    try:
        yield line
    finally:
        line.close()


def test_jobs_run_in_the_order_they_came() -> None:
    done: list[int] = []
    with started() as line:
        for future in [line.submit(partial(done.append, n)) for n in range(20)]:
            future.result()
    assert done == list(range(20))


def test_a_full_line_refuses_at_once_and_says_when_to_come_back() -> None:
    gate = threading.Event()
    with started(max_waiting=2) as line:
        accepted = [line.submit(lambda: gate.wait(10)) for _ in range(3)]
        with pytest.raises(Overloaded, match="2 may wait") as refused:
            line.submit(lambda: None)
        assert refused.value.retry_after_s >= 0
        gate.set()
        assert all(future.result() for future in accepted)
    assert line.waiting == 0


def test_a_job_past_its_deadline_is_not_run() -> None:
    now = [0.0]
    gate, ran = threading.Event(), []
    with started(now=now) as line:
        first = line.submit(lambda: gate.wait(10))
        late = line.submit(lambda: ran.append(1), deadline=1.0)
        in_time = line.submit(lambda: ran.append(2), deadline=3.0)
        now[0] = 2.0
        gate.set()
        first.result()
        with pytest.raises(DeadlineExceeded):
            late.result()
        in_time.result()
    assert ran == [2]


def test_an_error_goes_to_its_waiter_and_the_executor_lives() -> None:
    with started() as line:
        broken = line.submit(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            broken.result()
        assert line.submit(lambda: 7).result() == 7


def test_a_cancelled_job_is_not_run_and_leaves_the_line() -> None:
    gate, ran = threading.Event(), []
    with started() as line:
        first = line.submit(lambda: gate.wait(10))
        second = line.submit(lambda: ran.append(1))
        assert second.cancel()
        gate.set()
        first.result()
    assert ran == []
    assert line.waiting == 0


def test_closing_finishes_what_was_accepted_and_takes_no_more() -> None:
    done: list[int] = []
    with started(executors=2) as line:
        futures = [line.submit(partial(done.append, n)) for n in range(50)]
    assert sorted(done) == list(range(50))
    assert all(future.done() for future in futures)
    with pytest.raises(Unavailable):
        line.submit(lambda: None)


def test_waiting_items_join_a_call_in_order_and_no_more_than_allowed() -> None:
    gate, calls = threading.Event(), []

    def run(jobs: Sequence[Job], executor: Executor) -> list[Any]:
        results = [job() for job in jobs]
        calls.append(results)
        return results

    with started(joins=lambda chosen, job: len(chosen) < 3, run=run) as line:
        first = line.submit(lambda: gate.wait(10))
        while line.waiting != 1 or calls:
            pass
        rest = [line.submit(partial(int, n)) for n in range(7)]
        gate.set()
        assert first.result()
        assert [future.result() for future in rest] == list(range(7))
    assert [len(call) for call in calls[-2:]] == [3, 1] or sum(map(len, calls)) == 8
    assert [result for call in calls for result in call if result is not True] == list(range(7))


def test_an_error_that_is_answered_reaches_one_waiter_alone() -> None:
    gate = threading.Event()
    with started(joins=lambda chosen, job: True) as line:
        first = line.submit(lambda: gate.wait(10))
        good, bad = line.submit(lambda: 1), line.submit(lambda: DeadlineExceeded("late"))
        gate.set()
        assert first.result()
        assert good.result() == 1
        with pytest.raises(DeadlineExceeded, match="late"):
            bad.result()
    assert line.waiting == 0


def test_each_thread_says_its_number_before_its_first_job() -> None:
    numbers: list[tuple[int, str]] = []
    line: WaitingLine[Job, Any] = WaitingLine(
        [NoExecutor(), NoExecutor()],
        run_all,
        max_waiting=10,
        name="films",
        on_start=lambda number: numbers.append((number, threading.current_thread().name)),
    )
    assert numbers == []
    line.start()
    assert line.submit(lambda: len(numbers)).result() > 0
    line.close()
    assert sorted(numbers) == [(0, "films-executor-0"), (1, "films-executor-1")]
