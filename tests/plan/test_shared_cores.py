"""Cores that tasks share, against a plain loop in small steps of time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.plan.shared_cores import Events, SharedCores

tasks = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=12)


def ends_on(machine: SharedCores, events: Events, given: list[tuple[int, int]]) -> list[float]:
    """When each task (begun at, takes) ended."""
    ended = [-1.0] * len(given)

    def begin(number: int, takes: int) -> None:
        def end(now: float) -> None:
            ended[number] = now

        events.at(given[number][0], lambda now: machine.run(takes, end, now))

    for number, (_, takes) in enumerate(given):
        begin(number, takes)
    events.run()
    return ended


def equal_shares(given: list[tuple[int, int]], cores: int) -> list[float]:
    """The same, moment by moment: until the next task begins or ends, all have the same share."""
    left = {number: float(takes) for number, (_, takes) in enumerate(given)}
    now, ended = 0.0, [-1.0] * len(given)
    while left:
        running = [number for number in left if given[number][0] <= now]
        for number in [one for one in running if left[one] <= 1e-9]:
            ended[number] = now
            del left[number]
            running.remove(number)
        coming = [given[number][0] - now for number in left if given[number][0] > now]
        speed = min(1.0, cores / len(running)) if running else 0.0
        step = min([left[number] / speed for number in running] + coming, default=0.0)
        for number in running:
            left[number] -= step * speed
        now += step
    return ended


@given(tasks, st.integers(1, 4))
def test_equal_shares(given: list[tuple[int, int]], cores: int) -> None:
    events = Events()
    assert ends_on(SharedCores(events, cores), events, given) == pytest.approx(equal_shares(given, cores))


@given(tasks)
def test_cores_enough_are_cores_of_their_own(given: list[tuple[int, int]]) -> None:
    events = Events()
    assert ends_on(SharedCores(events, len(given)), events, given) == [begun + takes for begun, takes in given]


def test_by_hand() -> None:
    """One core: 30 us from 0 on and 10 us from 10 on share it from 10 to 30; then the first goes on alone to 40."""
    events = Events()
    assert ends_on(SharedCores(events, 1), events, [(0, 30), (10, 10)]) == [40.0, 30.0]
