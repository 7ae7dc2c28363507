"""Predictions: exact without queues, those of the textbook with one, near the simulation with many."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from rankd.plan.cluster_shape import ClusterShape, smallest_shape
from rankd.plan.cluster_simulation import poisson_requests, simulate_cluster
from rankd.plan.cost_model import MLPERF_SAMPLES, CostModel
from rankd.plan.declaration import loads_of, read_declaration
from rankd.plan.prediction import predict
from rankd.plan.request_work import request_work
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Strategy
from tests.plan.made_up import FREE, ROOMY, load_of

DLRM = loads_of(read_declaration("dlrm-v2"))


def test_requests_have_mlperfs_mean() -> None:
    assert CostModel().mean_samples == 270
    assert len(MLPERF_SAMPLES) == 20


def test_without_others_a_request_takes_what_its_steps_take() -> None:
    costs = msgspec.structs.replace(CostModel(), rate=1e-9, samples=(200,))
    plan = make_plan(Strategy.LOAD_BALANCED, DLRM, 4, MemoryLimits())
    work = request_work(plan, DLRM, costs)
    calls = max(call.serve_us.at(200) for call in work.calls) + work.wire_us.at(200)
    own = work.send_us + work.local_us + work.join_us
    expected = own.at(200) + calls + work.dense_us.at(100)
    told = predict(plan, DLRM, costs)
    assert told.mean_ms == pytest.approx(expected / 1e3)
    assert told.p99_ms == pytest.approx(expected / 1e3)
    assert told.calls == len(work.calls) == 4
    assert told.cpu_ms == pytest.approx(work.cpu_us.at(200) / 1e3)
    assert told.cores == 5 * 8


def test_singular_waits_as_m_d_1() -> None:
    """1 ms of service, busy for .5: .5 ms of wait in the mean."""
    load = load_of("a", 10)
    costs = msgspec.structs.replace(FREE, dense_us=1000, rate=500, samples=(10,))
    told = predict(make_plan(Strategy.SINGULAR, [load], 1, ROOMY), [load], costs)
    assert told.mean_ms == pytest.approx(1.5, rel=0.03)
    assert told.main.busy == told.busiest == 0.5


def test_who_cannot_keep_up_has_no_latency() -> None:
    load = load_of("a", 10)
    costs = msgspec.structs.replace(FREE, dense_us=1000, rate=1000, samples=(10,))
    plan = make_plan(Strategy.SINGULAR, [load], 1, ROOMY)
    told = predict(plan, [load], costs)
    assert (told.mean_ms, told.p99_ms, told.busiest) == (None, None, 1.0)
    assert predict(plan, [load], costs, ClusterShape(2, ())).busiest == 0.5


@pytest.mark.parametrize(("strategy", "rate"), [(Strategy.LOAD_BALANCED, 100), (Strategy.CAPACITY_BALANCED, 230)])
def test_it_is_near_the_simulation(strategy: Strategy, rate: float) -> None:
    """Two cores in the main server, busy for up to two thirds."""
    costs = msgspec.structs.replace(CostModel(), rate=rate, dense_sample_us=18.0, main_cores=2, shard_cores=1)
    plan = make_plan(strategy, DLRM, 3, MemoryLimits())
    told = predict(plan, DLRM, costs)
    simulated = simulate_cluster(
        poisson_requests(costs, 8000), request_work(plan, DLRM, costs), smallest_shape(plan), costs
    )
    assert told.mean_ms is not None
    assert told.p99_ms is not None
    assert told.mean_ms == pytest.approx(float(np.mean(simulated.latency_us)) / 1e3, rel=0.1)
    assert told.p99_ms == pytest.approx(simulated.quantile_ms(0.99), rel=0.15)
    assert told.busiest == pytest.approx(simulated.busiest(costs), rel=0.05)


def test_one_machine_is_simulated() -> None:
    """Shards that have the main server's cores beside theirs make it wait; busy beyond its cores, it has no latency."""
    costs = msgspec.structs.replace(CostModel(), rate=60, main_cores=2, shard_cores=1, wire_us=0.0, wire_bytes_us=1e9)
    machine = msgspec.structs.replace(costs, machine_cores=2, loopback_us=0.0)
    plan = make_plan(Strategy.LOAD_BALANCED, DLRM, 3, MemoryLimits())
    told, requests = predict(plan, DLRM, machine), poisson_requests(machine, 6000)
    assert told.cores == 2
    together, apart = (
        simulate_cluster(requests, request_work(plan, DLRM, one), smallest_shape(plan), one).settled_us.mean() / 1e3
        for one in (machine, costs)
    )
    assert told.mean_ms == pytest.approx(together)
    assert together > 1.01 * apart
    assert predict(plan, DLRM, msgspec.structs.replace(machine, rate=110)).p99_ms is None
    assert predict(plan, DLRM, msgspec.structs.replace(costs, rate=100)).p99_ms is not None


def test_figures_of_servers_add_up() -> None:
    plan = make_plan(Strategy.CAPACITY_BALANCED, DLRM, 4, MemoryLimits(hot_row_bytes=2**30))
    told = predict(plan, DLRM, CostModel())
    assert told.main.lookups + sum(shard.lookups for shard in told.shards) == pytest.approx(214 * 270)
    assert sum(shard.size_bytes for shard in told.shards) == sum(plan.shard_bytes)
    work_ms = sum(one.busy for one in (told.main, *told.shards)) * 8 / told.rate * 1e3
    assert math.isclose(work_ms, told.cpu_ms, rel_tol=1e-6)
