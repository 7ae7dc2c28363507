"""How far look-ups go to the same rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.plan.table_statistics import TableLoad, hot_curve, hot_share
from tests.plan.made_up import load_of, some_loads


def test_a_curve_goes_through_its_corners() -> None:
    load = load_of("a", 100_000, hot=(0.2, 0.3, 0.5, 0.9))
    assert hot_curve(load) == [(0, 0.0), (10, 0.2), (100, 0.3), (1000, 0.5), (10_000, 0.9), (100_000, 1.0)]
    assert hot_share(load, 550) == pytest.approx(0.4)


def test_corners_of_less_than_a_row_are_left_out() -> None:
    assert hot_curve(load_of("a", 15, hot=(0.1, 0.2, 0.3, 0.4))) == [(0, 0.0), (1, 0.4), (15, 1.0)]
    assert hot_curve(load_of("a", 1)) == [(0, 0.0), (1, 1.0)]


@given(some_loads(), st.integers(0, 5000))
def test_more_rows_take_more_lookups_and_all_take_all(loads: list[TableLoad], rows: int) -> None:
    for load in loads:
        assert hot_share(load, 0) == 0.0
        assert hot_share(load, load.spec.rows) == 1.0
        assert hot_share(load, rows) <= hot_share(load, rows + 1)
