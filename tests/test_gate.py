"""A gate opens once: when all has come, or when its time is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import pytest

from rankd.errors import StoreFailure
from rankd.gate import Alarm, Gate


@dataclass
class Called:
    """What has to be called whatever else happens."""

    call: Callable[[], None]

    def over(self) -> bool:
        return False


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    made = Alarm()
    yield made
    made.close()


def test_nothing_to_wait_for_opens_at_once(alarm: Alarm) -> None:
    opened: list[int] = []
    Gate([], None, alarm, lambda: opened.append(1))
    done: Future[int] = Future()
    done.set_result(1)
    Gate([done, done], time.perf_counter() + 60, alarm, lambda: opened.append(2))
    assert opened == [1, 2]


def test_it_opens_with_the_last_future_even_if_one_failed(alarm: Alarm) -> None:
    opened: list[int] = []
    futures: list[Future[int]] = [Future(), Future()]
    Gate(futures, None, alarm, lambda: opened.append(1))
    futures[1].set_exception(StoreFailure("gone"))
    assert opened == []
    futures[0].set_result(1)
    assert opened == [1]


def test_it_opens_when_its_time_is_over_and_not_again(alarm: Alarm) -> None:
    opened, opening = [], threading.Event()
    late: Future[int] = Future()

    def then() -> None:
        opened.append(1)
        opening.set()

    Gate([late], time.perf_counter() + 0.02, alarm, then)
    assert opening.wait(10)
    late.set_result(1)
    assert opened == [1]


def test_an_alarm_calls_in_the_order_of_the_moments(alarm: Alarm) -> None:
    called: list[int] = []
    all_called = threading.Event()
    now = time.perf_counter()
    alarm.at(now + 0.06, Called(all_called.set))
    for number in (3, 1, 2):
        alarm.at(now + number / 100, Called(partial(called.append, number)))
    assert all_called.wait(10)
    assert called == [1, 2, 3]


def test_an_alarm_forgets_what_is_over(alarm: Alarm) -> None:
    looked = threading.Event()

    class Over:
        def call(self) -> None:
            raise AssertionError("it was over")

        def over(self) -> bool:
            looked.set()
            return True

    alarm.at(time.perf_counter() + 3600, Over())
    soon = threading.Event()
    alarm.at(time.perf_counter() + 0.01, Called(soon.set))
    assert soon.wait(10)
    assert looked.wait(10)


def test_many_gates_among_threads_open_once_each(alarm: Alarm) -> None:
    """Futures complete on one thread while the time runs out on another."""
    opened = [0] * 500
    futures: list[Future[int]] = [Future() for _ in opened]

    def count(number: int) -> None:
        opened[number] += 1

    now = time.perf_counter()
    for number, future in enumerate(futures):
        Gate([future], now + number / 20_000, alarm, lambda n=number: count(n))  # type: ignore[misc]
    for future in reversed(futures):
        future.set_result(1)
    last = threading.Event()
    alarm.at(time.perf_counter() + 0.05, Called(last.set))
    assert last.wait(10)
    assert opened == [1] * 500
