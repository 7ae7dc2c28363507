"""The schedule with real threads: results are right, errors find their waiters, lost executors are replaced."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np
import pytest

from rankd.errors import DeadlineExceeded, EngineFailure, InvalidRequest, Overloaded, Unavailable
from rankd.schedule.admission import Limits
from rankd.schedule.policy import Priority
from rankd.schedule.scheduler import Scheduler
from rankd.schedule.served import Asked, Part, When
from rankd.types import Float32Array
from tests.features.stores.redis_server import eventually
from tests.schedule.made_up import ROOMY, rules_of

PATIENCE = 20.0
Hook = Callable[[], None]


@dataclass(eq=False)
class Item:
    """A request whose scores are `start`, start + 1, ...; the hooks run where their names say."""

    start: int
    rows: int
    on_prepare: Hook = lambda: None
    on_score: Hook = lambda: None
    when: When | None = None
    logits: Float32Array = field(init=False)
    prepared: int = 0
    alone: int = 0
    wide: int = 0
    dropped: int = 0
    abandoned: int = 0

    def __post_init__(self) -> None:
        self.logits = np.full((self.rows, 1), np.nan, np.float32)


class Work:
    """Serves items; `calls` are (executor, parts of (start, first, count)), `gone` are lost executors."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[tuple[int, int, int]]]] = []
        self.gone: list[int] = []
        self.on_let_go: Hook = lambda: None

    def prepare(self, item: Item, executor: int, alone: bool, wide: bool) -> When | None:
        item.prepared += 1
        item.wide += wide
        item.alone += alone
        item.on_prepare()
        when, item.when = item.when, None
        return when

    def assemble(self, part: Part[Item], bucket: int, place: int, executor: int) -> None:
        assert part.count <= bucket

    def score(self, parts: Sequence[Part[Item]], bucket: int, executor: int) -> list[Float32Array]:
        self.calls.append((executor, [(part.item.start, part.first, part.count) for part in parts]))
        for part in parts:
            part.item.on_score()
        return [np.arange(p.first, p.first + p.count, dtype=np.float32)[:, None] + p.item.start for p in parts]

    def take(self, part: Part[Item], logits: Float32Array) -> None:
        part.item.logits[part.first : part.first + part.count] = logits

    def finish(self, item: Item) -> list[float]:
        return list(item.logits[:, 0].tolist())

    def abandon(self, item: Item, executor: int) -> None:
        item.abandoned += 1

    def let_go(self, executor: int) -> None:
        self.gone.append(executor)
        self.on_let_go()

    def drop(self, item: Item) -> None:
        item.dropped += 1


Started = tuple[Scheduler[Item, list[float], int], Work]


@contextmanager
def started(
    executors: int = 2, limits: Limits = ROOMY, hang_seconds: float = 60.0, encode_wide: bool = False
) -> Iterator[Started]:
    work, numbers = Work(), count(100)
    rules = replace(rules_of(num_executors=executors), encode_wide=encode_wide)
    schedule = Scheduler[Item, list[float], int](
        range(executors), work, rules, limits, [lambda: next(numbers)], hang_seconds
    )
    schedule.start()
    try:
        yield schedule, work
    finally:
        schedule.close()


def asked(item: Item, **more: object) -> Asked:
    return Asked(item.rows, **more)  # type: ignore[arg-type]


def failing_once(error: Exception) -> Hook:
    """A hook that raises, and never again."""
    errors = iter([error])

    def fail_once() -> None:
        for one in errors:
            raise one

    return fail_once


def right(item: Item, future: Future[list[float]]) -> bool:
    return future.result(PATIENCE) == [float(item.start + row) for row in range(item.rows)]


def test_scores_come_in_the_order_of_the_candidates_however_they_were_cut() -> None:
    items = [Item(1000 * number, rows) for number, rows in enumerate([1, 16, 17, 64, 65, 300, 1000, 3, 5])]
    with started() as (schedule, work):
        futures = [schedule.submit(item, asked(item, resident=number % 2 == 0)) for number, item in enumerate(items)]
        assert all(right(item, future) for item, future in zip(items, futures, strict=True))
    assert [item.dropped for item in items] == [1] * len(items)
    assert max(part[2] for _, parts in work.calls for part in parts) <= 64
    counts = schedule.figures().counts
    assert (counts.accepted, counts.finished) == (9, 9)
    assert counts.rows == sum(item.rows for item in items)
    assert schedule.unfinished == 0


def test_a_history_gets_all_threads_while_all_executors_are_idle() -> None:
    gate, begun = threading.Event(), threading.Event()
    alone, beside = Item(0, 5), Item(100, 5)
    block = Item(200, 5, on_score=lambda: _wait(gate, begun))
    with started(encode_wide=True) as (schedule, _):
        before = schedule.rules.costs.prepare(resident=False)
        eventually(lambda: schedule._sharer.idle == 2, "both are idle")
        assert right(alone, schedule.submit(alone, asked(alone)))
        assert schedule.rules.costs.prepare(resident=False) == before  # predictions are of one thread
        eventually(lambda: schedule._sharer.idle == 2, "both are idle")
        blocked = schedule.submit(block, asked(block, resident=True))
        assert begun.wait(PATIENCE)
        assert right(beside, schedule.submit(beside, asked(beside)))
        assert schedule.rules.costs.prepare(resident=False) != before
        gate.set()
        assert right(block, blocked)
    assert (alone.wide, beside.wide, block.wide) == (1, 0, 0)


def test_an_error_of_a_request_is_its_own() -> None:
    def refuse() -> None:
        raise InvalidRequest("no such thing")

    bad, good = Item(0, 10, on_prepare=refuse), Item(50, 10)
    with started(executors=1) as (schedule, _):
        futures = [schedule.submit(item, asked(item)) for item in (bad, good)]
        with pytest.raises(InvalidRequest, match="no such thing"):
            futures[0].result(PATIENCE)
        assert right(good, futures[1])
    assert (bad.dropped, good.dropped) == (1, 1)
    assert schedule.figures().counts.lost_executors == 0


def test_an_executor_that_fails_is_replaced_and_its_work_run_again() -> None:
    fail_once = failing_once(ZeroDivisionError("in the engine"))
    item = Item(7, 100, on_score=fail_once)
    with started(executors=1) as (schedule, work):
        assert right(item, schedule.submit(item, asked(item)))
        other = Item(9, 20)
        assert right(other, schedule.submit(other, asked(other)))
    assert {executor for executor, _ in work.calls} == {0, 100}
    assert work.gone == [0]
    counts = schedule.figures().counts
    assert (counts.lost_executors, counts.run_again, counts.finished) == (1, 1, 2)
    assert item.dropped == 1


def test_a_request_that_two_executors_fail_over_fails_and_harms_nobody_else() -> None:
    def fail() -> None:
        raise EngineFailure("this one always")

    gate, begun = threading.Event(), threading.Event()
    block, bad, good = Item(0, 5, on_prepare=lambda: _wait(gate, begun)), Item(100, 5, on_score=fail), Item(200, 5)
    with started(executors=1) as (schedule, work):
        blocked = schedule.submit(block, asked(block))
        assert begun.wait(PATIENCE)
        futures = [schedule.submit(item, asked(item, resident=True)) for item in (bad, good)]
        gate.set()
        assert right(block, blocked)
        with pytest.raises(EngineFailure, match="this one always"):
            futures[0].result(PATIENCE)
        assert right(good, futures[1])
    assert any({(100, 0, 5), (200, 0, 5)} <= set(parts) for _, parts in work.calls)  # they shared a call at first
    assert schedule.figures().counts.lost_executors == 2
    assert (bad.dropped, good.dropped) == (1, 1)


def test_an_executor_that_hangs_is_replaced_under_load() -> None:
    gate, begun = threading.Event(), threading.Event()
    hangs = iter([1])

    def hang_once() -> None:
        for _ in hangs:
            begun.set()
            gate.wait(PATIENCE)

    stuck = Item(0, 30, on_score=hang_once)
    try:
        with started(executors=1, hang_seconds=0.2) as (schedule, _):
            first = schedule.submit(stuck, asked(stuck, resident=True))
            assert begun.wait(PATIENCE)
            others = [Item(1000 * number, 20) for number in range(1, 30)]
            futures = [schedule.submit(item, asked(item)) for item in others]
            assert right(stuck, first)
            assert all(right(item, future) for item, future in zip(others, futures, strict=True))
            assert stuck.dropped == 0  # the one that hangs may still read what it holds
            assert schedule.figures().counts.lost_executors == 1
            gate.set()
            eventually(lambda: stuck.dropped == 1, "it is given back when the other one returns")
    finally:
        gate.set()
    assert stuck.alone == 0


def test_one_that_hangs_while_it_prepares_is_prepared_alone() -> None:
    gate = threading.Event()
    hangs = iter([1])

    def hang_once() -> None:
        for _ in hangs:
            gate.wait(PATIENCE)

    item = Item(0, 30, on_prepare=hang_once)
    try:
        with started(executors=2, hang_seconds=0.2) as (schedule, _):
            assert right(item, schedule.submit(item, asked(item)))
            assert (item.prepared, item.alone, item.abandoned) == (2, 1, 1)
            gate.set()
    finally:
        gate.set()


def test_what_a_request_waits_for_holds_up_no_executor() -> None:
    come: list[Callable[[], None]] = []
    waits, other = Item(0, 10, when=come.append), Item(100, 10)
    with started(executors=1) as (schedule, _):
        first = schedule.submit(waits, asked(waits))
        eventually(lambda: len(come) == 1, "it waits")
        assert right(other, schedule.submit(other, asked(other)))
        assert not first.done()
        come[0]()
        assert right(waits, first)
    assert waits.prepared == 2


def test_a_request_comes_to_its_turn_when_it_is_ready() -> None:
    come: list[Callable[[], None]] = []
    item = Item(0, 10)
    with started() as (schedule, _):
        future = schedule.submit(item, asked(item), come.append)
        time.sleep(0.02)
        assert not item.prepared
        come[0]()
        assert right(item, future)


def test_a_when_that_raises_is_the_requests_error() -> None:
    item = Item(0, 10)

    def broken(then: Callable[[], None]) -> None:
        raise InvalidRequest("cannot be asked")

    with started() as (schedule, _):
        with pytest.raises(InvalidRequest):
            schedule.submit(item, asked(item), broken).result(PATIENCE)
        assert item.dropped == 1


def test_a_cancelled_request_leaves_at_once() -> None:
    gate, begun = threading.Event(), threading.Event()
    block = Item(0, 5, on_prepare=lambda: _wait(gate, begun))
    queued, ready_never = Item(100, 10), Item(200, 10)
    with started(executors=1) as (schedule, work):
        running = schedule.submit(block, asked(block))
        assert begun.wait(PATIENCE)
        futures = [
            schedule.submit(queued, asked(queued)),
            schedule.submit(ready_never, asked(ready_never), lambda _: None),
        ]
        assert schedule.unfinished == 3
        assert all(future.cancel() for future in futures)
        assert schedule.unfinished == 1
        assert (queued.dropped, ready_never.dropped) == (1, 1)
        assert running.cancel()  # it is being worked on: what comes of it is thrown away
        assert schedule.unfinished == 0
        assert block.dropped == 0
        gate.set()
        eventually(lambda: block.dropped == 1, "it is given back")
        with pytest.raises(CancelledError):
            running.result(PATIENCE)
    assert work.calls == []
    assert schedule.figures().counts.cancelled == 3


def test_who_waits_too_long_is_told_at_that_moment() -> None:
    gate, begun = threading.Event(), threading.Event()
    block, late = Item(0, 5, on_prepare=lambda: _wait(gate, begun)), Item(100, 10)
    with started(executors=1) as (schedule, _):
        running = schedule.submit(block, asked(block))
        assert begun.wait(PATIENCE)
        deadline = time.perf_counter() + 0.2
        with pytest.raises(DeadlineExceeded, match="0 of 10 candidates"):
            schedule.submit(late, asked(late, resident=True, deadline=deadline)).result(PATIENCE)
        assert time.perf_counter() >= deadline - 0.1
        assert not running.done()
        gate.set()
        assert right(block, running)
    assert not late.prepared
    assert late.dropped == 1
    assert schedule.figures().counts.late == 1


def test_closing_finishes_what_was_accepted_and_takes_no_more() -> None:
    items = [Item(100 * number, 20 + number) for number in range(40)]
    with started() as (schedule, _):
        futures = [schedule.submit(item, asked(item)) for item in items]
    assert all(future.done() for future in futures)
    assert all(right(item, future) for item, future in zip(items, futures, strict=True))
    with pytest.raises(Unavailable):
        schedule.submit(items[0], asked(items[0]))
    with pytest.raises(Unavailable):
        schedule.check_room(asked(items[0]))


def test_limits_refuse_and_count() -> None:
    gate = threading.Event()
    block = Item(0, 90, on_prepare=lambda: _wait(gate))
    with started(executors=1, limits=Limits(candidates=100, work_ms=1e9)) as (schedule, _):
        running = schedule.submit(block, asked(block))
        with pytest.raises(Overloaded, match="allowed are 100 candidates"):
            schedule.submit(Item(0, 20), Asked(20))
        with pytest.raises(Overloaded):
            schedule.check_room(Asked(20))
        gate.set()
        assert right(block, running)
    assert schedule.figures().counts.refused == 2


@pytest.mark.parametrize("seed", range(3))
def test_many_threads_and_all_kinds_of_ends(seed: int) -> None:
    """Requests of all sizes from many threads, some cancelled, some out of time, some over which the engine fails."""
    chance = random.Random(seed)
    numbers = count()

    def fail_sometimes() -> None:
        if next(numbers) % 97 == 96:
            raise EngineFailure("now and then")

    items = [Item(1000 * number, chance.randint(1, 300), on_score=fail_sometimes) for number in range(300)]
    futures: dict[Item, Future[list[float]]] = {}
    with started(executors=3) as (schedule, _):

        def ask(some: Sequence[Item], own: random.Random) -> None:
            for item in some:
                deadline = time.perf_counter() + own.uniform(0.05, 5.0) if own.random() < 0.3 else None
                urgency = own.choice(list(Priority))
                try:
                    future = schedule.submit(item, Asked(item.rows, own.random() < 0.5, deadline, urgency))
                except (DeadlineExceeded, Overloaded):
                    continue
                futures[item] = future
                if own.random() < 0.2:
                    future.cancel()

        threads = [threading.Thread(target=ask, args=(items[n::6], random.Random(seed * 10 + n))) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for item, future in futures.items():
        assert future.done()
        if not future.cancelled() and future.exception() is None:
            assert right(item, future)
        else:
            assert future.cancelled() or isinstance(future.exception(), DeadlineExceeded | EngineFailure)
        assert item.dropped == 1
    counts = schedule.figures().counts
    ended = counts.finished + counts.failed + counts.late + counts.cancelled
    assert (counts.accepted, ended, schedule.unfinished) == (len(futures), len(futures), 0)


def test_closing_does_not_wait_for_what_never_comes() -> None:
    late, cancelled = Item(0, 5), Item(100, 5)
    with started(executors=1) as (schedule, _):
        first = schedule.submit(late, asked(late, deadline=time.perf_counter() + 0.2), lambda then: None)
        second = schedule.submit(cancelled, asked(cancelled), lambda then: None)
        closing = threading.Thread(target=schedule.close)
        closing.start()
        assert second.cancel()
        with pytest.raises(DeadlineExceeded):
            first.result(PATIENCE)
        closing.join(PATIENCE)
        assert not closing.is_alive()


def test_closing_waits_for_what_a_failed_executor_hands_back() -> None:
    failing = Item(0, 5)

    def fail() -> None:
        raise EngineFailure("always")

    failing.on_score = fail
    with started(executors=1) as (schedule, work):
        work.on_let_go = lambda: time.sleep(0.3)  # it lasts, and what the request held is given back after it
        future = schedule.submit(failing, asked(failing))
        with pytest.raises(EngineFailure):
            future.result(PATIENCE)
    assert failing.dropped == 1
    assert schedule.figures().counts.failed == 1


@contextmanager
def replacing(make: Callable[[], int], hang_seconds: float = 0.2) -> Iterator[Started]:
    """One executor, and a say in how others are made."""
    work = Work()
    schedule = Scheduler[Item, list[float], int](range(1), work, rules_of(num_executors=1), ROOMY, [make], hang_seconds)
    schedule.start()
    try:
        yield schedule, work
    finally:
        schedule.close()


def test_a_replacement_that_fails_is_tried_again_and_nobody_waits_for_ever() -> None:
    gate, tries = threading.Event(), count()

    def make() -> int:
        if next(tries) < 2:
            raise RuntimeError("no memory")
        return 7

    stuck, waits = Item(0, 5, on_score=lambda: _wait(gate)), Item(100, 5)
    try:
        with replacing(make) as (schedule, work):
            futures = [schedule.submit(item, asked(item, resident=True)) for item in (stuck, waits)]
            with pytest.raises(EngineFailure, match="cannot be started anew"):
                futures[0].result(PATIENCE)
            assert futures[1].exception(PATIENCE) is not None
            eventually(lambda: next(tries) > 3, "another one was made")
            again = Item(200, 5)
            assert right(again, schedule.submit(again, asked(again, resident=True)))
            assert work.calls[-1][0] == 7
    finally:
        gate.set()


def test_deadlines_are_told_while_an_executor_is_replaced() -> None:
    gate, making = threading.Event(), threading.Event()

    def make() -> int:
        making.set()
        _wait(gate)
        return 7

    stuck, late = Item(0, 5, on_score=lambda: _wait(gate)), Item(100, 5)
    try:
        with replacing(make) as (schedule, _):
            schedule.submit(stuck, asked(stuck, resident=True))
            assert making.wait(PATIENCE)
            future = schedule.submit(late, asked(late, resident=True, deadline=time.perf_counter() + 0.2))
            with pytest.raises(DeadlineExceeded):
                future.result(PATIENCE / 2)  # while nobody can compute anything
            gate.set()
    finally:
        gate.set()


def test_one_failure_is_one_however_long_the_replacement_takes() -> None:
    fail_once = failing_once(EngineFailure("once"))

    def make() -> int:
        time.sleep(0.5)  # longer than a hang
        return 7

    item = Item(0, 5, on_score=fail_once)
    with replacing(make) as (schedule, _):
        assert right(item, schedule.submit(item, asked(item, resident=True)))
    assert schedule.figures().counts.run_again == 1


def test_a_defect_of_a_request_costs_no_executor() -> None:
    def defect() -> None:
        raise KeyError("not the engine's")

    bad = Item(0, 5, on_prepare=defect)
    with started(executors=1) as (schedule, _):
        with pytest.raises(KeyError):
            schedule.submit(bad, asked(bad)).result(PATIENCE)
        good = Item(10, 5)
        assert right(good, schedule.submit(good, asked(good)))
    assert schedule.figures().counts.lost_executors == 0
    assert bad.dropped == 1


def _wait(gate: threading.Event, begun: threading.Event | None = None) -> None:
    if begun is not None:
        begun.set()
    assert gate.wait(PATIENCE)
