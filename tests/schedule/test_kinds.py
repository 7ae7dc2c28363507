"""What requests take on executors of several kinds, for admission and deadlines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.schedule.kinds import Mix
from tests.schedule.made_up import rules_of, two_kinds, wide_rules


def test_work_is_of_executors_that_are_all_given_what_they_can_do() -> None:
    """One that takes 2 ms and one that takes 6: in 6 ms they do four, so each of the two works 3 ms for one."""
    quick, slow = rules_of(num_executors=1, scale=1.0), rules_of(num_executors=1, scale=3.0)
    mix = Mix([quick, slow])
    one, other = quick.work_ms(64, 0.0), slow.work_ms(64, 0.0)
    assert mix.left_ms(64) == pytest.approx(2 / (1 / one + 1 / other))
    assert mix.num_executors == 2


@given(st.integers(1, 1024), st.booleans())
def test_two_halves_of_a_kind_are_the_kind(rows: int, resident: bool) -> None:
    whole, halves = rules_of(num_executors=4), Mix([rules_of(num_executors=2), rules_of(num_executors=2)])
    work_ms, alone_ms = whole.estimates(rows, resident, None)
    found_ms, soonest_ms = halves.estimates(rows, resident, None)
    assert found_ms == pytest.approx(work_ms)
    assert alone_ms - 1e-6 <= soonest_ms <= 1.5 * alone_ms + 3.0  # shares are rounded up, and that may be a bucket more
    assert halves.left_ms(rows) == pytest.approx(whole.left_ms(rows))


@given(st.integers(1, 1024), st.booleans())
def test_a_mix_is_no_slower_than_one_of_its_kinds(rows: int, resident: bool) -> None:
    mix = two_kinds()
    soonest_ms = mix.estimates(rows, resident, None)[1]
    assert soonest_ms <= min(rules.estimates(rows, resident, None)[1] for rules in mix.kinds)
    assert 0 < mix.soonest_ms(rows) <= soonest_ms


def test_nothing_left_takes_nothing() -> None:
    mix = two_kinds()
    assert mix.soonest_ms(0) == 0.0
    assert mix.left_ms(0) == pytest.approx(0.0, abs=1e-5)


def test_predictions_are_doubted_for_all_kinds() -> None:
    mix = Mix([rules_of(), wide_rules()])
    for rules in mix.kinds:
        for _ in range(20):
            rules.costs.saw_score(rules.cutter.buckets[0], 1, 1, 0.0, 100.0)
    before = [rules.costs.score(rules.cutter.buckets[0]) for rules in mix.kinds]
    mix.doubt()
    assert all(rules.costs.score(rules.cutter.buckets[0]) < ms for rules, ms in zip(mix.kinds, before, strict=True))
