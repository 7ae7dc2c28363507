"""Predictions start where warm-up was, follow what calls take, and say how wrong they are."""

from __future__ import annotations

import pytest

from rankd.schedule.costs import FARTHEST, STEP, CostModel, Warmed

WARMED = Warmed({(16, 1): 1.0, (16, 2): 1.5, (64, 1): 4.0}, encode_ms={8: 2.0, 64: 10.0})


def test_predictions_are_those_of_warm_up_at_first() -> None:
    costs = CostModel(WARMED)
    assert (costs.score(16), costs.score(16, 2), costs.score(64)) == (1.0, 1.5, 4.0)
    assert costs.score(64, 3) == 12.0  # not warmed: one user after the other
    assert costs.prepare(resident=True) < 1.0
    assert costs.prepare(resident=False) == pytest.approx(costs.prepare(resident=True) + 10.0)


def test_predictions_follow_a_machine_that_became_slower() -> None:
    costs = CostModel(WARMED)
    for _ in range(200):
        costs.saw_score(16, 1, 16, 0.1, 3.0)
    assert costs.score(16) == pytest.approx(3.0, rel=0.05)
    assert costs.score(64) == pytest.approx(12.0, rel=0.2)  # never seen, but it is the same machine
    assert costs.errors().slowdown == pytest.approx(3.0, rel=0.2)
    assert costs.errors().score < 0.05
    assert costs.rows(16) == pytest.approx(0.1, rel=0.05)


def test_one_wild_call_moves_little() -> None:
    costs = CostModel(WARMED)
    costs.saw_score(64, 1, 64, 0.1, 4000.0)
    assert costs.score(64) <= 4.0 * (1 + STEP * (FARTHEST - 1)) + 1e-9
    assert costs.errors().score > 0.05


def test_preparations_of_both_kinds_are_kept_apart() -> None:
    costs = CostModel(WARMED)
    for _ in range(100):
        costs.saw_prepare(True, None, 0.5)
        costs.saw_prepare(False, None, 30.0)
    assert costs.prepare(True) == pytest.approx(0.5, rel=0.05)
    assert costs.prepare(False) == pytest.approx(30.0, rel=0.05)
    assert costs.errors().prepare < 0.05


def test_who_is_sent_away_makes_predictions_doubtful() -> None:
    costs = CostModel(WARMED)
    for _ in range(200):
        costs.saw_score(64, 1, 64, 0.1, 40.0)
        costs.saw_prepare(False, None, 90.0)
        costs.saw_prepare(False, 8, 90.0)
    for _ in range(200):
        costs.doubt()
    assert costs.score(64) == pytest.approx(4.0, rel=0.01)
    assert costs.prepare(False) == pytest.approx(10.2, rel=0.01)
    assert costs.prepare(False, 8) == pytest.approx(2.2, rel=0.01)
    costs.doubt()
    assert costs.score(64) <= 4.0 * 1.01


def test_a_history_that_comes_along_costs_what_its_length_does() -> None:
    costs = CostModel(WARMED)
    assert [costs.prepare(False, tokens) for tokens in (0, 8, 9, 64, 9000)] == pytest.approx(
        [2.2, 2.2, 10.2, 10.2, 10.2]
    )
    for _ in range(100):
        costs.saw_prepare(False, 5, 4.0)
    assert costs.prepare(False, 3) == pytest.approx(4.0, rel=0.05)
    assert costs.prepare(False, 20) == pytest.approx(10.2)  # another bucket
    assert costs.prepare(True, 3) < 1.0
    assert CostModel(Warmed({(16, 1): 1.0})).prepare(False, 3) < 1.0  # a model without a state
