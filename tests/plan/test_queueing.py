"""Waits are those of the textbook."""

from __future__ import annotations

from math import exp, factorial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.plan.queueing import erlang_c, queue_of, queue_of_moments


@given(st.integers(1, 30), st.floats(0.01, 0.99))
def test_erlangs_c_is_its_sum(cores: int, busy: float) -> None:
    offered = busy * cores
    last = offered**cores / factorial(cores) / (1 - busy)
    assert erlang_c(offered, cores) == pytest.approx(
        last / (sum(offered**k / factorial(k) for k in range(cores)) + last)
    )


@given(st.floats(1, 900), st.floats(1, 1000), st.floats(0, 3))
def test_one_core_waits_by_pollaczek_and_khinchine(rate: float, mean_us: float, cv: float) -> None:
    square = mean_us**2 * (1 + cv**2)
    busy = rate * mean_us / 1e6
    queue = queue_of_moments(rate, mean_us, square, 1)
    assert queue.busy == pytest.approx(busy)
    assert queue.mean_wait_us == pytest.approx(rate / 1e6 * square / 2 / (1 - busy))


def test_draws_have_the_waits_of_m_m_1() -> None:
    """Busy for .8: a share of .8 waits, and the 99% quantile of waits is ln(.8 / .01) mean waits of those."""
    queue = queue_of_moments(800, 1000.0, 2e6, 1)
    waits = queue.draw(np.random.default_rng(0), 200_000)
    assert np.count_nonzero(waits) / 200_000 == pytest.approx(0.8, abs=0.005)
    assert exp(-np.quantile(waits, 0.99) / 5000) == pytest.approx(0.01 / 0.8, rel=0.05)


def test_nothing_to_do_and_too_much() -> None:
    assert queue_of(1000, [0.0, 0.0], 2).mean_wait_us == 0
    over = queue_of(1000, [2000.0], 2)
    assert over.busy == 1
    assert over.mean_wait_us == float("inf")
