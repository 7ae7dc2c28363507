"""Schedules that share cores: no more calls at once than cores, in one order over all, and nobody is forgotten."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import pytest

from rankd.errors import Overloaded
from rankd.schedule.admission import Limits
from rankd.schedule.core_sharing import Cores, Sharer
from rankd.schedule.scheduler import Scheduler
from rankd.schedule.served import Part
from rankd.schedule.waiting import Waiting
from rankd.types import Float32Array
from tests.features.stores.redis_server import eventually
from tests.schedule.made_up import ROOMY, rules_of
from tests.schedule.test_scheduler import PATIENCE, Item, Work, asked, failing_once, right

Schedule = Scheduler[Item, list[float], int]


class Counting(Work):
    """Counts the calls that several schedules have under way at once."""

    now, most, lock = 0, 0, threading.Lock()

    def score(self, parts: Sequence[Part[Item]], bucket: int, executor: int) -> list[Float32Array]:
        with Counting.lock:
            Counting.now += 1
            Counting.most = max(Counting.most, Counting.now)
        try:
            time.sleep(0.0005)
            return super().score(parts, bucket, executor)
        finally:
            with Counting.lock:
                Counting.now -= 1


@contextmanager
def sharing(
    schedules: int, executors: int, limits: Limits = ROOMY, hang_seconds: float = 60.0
) -> Iterator[tuple[list[Schedule], list[Work], Cores]]:
    Counting.now = Counting.most = 0
    cores, works, numbers = Cores(), [Counting() for _ in range(schedules)], count(100)
    rules = rules_of(num_executors=executors)
    made = [
        Schedule(range(executors), work, rules, limits, [lambda: next(numbers)], hang_seconds, cores=cores)
        for work in works
    ]
    for one in made:
        one.start()
    try:
        yield made, list[Work](works), cores
    finally:
        for one in made:
            one.close()


@pytest.mark.parametrize("executors", [1, 2, 3])
def test_calls_are_no_more_than_cores_and_everybody_is_answered(executors: int) -> None:
    draw = random.Random(executors)
    with sharing(3, executors) as (schedules, _, cores):
        items = [Item(10_000 * number, draw.choice([1, 16, 40, 300])) for number in range(150)]
        futures = []
        for item in items:
            schedule = draw.choice(schedules)
            futures.append(schedule.submit(item, asked(item, resident=draw.random() < 0.5)))
            if draw.random() < 0.1:
                time.sleep(0.003)  # so that executors are idle now and then
        assert all(right(item, future) for item, future in zip(items, futures, strict=True))
        assert Counting.most == executors
        assert cores.count == executors
        assert cores.waiting_ms() == 0.0
    assert [item.dropped for item in items] == [1] * len(items)


def held(schedule: Schedule, gate: threading.Event) -> None:
    """Keep one core busy until the gate opens."""
    begun = threading.Event()

    def hold() -> None:
        begun.set()
        gate.wait(PATIENCE)

    item = Item(0, 1, on_prepare=hold)
    schedule.submit(item, asked(item))
    assert begun.wait(PATIENCE)


def test_whoever_came_first_comes_first_whichever_schedule_has_it() -> None:
    gate, order = threading.Event(), list[int]()
    with sharing(2, 1) as (schedules, _, _):
        held(schedules[0], gate)
        futures = []
        for number in range(12):
            item = Item(100 * number, 64, on_score=lambda number=number: order.append(number))  # type: ignore[misc]
            schedule = schedules[(number // 2) % 2]
            futures.append((item, schedule.submit(item, asked(item, resident=True))))
            time.sleep(0.001)
        gate.set()
        assert all(right(item, future) for item, future in futures)
    assert order == list(range(12))


def sharer(cores: Cores, idle: int, *places: float) -> Sharer:
    """A schedule of two executors with requests at these places that can run."""
    made = Sharer(Waiting(), 2, threading.Condition(cores.lock), idle)
    for place in places:
        made.waiting.let_run(made.waiting.add(place, math.inf, math.inf, 6.0, 100, True))
    cores.join(made)
    return made


def test_how_many_executors_a_schedule_may_reckon_with() -> None:
    cores = Cores()
    with cores.lock:
        late, early = sharer(cores, 2, 5.0), sharer(cores, 1, 4.0)
        assert (cores.idle_for(late), cores.idle_for(early)) == (0, 1)  # and nothing is spread
        cores.take("a seat of early", early)
        early.idle = 0  # nobody is there to run what it has
        assert cores.idle_for(late) == 1  # one core is left
        cores.take("a seat of late", late)
        assert cores.idle_for(late) == 0
        cores.give_back("a seat of early")
        cores.give_back("a seat of late")
        cores.give_back("a seat of late")  # it had been given up before
        cores.leave(early)
        assert cores.idle_for(late) == 2
    assert cores.waiting_ms() == 3.0


def test_what_waits_in_the_other_schedule_counts_at_admission() -> None:
    gate = threading.Event()
    try:
        with sharing(2, 1, Limits(candidates=500, work_ms=1e9)) as (schedules, _, cores):
            held(schedules[0], gate)
            first = [Item(1000 * number, 16) for number in range(25)]
            futures = [schedules[0].submit(item, asked(item, resident=True)) for item in first]
            large, small = Item(2000, 300), Item(3000, 16)
            with pytest.raises(Overloaded, match="26 requests with 400 candidates"):
                schedules[1].submit(large, asked(large, resident=True))
            with pytest.raises(Overloaded, match="would be answered in"):
                schedules[1].check_room(asked(small, resident=True, deadline=time.perf_counter() + 0.010))
            assert cores.waiting_ms() > 15.0
            gate.set()
            assert all(right(item, future) for item, future in zip(first, futures, strict=True))
    finally:
        gate.set()


def test_a_lost_executor_gives_its_core_back() -> None:
    fail_once = failing_once(ZeroDivisionError("in the engine"))
    with sharing(2, 1) as (schedules, works, _):
        bad, good = Item(0, 20, on_score=fail_once), Item(100, 20)
        futures = [schedules[0].submit(bad, asked(bad)), schedules[1].submit(good, asked(good))]
        assert right(bad, futures[0])
        assert right(good, futures[1])
        assert works[0].gone == [0]


def test_one_that_hangs_keeps_no_core_from_the_others() -> None:
    gate, hangs = threading.Event(), iter([1])

    def hang_once() -> None:
        for _ in hangs:
            gate.wait(PATIENCE)

    stuck, other = Item(0, 20, on_score=hang_once), Item(100, 20)
    try:
        with sharing(2, 1, hang_seconds=0.2) as (schedules, _, _):
            futures = [schedules[0].submit(stuck, asked(stuck)), schedules[1].submit(other, asked(other))]
            assert right(other, futures[1])
            assert right(stuck, futures[0])
            gate.set()
            eventually(lambda: stuck.dropped == 1, "it is given back when the other one returns")
            last = Item(200, 20)
            assert right(last, schedules[1].submit(last, asked(last)))
    finally:
        gate.set()


def test_one_schedule_ends_and_the_other_goes_on() -> None:
    gate = threading.Event()
    with sharing(2, 2) as (schedules, _, cores):
        held(schedules[0], gate)
        items = [Item(1000 * number, 64) for number in range(1, 20)]
        futures = [schedules[number % 2].submit(item, asked(item)) for number, item in enumerate(items)]
        gate.set()
        schedules[0].close()
        assert all(right(item, future) for item, future in zip(items, futures, strict=True))
        again = Item(0, 300)
        assert right(again, schedules[1].submit(again, asked(again)))
        assert len(cores.waitings()) == 1
