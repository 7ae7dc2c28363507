"""The compiled questions over all that waits, against the same in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.schedule.waiting import Waiting, backlog_of

REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 50),  # place
        st.one_of(st.integers(0, 100), st.just(math.inf)),  # deadline
        st.one_of(st.integers(0, 100), st.just(math.inf)),  # latest
        st.floats(0.0, 500.0),  # left_ms
        st.integers(1, 900),
        st.booleans(),  # whether it may run
        st.booleans(),  # whether it has ended
    ),
    max_size=90,
)


def waiting_of(requests: list[tuple[float, float, float, float, int, bool, bool]]) -> Waiting:
    waiting = Waiting(4)
    for place, deadline, latest, left_ms, rows, runs, gone in requests:
        slot = waiting.add(float(place), float(deadline), float(latest), left_ms, rows, False)
        if runs:
            waiting.let_run(slot)
        if gone:
            waiting.remove(slot)
    return waiting


@given(REQUESTS, st.integers(0, 50), st.floats(0.1, 2.0), st.integers(0, 100))
def test_what_a_newcomer_finds(
    requests: list[tuple[float, float, float, float, int, bool, bool]], place: int, factor: float, now: int
) -> None:
    waiting = waiting_of(requests)
    left = sorted((one for one in requests if not one[6]), key=lambda one: one[0])  # equals as they came
    done_ms = np.cumsum([one[3] for one in left]) if left else np.zeros(0)
    ahead = sum(one[0] <= place for one in left)
    spare = [
        (one[1] - now) * 1e3 - done * factor for one, done in zip(left[ahead:], done_ms[ahead:].tolist(), strict=True)
    ]
    backlog = waiting.backlog(float(place), factor, float(now))
    assert backlog.work_ms == pytest.approx(sum(one[3] for one in left))
    assert backlog.rows == sum(one[4] for one in left)
    assert backlog.ahead_ms == pytest.approx(float(done_ms[ahead - 1]) * factor if ahead else 0.0)
    assert backlog.spare_ms == pytest.approx(min([one for one in spare if one >= 0.0], default=math.inf))


@given(st.lists(REQUESTS, max_size=3), st.integers(0, 50), st.floats(0.1, 2.0), st.integers(0, 100))
def test_what_a_newcomer_finds_in_several_schedules_is_what_it_would_in_one(
    parts: list[list[tuple[float, float, float, float, int, bool, bool]]], place: int, factor: float, now: int
) -> None:
    together = waiting_of([one for part in parts for one in part]).backlog(float(place), factor, float(now))
    found = backlog_of([waiting_of(part) for part in parts], float(place), factor, float(now))
    assert found.rows == together.rows
    assert tuple(found) == pytest.approx(tuple(together))


@given(REQUESTS, st.integers(0, 100))
def test_who_is_out_of_time(requests: list[tuple[float, float, float, float, int, bool, bool]], now: int) -> None:
    waiting = waiting_of(requests)
    found = sorted(float(waiting.place[slot]) for slot in waiting.passed(float(now)))
    late = [one for one in requests if not one[6] and (one[1] <= now or (one[2] < now and one[5]))]
    assert found == sorted(float(one[0]) for one in late)
