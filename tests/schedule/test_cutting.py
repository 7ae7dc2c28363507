"""Cuts are the cheapest there are, and hold every candidate once."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.schedule.cutting import Cutter

COSTS = {16: 1.4, 64: 3.7, 256: 13.2}


def cutter_of(costs: dict[int, float], most_rows: int = 300) -> Cutter:
    return Cutter(list(costs), lambda bucket: costs[bucket], most_rows)


@pytest.mark.parametrize(
    ("rows", "largest", "pieces"),
    [
        (1, 256, (16,)),
        (16, 256, (16,)),
        (70, 256, (64, 16)),
        (250, 256, (256,)),
        (250, 64, (64, 64, 64, 64)),
        (192, 256, (64, 64, 64)),
        (300, 16, (16,) * 19),
    ],
)
def test_the_cheapest_buckets(rows: int, largest: int, pieces: tuple[int, ...]) -> None:
    cutter = cutter_of(COSTS)
    assert cutter.pieces(rows, largest) == pieces
    assert cutter.cost_ms(rows, largest) == pytest.approx(sum(COSTS[bucket] for bucket in pieces))


@given(
    st.dictionaries(st.integers(1, 40), st.floats(0.1, 10.0), min_size=1, max_size=4),
    st.integers(1, 60),
)
def test_no_cut_is_cheaper(costs: dict[int, float], rows: int) -> None:
    cutter = cutter_of(costs, 60)

    @cache
    def cheapest(left: int) -> float:
        return 0.0 if left <= 0 else min(cost + cheapest(left - bucket) for bucket, cost in costs.items())

    largest = max(costs)
    pieces = cutter.pieces(rows, largest)
    assert sum(pieces) >= rows > sum(pieces) - pieces[-1]
    assert cutter.cost_ms(rows, largest) == pytest.approx(cheapest(rows))


def test_buckets_by_rows_and_by_time() -> None:
    cutter = cutter_of(COSTS)
    assert [cutter.bucket_for(rows) for rows in (1, 16, 17, 256, 300)] == [16, 16, 64, 256, 256]
    assert [cutter.quantum(ms, 9.9) for ms in (0.1, 1.4, 5.0, 13.2, 99.0)] == [16, 16, 64, 256, 256]
    assert [cutter.quantum(1.0, overhead) for overhead in (0.0, 0.05, 0.13, 0.8)] == [256, 256, 64, 16]


def test_pieces_are_even_and_about_a_quantum() -> None:
    cutter = cutter_of({16: 1.4, 64: 3.7, 128: 7.0, 256: 13.2}, 1000)
    assert [cutter.even(rows, 128) for rows in (1, 16, 100, 128, 140, 191)] == [16, 16, 128, 128, 256, 256]
    assert cutter.pieces(140, cutter.even(140, 128)) == (128, 16)  # cheaper than one call of 256
    assert cutter.pieces(250, cutter.even(250, 128)) == (128, 128)


MANY = cutter_of({size: float(size) for size in range(4, 260, 4)}, 1000)


@given(st.integers(1, 900), st.sampled_from([16, 64, 128, 256]))
def test_even_pieces_are_at_most_half_more_than_a_quantum(rows: int, quantum: int) -> None:
    largest = MANY.even(rows, quantum)
    assert largest <= min(1.5 * quantum + 4, 256)
    assert largest >= min(rows, quantum) / 2
