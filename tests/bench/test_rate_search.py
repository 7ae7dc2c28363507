"""The search for a rate: it ends close below the limit, whatever it begins with, and asks no more often than it may."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rankd.bench.rate_search import STEP, highest_rate


@given(limit=st.floats(30, 300), guess=st.floats(50, 150))
def test_it_ends_close_below_the_limit(limit: float, guess: float) -> None:
    asked: list[float] = []

    def keeps(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    found = highest_rate(keeps, guess, 14)
    assert len(asked) == 14
    assert found <= limit < found * STEP
    assert found in asked


def test_the_probes_of_the_docstring() -> None:
    asked: list[float] = []
    found = highest_rate(lambda rate: (asked.append(rate), rate <= 130)[1], 100, 5)  # type: ignore[func-returns-value]
    assert [round(rate) for rate in asked] == [100, 125, 156, 140, 132]
    assert found == 125.0


def test_what_nobody_keeps_is_the_lowest_that_was_tried() -> None:
    assert highest_rate(lambda rate: False, 100, 3) == 100 / STEP / STEP


def test_what_everybody_keeps_is_the_highest_that_was_tried() -> None:
    assert highest_rate(lambda rate: True, 100, 3) == 100 * STEP * STEP
