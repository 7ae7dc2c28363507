"""The simulated schedule: work is conserved, bounds are kept, and what the policy is for can be seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.schedule.admission import Limits
from rankd.schedule.policy import Priority
from rankd.schedule.simulation import Arrival, Outcome, simulate
from tests.schedule.made_up import CALL_MS, ROOMY, rules_of, some_arrivals


def poisson(
    rate: float, seconds: float, rows: Sequence[int], seed: int = 0, timeout_ms: float | None = None
) -> list[Arrival]:
    """Requests of given sizes, in turn at random."""
    random = np.random.default_rng(seed)
    times = np.cumsum(random.exponential(1 / rate, int(rate * seconds)))
    return [Arrival(float(at), int(random.choice(rows)), timeout_ms=timeout_ms) for at in times]


def late_share(outcomes: Sequence[Outcome], share: float, rows: tuple[int, int] = (0, 10**9)) -> float:
    """The latency in ms that `share` of the scored requests with so many candidates keep."""
    found = [one.latency_ms for one in outcomes if one.how == "scored" and rows[0] <= one.arrival.rows <= rows[1]]
    return float(np.quantile(found, share))


def test_one_request_takes_what_it_costs() -> None:
    (outcome,) = simulate([Arrival(1.0, 64)], rules_of(num_executors=1), ROOMY).outcomes
    assert outcome.how == "scored"
    assert outcome.latency_ms == pytest.approx(0.2 + CALL_MS[64, 1], abs=0.1)


def test_a_long_request_alone_is_spread_over_the_executors() -> None:
    one, two = (simulate([Arrival(0.0, 640)], rules_of(num_executors=n), ROOMY).outcomes[0] for n in (1, 2))
    assert two.latency_ms < 0.6 * one.latency_ms


def test_short_ones_wait_for_a_piece_and_not_for_the_whole() -> None:
    arrivals = [Arrival(0.0, 1024), Arrival(0.0015, 10)]
    cut, whole = (simulate(arrivals, rules_of(num_executors=1, largest=n), ROOMY).outcomes for n in (64, 256))
    assert cut[1].latency_ms < CALL_MS[64, 1] + CALL_MS[16, 1] + 1.0
    assert whole[1].latency_ms > CALL_MS[256, 1] - 2.0
    assert cut[0].latency_ms < 1.2 * whole[0].latency_ms


def test_no_request_starves_behind_shorter_ones() -> None:
    rules = rules_of(num_executors=1, fairness_ms=100.0)
    arrivals = [Arrival(0.0, 1024), *poisson(700, 5.0, [10])]  # more than one executor can do without sharing calls
    long = simulate(arrivals, rules, ROOMY).outcomes[0]
    assert long.how == "scored"
    assert long.latency_ms < 100.0 + 3 * rules.work_ms(1024, 0.2)


def test_batch_requests_give_way_and_are_done_in_the_end() -> None:
    interactive = poisson(250, 4.0, [40], seed=1)
    batch = [Arrival(0.0, 1024, priority=Priority.BATCH) for _ in range(20)]
    rules = rules_of(num_executors=1, batch_ms=2000.0)
    alone = simulate(interactive, rules, ROOMY).outcomes
    both = simulate([*batch, *interactive], rules, ROOMY).outcomes
    assert all(one.how == "scored" for one in both)
    first_two_seconds = [one for one in both[len(batch) :] if one.arrival.at < 1.5]
    assert late_share(first_two_seconds, 0.99) < late_share(alone, 0.99) + 2 * CALL_MS[64, 1]


def test_twice_as_much_as_can_be_done_is_refused_at_once_and_the_rest_is_in_time() -> None:
    rules = rules_of(num_executors=2)
    rows = [10, 40, 100, 300]
    capacity = 2000.0 / float(np.mean([rules.work_ms(count, 0.2) for count in rows]))
    arrivals = poisson(2 * capacity, 20.0, rows, timeout_ms=100.0)
    simulated = simulate(arrivals, rules, Limits(10**9, 1e9))
    how = [one.how for one in simulated.outcomes]
    assert how.count("late") <= 0.005 * len(how)
    assert all(one.latency_ms <= 100.0 + 1e-6 for one in simulated.outcomes)
    assert all(one.latency_ms == 0.0 for one in simulated.outcomes if one.how == "refused")
    work = sum(rules.work_ms(one.arrival.rows, 0.2) for one in simulated.outcomes if one.how == "scored")
    assert work / (2 * simulated.ended * 1e3) > 0.9


def test_padding_is_small_because_long_lists_are_cut_to_fit() -> None:
    rules = rules_of()
    simulated = simulate(poisson(50, 10.0, range(100, 700)), rules, ROOMY)
    assert simulated.padded_rows / simulated.rows < 0.05


@settings(max_examples=60, deadline=None)
@given(
    some_arrivals(prepare_ms=st.tuples(st.floats(0, 20))),
    st.integers(1, 4),
)
def test_everybody_ends_and_nothing_is_scored_twice(arrivals: list[Arrival], num_executors: int) -> None:
    arrivals.sort(key=lambda arrival: arrival.at)
    simulated = simulate(arrivals, rules_of(num_executors=num_executors), Limits(3000, 500.0))
    assert all(one.how in ("scored", "refused", "late") for one in simulated.outcomes)
    scored = sum(one.arrival.rows for one in simulated.outcomes if one.how == "scored")
    assert scored <= simulated.rows
    for one in simulated.outcomes:
        assert one.ended >= one.arrival.at
        if one.arrival.timeout_ms is not None:
            assert one.latency_ms <= one.arrival.timeout_ms + 1e-6


def test_more_candidates_than_the_cuts_are_known_for() -> None:
    with pytest.raises(ValueError, match="more than 1024"):
        simulate([Arrival(0.0, 1025)], rules_of(), ROOMY)
