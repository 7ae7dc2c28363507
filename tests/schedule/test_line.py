"""The waiting line: bounded, in order, every accepted job ends exactly once, deadlines under a fake clock."""

from __future__ import annotations

import random
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


class Readiness:
    """Items that are accepted now and ready when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def when(self, then: Callable[[], None]) -> None:
        self.waiting.append(then)


def test_items_take_their_places_in_the_order_in_which_they_are_ready() -> None:
    done: list[int] = []
    with started() as line:
        readiness = Readiness()
        futures = [line.submit(partial(done.append, n), when=readiness.when) for n in range(4)]
        line.submit(partial(done.append, 9)).result(20)
        assert done == [9]
        assert line.waiting == 4
        for number in (2, 0, 3, 1):
            readiness.waiting[number]()
            futures[number].result(20)
        assert line.submit(partial(done.append, 7), when=lambda then: then()).result(20) is None  # ready at once
    assert done == [9, 2, 0, 3, 1, 7]
    assert line.waiting == 0


def test_items_that_are_not_ready_count_against_the_limit() -> None:
    readiness = Readiness()
    with started(max_waiting=1) as line:
        accepted = [line.submit(partial(int, n), when=readiness.when) for n in range(2)]
        for when in (None, readiness.when):
            with pytest.raises(Overloaded, match="1 may wait"):
                line.submit(lambda: None, when=when)
        assert len(readiness.waiting) == 2  # nobody waits for who was refused
        readiness.waiting.pop()()
        assert accepted[1].result(20) == 1
        while line.waiting > 1:
            pass
        accepted.append(line.submit(partial(int, 2)))
        assert accepted[2].result(20) == 2
        readiness.waiting.pop()()
        assert accepted[0].result(20) == 0


def test_closing_waits_for_what_is_accepted_and_not_ready() -> None:
    readiness, done = Readiness(), list[int]()
    line: WaitingLine[Job, Any] = WaitingLine([NoExecutor(), NoExecutor()], run_all, max_waiting=10)
    line.start()
    futures = [line.submit(partial(done.append, n), when=readiness.when) for n in range(4)]
    closing = threading.Thread(target=line.close)
    closing.start()
    while True:  # until it takes no more
        try:
            line.check_room()
        except Unavailable:
            break
    for number in (3, 1, 0):
        readiness.waiting[number]()
        futures[number].result(20)
    assert closing.is_alive()
    readiness.waiting[2]()
    closing.join(20)
    assert not closing.is_alive()
    assert sorted(done) == [0, 1, 2, 3]
    assert line.waiting == 0


def test_an_item_that_is_ready_after_its_deadline_is_not_run() -> None:
    now, ran, readiness = [0.0], list[int](), Readiness()
    with started(now=now) as line:
        late, in_time = (line.submit(partial(ran.append, n), deadline=n, when=readiness.when) for n in (1, 3))
        now[0] = 2.0
        for ready in readiness.waiting:
            ready()
        with pytest.raises(DeadlineExceeded):
            late.result(20)
        in_time.result(20)
    assert ran == [3]


def test_an_item_that_is_cancelled_before_it_is_ready_leaves_the_line() -> None:
    ran, readiness = list[int](), Readiness()
    with started() as line:
        future = line.submit(partial(ran.append, 1), when=readiness.when)
        assert future.cancel()
        assert line.waiting == 1
        readiness.waiting[0]()
    assert ran == []
    assert line.waiting == 0


def test_items_that_get_ready_on_other_threads_join_calls_and_are_run_once_each() -> None:
    """Many at once, in any order, some before `submit` returns, while the line is closed."""
    ran, calls = [0] * 400, list[int]()
    ready_of: list[Callable[[], None]] = []

    def run(jobs: Sequence[Job], executor: Executor) -> list[Any]:
        calls.append(len(jobs))
        return [job() for job in jobs]

    def count(number: int) -> int:
        ran[number] += 1
        return number

    with started(executors=3, max_waiting=1000, joins=lambda chosen, job: len(chosen) < 4, run=run) as line:
        futures = [
            line.submit(partial(count, n), when=ready_of.append if n % 5 else lambda then: then()) for n in range(400)
        ]
        random.Random(1).shuffle(ready_of)
        threads = [
            threading.Thread(target=lambda part=part: [ready() for ready in ready_of[part::4]]) for part in range(4)
        ]
        for thread in threads:
            thread.start()
        line.close()
        for thread in threads:
            thread.join()
    assert [future.result(20) for future in futures] == list(range(400))
    assert ran == [1] * 400
    assert sum(calls) == 400
    assert max(calls) <= 4
    assert line.waiting == 0
