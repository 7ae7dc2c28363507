"""The front is what nothing else beats, whatever the points; an order by fronts begins with it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rankd.compress.pareto import front, ranked

COSTS = st.integers(1, 12).flatmap(
    lambda n: st.integers(1, 3).flatmap(lambda m: arrays(np.float64, (n, m), elements=st.integers(0, 4).map(float)))
)


def beats(one: np.ndarray, other: np.ndarray) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


@given(COSTS)
def test_the_front_is_what_nothing_beats(costs: np.ndarray) -> None:
    chosen = front(costs)
    assert chosen == [n for n, own in enumerate(costs) if not any(beats(other, own) for other in costs)]


@given(COSTS)
def test_the_order_has_every_point_once_and_never_one_before_what_beats_it(costs: np.ndarray) -> None:
    order = ranked(costs)
    assert sorted(order) == list(range(len(costs)))
    assert set(order[: len(front(costs))]) == set(front(costs))
    for place, number in enumerate(order):
        assert not any(beats(costs[later], costs[number]) for later in order[place:])


def test_the_ends_of_a_front_come_first_and_then_the_one_with_the_most_room() -> None:
    costs = np.asarray([(0, 10), (1, 9), (2, 8), (7, 3), (10, 0)], float)
    assert ranked(costs) == [0, 4, 3, 2, 1]
