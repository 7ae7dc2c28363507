"""When a second replica is asked, and how long to wait before connecting again: no clock, no threads."""

from __future__ import annotations

import math
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.shards.hedging import BURST, RECENT, RENEWED_EVERY, Hedging
from rankd.shards.replica import Backoff


def test_the_delay_is_what_most_recent_answers_took() -> None:
    hedging = Hedging(0.95, 0.001, 0.1)
    for number in range(RENEWED_EVERY - 1):
        hedging.answered(0.010)
        assert hedging.delay_s == math.inf, number
    hedging.answered(0.010)
    assert hedging.delay_s == pytest.approx(0.010)
    for number in range(RECENT):
        hedging.answered(0.020 + 0.0001 * number)
    assert hedging.delay_s == pytest.approx(0.020 + 0.0001 * 0.95 * (RECENT - 1))  # the old ones have left


def test_the_delay_has_a_floor() -> None:
    hedging = Hedging(0.95, 0.005, 0.1)
    for _ in range(RENEWED_EVERY):
        hedging.answered(0.0001)
    assert hedging.delay_s == 0.005


@given(st.lists(st.booleans(), max_size=400), st.sampled_from([0.0, 0.05, 0.25]))
def test_hedges_are_a_share_of_the_answers_and_a_burst(hedged: list[bool], share: float) -> None:
    hedging = Hedging(0.95, 0.001, share)
    answered = allowed = 0
    for hedge in hedged:
        if hedge:
            allowed += hedging.allowed()
        else:
            hedging.answered(0.001)
            answered += 1
        assert allowed <= (BURST + share * answered + 1e-6 if share else 0)


def test_the_budget_comes_back() -> None:
    hedging = Hedging(0.95, 0.001, 0.5)
    assert sum(hedging.allowed() for _ in range(100)) == BURST
    hedging.answered(0.001)
    assert not hedging.allowed()
    hedging.answered(0.001)
    assert hedging.allowed()


def test_the_waits_grow_to_the_longest_and_begin_anew() -> None:
    backoff = Backoff(0.1, 0.5, chance=lambda: 1.0)
    assert list(islice(iter(backoff.next_s, None), 5)) == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])
    backoff.reset()
    assert backoff.next_s() == pytest.approx(0.1)
    assert Backoff(0.1, 0.5, chance=lambda: 0.0).next_s() == pytest.approx(0.05)
