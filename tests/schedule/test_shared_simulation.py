"""Executors that share a device, in made-up time: how calls slow each other down, and that a schedule which knows it
answers sooner, promises no more than it keeps, and forgets nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.schedule.admission import Limits
from rankd.schedule.costs import CostModel, Warmed
from rankd.schedule.cutting import Cutter
from rankd.schedule.kinds import Mix
from rankd.schedule.policy import CALL_MS, Priority, Rules
from rankd.schedule.shared_speed import Speed
from rankd.schedule.simulation import Arrival, Outcome, simulate
from tests.schedule.made_up import ROOMY, rules_of, some_arrivals, wide_rules
from tests.schedule.test_shared_speed import CURVES
from tests.schedule.test_simulation import late_share, poisson

BUCKETS = (16, 64, 256, 1024)
FLAT, HARDLY, HALF = (1.0, 1.0, 1.0, 1.0), (1.0, 1.15, 1.2, 1.2), (1.0, 1.5, 1.6, 1.6)
MIXED, SHORT, LONG = (10, 40, 100, 300, 1000), (10, 12, 40), (300, 600, 1000)
PREPARE_MS = 0.2


def gpu_rules(curve: tuple[float, ...] | None, num_executors: int = 4) -> Rules:
    """Calls take .5 ms and 2 us a row, as on a GPU: a long list is hardly dearer whole than cut, users like to join."""
    score_ms = {(bucket, users): 0.5 + 0.002 * bucket * users for bucket in BUCKETS for users in (1, 2, 4, 8)}
    costs = CostModel(Warmed(score_ms, {64: 2.0}, speed=curve))
    cutter = Cutter(BUCKETS, lambda bucket: costs.score(bucket) + costs.rows(bucket) + CALL_MS, 1024)
    most = {16: 8, 64: 8, 256: 4, 1024: 2}
    return Rules(cutter, costs, most.__getitem__, num_executors, 1024, 4.0, 100.0, 1000.0)


def offered(
    curve: tuple[float, ...], rows: Sequence[int], share: float, timeout_ms: float | None = None
) -> list[Arrival]:
    """Six seconds of requests, as `share` of what a device can do without joining users."""
    rules = gpu_rules(curve)
    each_ms = float(np.mean([rules.work_ms(count, PREPARE_MS) for count in rows])) / rules.speed
    return poisson(share * 1e3 / each_ms, 6.0, rows, seed=3, timeout_ms=timeout_ms)


def latencies(outcomes: Sequence[Outcome]) -> tuple[float, float, float]:
    """p50, p99 and the mean."""
    mean = float(np.mean([one.latency_ms for one in outcomes]))
    return late_share(outcomes, 0.5), late_share(outcomes, 0.99), mean


def test_calls_at_once_take_as_much_longer_as_they_get_less_done() -> None:
    """64 candidates take 3.064 ms and .2 before; the second one comes 2 ms later."""
    rules, alone_ms = rules_of(num_executors=2, speed=(1.0, 1.5)), 0.2 + 3.0 + 0.064
    first, second = simulate([Arrival(0.0, 64), Arrival(0.002, 64)], rules, ROOMY).outcomes
    assert first.latency_ms == pytest.approx(2.0 + (alone_ms - 2.0) * 4 / 3)
    both_ms = first.latency_ms - 2.0  # side by side; then the second one is alone
    assert second.latency_ms == pytest.approx(both_ms + alone_ms - both_ms * 3 / 4)
    apart = rules_of(num_executors=2)
    assert [one.latency_ms for one in simulate([Arrival(0.0, 64), Arrival(0.002, 64)], apart, ROOMY).outcomes] == [
        pytest.approx(alone_ms)
    ] * 2
    shared = simulate([Arrival(0.0, 64), Arrival(0.002, 64)], apart, ROOMY, speeds=[Speed((1.0, 1.5))]).outcomes
    assert shared[0].latency_ms == pytest.approx(first.latency_ms)


def test_who_may_not_begin_waits_for_the_call_before() -> None:
    first, second = simulate([Arrival(0.0, 64), Arrival(0.002, 64)], rules_of(2, speed=FLAT), ROOMY).outcomes
    alone_ms = 0.2 + 3.0 + 0.064
    assert first.latency_ms == pytest.approx(alone_ms)
    assert second.latency_ms == pytest.approx(2 * alone_ms - 2.0)


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("rows", [MIXED, SHORT])
@pytest.mark.parametrize("curve", [FLAT, HARDLY, HALF])
def test_who_knows_that_executors_share_a_device_answers_sooner(
    curve: tuple[float, ...], rows: Sequence[int], share: float
) -> None:
    """The same arrivals, costs and device; the one schedule takes its executors for independent."""
    arrivals, device = offered(curve, rows, share), [Speed(curve)]
    knows = simulate(arrivals, gpu_rules(curve), ROOMY, speeds=device).outcomes
    trusts = simulate(arrivals, gpu_rules(None), ROOMY, speeds=device).outcomes
    assert all(one.how == "scored" for one in (*knows, *trusts))
    assert max(one.ended for one in knows) <= 1.001 * max(one.ended for one in trusts)  # it gets as much done
    (p50, p99, mean), (p50_trusts, p99_trusts, mean_trusts) = latencies(knows), latencies(trusts)
    assert p50 <= 1.005 * p50_trusts
    assert p99 < 0.99 * p99_trusts
    assert mean < 0.99 * mean_trusts


@pytest.mark.parametrize("curve", [HARDLY, HALF])
def test_lists_that_are_all_long_are_answered_no_later(curve: tuple[float, ...]) -> None:
    for share in (0.2, 0.8, 1.3):
        arrivals, device = offered(curve, LONG, share), [Speed(curve)]
        knows = simulate(arrivals, gpu_rules(curve), ROOMY, speeds=device).outcomes
        trusts = simulate(arrivals, gpu_rules(None), ROOMY, speeds=device).outcomes
        assert max(one.ended for one in knows) <= 1.005 * max(one.ended for one in trusts)
        assert latencies(knows)[1] <= 1.01 * latencies(trusts)[1]
        assert latencies(knows)[2] <= 1.01 * latencies(trusts)[2]


def test_promises_are_kept_where_the_device_is_reckoned_with() -> None:
    """Twice what can be done, with deadlines: who reckons with four executors lets in what one device cannot do."""
    arrivals, device = offered(HARDLY, MIXED, 2.0, timeout_ms=100.0), [Speed(HARDLY)]
    knows, trusts = (
        simulate(arrivals, gpu_rules(curve), Limits(10**9, 1e9), speeds=device).outcomes for curve in (HARDLY, None)
    )
    late, late_trusts = (sum(one.how == "late" for one in outcomes) for outcomes in (knows, trusts))
    scored, scored_trusts = (sum(one.how == "scored" for one in outcomes) for outcomes in (knows, trusts))
    assert late <= 0.005 * len(arrivals)
    assert late_trusts > 0.1 * len(arrivals)
    assert scored > 1.1 * scored_trusts


def test_no_request_starves_behind_shorter_ones() -> None:
    for curve in (FLAT, HALF):
        rules = replace(gpu_rules(curve), largest=64, fairness_ms=100.0)
        arrivals = [Arrival(0.0, 1024), *offered(curve, [10], 1.2)]
        long = simulate(arrivals, rules, ROOMY).outcomes[0]
        assert long.how == "scored"
        assert long.latency_ms < 100.0 + 3 * rules.work_ms(1024, PREPARE_MS) * rules.costs.speed.contention(4)


@settings(max_examples=60, deadline=None)
@given(some_arrivals(prepare_ms=st.tuples(st.floats(0, 20))), CURVES, st.integers(1, 6))
def test_everybody_ends_and_nothing_is_scored_twice(
    arrivals: list[Arrival], curve: tuple[float, ...], num_executors: int
) -> None:
    arrivals.sort(key=lambda arrival: arrival.at)
    simulated = simulate(arrivals, rules_of(num_executors, speed=curve), Limits(3000, 500.0))
    assert all(one.how in ("scored", "refused", "late") for one in simulated.outcomes)
    assert sum(one.arrival.rows for one in simulated.outcomes if one.how == "scored") <= simulated.rows
    for one in simulated.outcomes:
        assert one.ended >= one.arrival.at
        if one.arrival.timeout_ms is not None:
            assert one.latency_ms <= one.arrival.timeout_ms + 1e-6


@settings(max_examples=30, deadline=None)
@given(some_arrivals(prepare_ms=st.tuples(st.floats(0, 20), st.floats(0, 20))), CURVES, st.integers(1, 4))
def test_everybody_ends_where_one_kind_shares_a_device(
    arrivals: list[Arrival], curve: tuple[float, ...], num_executors: int
) -> None:
    arrivals.sort(key=lambda arrival: arrival.at)
    mix = Mix([rules_of(num_executors, speed=curve), wide_rules(2)])
    simulated = simulate(arrivals, mix, ROOMY)
    assert all(one.how in ("scored", "refused", "late") for one in simulated.outcomes)
    assert all(one.how == "scored" for one in simulated.outcomes if one.arrival.timeout_ms is None)


@settings(max_examples=40, deadline=None)
@given(some_arrivals(prepare_ms=st.tuples(st.floats(0, 20))), CURVES)
def test_the_work_that_is_done_is_no_more_than_the_device_can(
    arrivals: list[Arrival], curve: tuple[float, ...]
) -> None:
    """Without refusals all calls' own time is at most the speed of the device times the time that it took."""
    arrivals = [replace(one, timeout_ms=None, priority=Priority.INTERACTIVE) for one in arrivals]
    arrivals.sort(key=lambda arrival: arrival.at)
    done_ms, rules = [sum(one.prepare_ms[0] for one in arrivals)], rules_of(len(curve), speed=curve)

    def call_ms(bucket: int, users: int) -> float:
        done_ms.append(rules.costs.score(bucket, users))
        return done_ms[-1]

    outcomes = simulate(arrivals, rules, ROOMY, [call_ms]).outcomes
    if outcomes:
        seconds = max(one.ended for one in outcomes) - min(one.arrival.at for one in outcomes)
        assert sum(done_ms) <= seconds * 1e3 * rules.speed + 1e-3
