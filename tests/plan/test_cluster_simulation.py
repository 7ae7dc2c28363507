"""The simulation against plain recursions, the textbook, and itself: no work is lost, none is done twice."""

from __future__ import annotations

import heapq

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.plan.cluster_shape import ClusterShape, smallest_shape
from rankd.plan.cluster_simulation import ClusterRequests, Stragglers, poisson_requests, simulate_cluster
from rankd.plan.cost_model import CostModel
from rankd.plan.queueing import erlang_c
from rankd.plan.request_work import RequestWork, request_work
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import Strategy
from rankd.plan.table_statistics import TableLoad
from tests.plan.made_up import FREE, ROOMY, load_of, row_of_a_microsecond, some_loads

ONE_US = msgspec.structs.replace(FREE, dense_sample_us=1.0, piece_samples=10**9)
"""A request takes as many microseconds as it has samples, in one piece."""


def work_of(strategy: Strategy, costs: CostModel, num_shards: int = 1) -> RequestWork:
    loads = [load_of("a", 100), load_of("b", 50, net="other")]
    return request_work(make_plan(strategy, loads, num_shards, ROOMY), loads, costs)


def first_come_first_served(requests: ClusterRequests, cores: int) -> list[float]:
    """Latencies on servers of `cores`, by the times at which cores become free."""
    free = [0.0] * cores
    latencies = []
    for at, takes in zip(requests.at_us.tolist(), requests.samples.tolist(), strict=True):
        ends = max(at, heapq.heappop(free)) + takes
        heapq.heappush(free, ends)
        latencies.append(ends - at)
    return latencies


some_requests = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60)), min_size=1, max_size=40).map(
    lambda pairs: ClusterRequests(
        np.cumsum([float(gap) for gap, _ in pairs]), np.asarray([float(samples) for _, samples in pairs])
    )
)


@given(some_requests, st.integers(1, 4))
def test_singular_is_first_come_first_served(requests: ClusterRequests, cores: int) -> None:
    costs = msgspec.structs.replace(ONE_US, main_cores=cores)
    found = simulate_cluster(requests, work_of(Strategy.SINGULAR, costs), ClusterShape(1, ()), costs)
    assert found.latency_us.tolist() == first_come_first_served(requests, cores)


@given(some_requests, st.integers(1, 4), st.integers(1, 3))
def test_shards_that_take_no_time_change_nothing(requests: ClusterRequests, cores: int, mains: int) -> None:
    costs = msgspec.structs.replace(ONE_US, main_cores=cores)
    alone = simulate_cluster(requests, work_of(Strategy.SINGULAR, costs), ClusterShape(mains, ()), costs)
    called = simulate_cluster(requests, work_of(Strategy.ONE_SHARD, costs), ClusterShape(mains, (1,)), costs)
    assert called.latency_us.tolist() == alone.latency_us.tolist()


@given(some_loads(), some_requests, st.sampled_from(Strategy), st.integers(1, 4), st.integers(1, 2), st.integers(1, 2))
def test_all_work_is_done_once(
    loads: list[TableLoad],
    requests: ClusterRequests,
    strategy: Strategy,
    num_shards: int,
    mains: int,
    replicas: int,
) -> None:
    costs = CostModel(main_cores=2, shard_cores=1)
    plan = make_plan(strategy, loads, num_shards, ROOMY)
    work = request_work(plan, loads, costs)
    shape = ClusterShape(mains, (replicas,) * len(plan.shards))
    found = simulate_cluster(requests, work, shape, costs)
    samples = requests.samples.tolist()
    assert sum(found.main_us) == pytest.approx(sum(work.main_us.at(one) for one in samples))
    for number, replicas_us in enumerate(found.shard_us):
        calls = [call for call in work.calls if call.shard == number]
        assert sum(replicas_us) == pytest.approx(sum(call.serve_us.at(one) for call in calls for one in samples))
    ways = [(call.serve_us + work.wire_us) for call in work.calls]
    for latency, one in zip(found.latency_us.tolist(), samples, strict=True):
        slowest = max([work.local_us.at(one), *(way.at(one) for way in ways)])
        assert (
            latency
            >= work.send_us.at(one) + slowest + work.join_us.at(one) + work.dense_us.at(one) / costs.main_cores - 1e-6
        )
    assert found.ended_us == pytest.approx(max(requests.at_us + found.latency_us))
    assert found.busiest(costs) <= 1 + 1e-9


def test_m_m_1_waits_and_counts_as_in_theory() -> None:
    """Mean service 100 us, busy for .7: sojourn 100 / (1 - .7); Little: .7 / .3 requests are there at a time."""
    random = np.random.default_rng(0)
    number = 60_000
    requests = ClusterRequests(np.cumsum(random.exponential(100 / 0.7, number)), random.exponential(100.0, number))
    found = simulate_cluster(requests, work_of(Strategy.SINGULAR, ONE_US), ClusterShape(1, ()), ONE_US)
    assert found.latency_us.mean() == pytest.approx(100 / 0.3, rel=0.04)
    assert found.quantile_ms(0.99) == pytest.approx(np.log(100) * 100 / 0.3 / 1e3, rel=0.1)
    assert found.busiest(ONE_US) == pytest.approx(0.7, rel=0.02)
    ends = np.sort(requests.at_us + found.latency_us)
    there = np.arange(number) - np.searchsorted(ends, requests.at_us)  # as each one finds it when it comes
    assert there.mean() == pytest.approx(0.7 / 0.3, rel=0.04)


def test_m_m_4_waits_as_in_theory() -> None:
    random = np.random.default_rng(1)
    number = 60_000
    requests = ClusterRequests(np.cumsum(random.exponential(100 / 3.2, number)), random.exponential(100.0, number))
    costs = msgspec.structs.replace(ONE_US, main_cores=4)
    found = simulate_cluster(requests, work_of(Strategy.SINGULAR, costs), ClusterShape(1, ()), costs)
    waits = found.latency_us - requests.samples
    assert np.count_nonzero(waits > 1e-6) / number == pytest.approx(erlang_c(3.2, 4), rel=0.04)
    assert waits.mean() == pytest.approx(erlang_c(3.2, 4) * 100 / (4 - 3.2), rel=0.06)


def test_the_slowest_shard_counts() -> None:
    """Two shards, of which a straggler takes ten times as long: with every call one, so does the slowest."""
    costs = msgspec.structs.replace(FREE, lookups=row_of_a_microsecond())
    requests = ClusterRequests(np.asarray([0.0]), np.asarray([50.0]))
    loads = [load_of("a", 100, lookups=2.0), load_of("b", 100, lookups=3.0)]
    plan = make_plan(Strategy.LOAD_BALANCED, loads, 1, ROOMY)
    work = request_work(plan, loads, costs)
    for stragglers, times in ((Stragglers(), 1), (Stragglers(1.0, 10.0), 10)):
        found = simulate_cluster(requests, work, smallest_shape(plan), costs, stragglers)
        assert found.latency_us.tolist() == [pytest.approx(5 * 50 * times)]


def test_few_stragglers_make_the_tail_of_many_shards() -> None:
    """A call in a hundred is slow: with 8 shards a request in 13 waits for one."""
    loads = [load_of(f"t{number}", 1000, lookups=10.0) for number in range(8)]
    costs = msgspec.structs.replace(FREE, lookups=row_of_a_microsecond(), rate=10.0, samples=(10,))
    plan = make_plan(Strategy.LOAD_BALANCED, loads, 8, ROOMY)
    work = request_work(plan, loads, costs)
    requests = poisson_requests(costs, 4000)
    found = simulate_cluster(requests, work, smallest_shape(plan), costs, Stragglers(0.01, 10.0))
    slow = np.count_nonzero(found.latency_us > 500) / 4000
    assert slow == pytest.approx(1 - 0.99**8, abs=0.02)
    assert found.quantile_ms(0.5) == pytest.approx(0.1)


def test_idle_cores_share_the_dense_part() -> None:
    """300 samples in pieces of 100, a microsecond each: the first request has four cores, the second what is left."""
    costs = msgspec.structs.replace(ONE_US, main_cores=4, piece_samples=100)
    requests = ClusterRequests(np.asarray([0.0, 10.0]), np.asarray([300.0, 300.0]))
    found = simulate_cluster(requests, work_of(Strategy.SINGULAR, costs), ClusterShape(1, ()), costs)
    assert found.latency_us.tolist() == [100.0, 300.0]
    assert sum(found.main_us) == 600


def test_processes_of_one_machine_share_its_cores() -> None:
    """50 us in a shard and 200 in the main server: one after the other for a request alone. Of two at once on one core,
    who is in the shard and who is in the main server have half of it each."""
    costs = msgspec.structs.replace(
        FREE, lookups=row_of_a_microsecond(), dense_us=200.0, main_cores=2, shard_cores=1, machine_cores=1
    )
    loads = [load_of("a", 100, lookups=1.0)]
    plan = make_plan(Strategy.ONE_SHARD, loads, 1, ROOMY)
    work = request_work(plan, loads, costs)
    alone = ClusterRequests(np.asarray([0.0]), np.asarray([50.0]))
    assert simulate_cluster(alone, work, smallest_shape(plan), costs).latency_us.tolist() == [250.0]
    two = ClusterRequests(np.asarray([0.0, 100.0]), np.asarray([50.0, 50.0]))
    found = simulate_cluster(two, work, smallest_shape(plan), costs)
    # From 100 to 200 the second is in the shard, from 200 to 400 both are in the main server, each at half speed
    assert found.latency_us.tolist() == [400.0, 400.0]
    assert found.busiest(costs) == pytest.approx(1.0)
    own = msgspec.structs.replace(costs, machine_cores=None)
    apart = simulate_cluster(two, request_work(plan, loads, own), smallest_shape(plan), own)
    assert apart.latency_us.tolist() == [250.0, 250.0]


def test_requests_come_at_their_rate_and_sizes() -> None:
    requests = poisson_requests(CostModel(rate=50.0), 20_000)
    assert requests.at_us[-1] / 20_000 == pytest.approx(1e6 / 50, rel=0.03)
    assert requests.samples.mean() == pytest.approx(270, rel=0.02)
    assert (np.diff(requests.at_us) > 0).all()
