"""Servers go where they are needed."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.plan.cluster_shape import ClusterShape, smallest_shape, spread_servers
from rankd.plan.cost_model import CostModel
from rankd.plan.request_work import RequestWork, request_work
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import Strategy
from rankd.plan.table_statistics import TableLoad
from tests.plan.made_up import ROOMY, load_of, some_loads

COSTS = CostModel(dense_sample_us=0.05, main_cores=2, shard_cores=1)


def busiest(work: RequestWork, shape: ClusterShape) -> float:
    shares = [work.main_us.at(270) / shape.mains / 2]
    for number, count in enumerate(shape.replicas):
        shares.append(sum(call.serve_us.at(270) for call in work.calls if call.shard == number) / count)
    return max(shares)


@given(some_loads(), st.integers(1, 3), st.integers(1, 8))
def test_no_other_division_of_servers_is_less_busy(loads: list[TableLoad], num_shards: int, servers: int) -> None:
    plan = make_plan(Strategy.LOAD_BALANCED, loads, num_shards, ROOMY)
    work = request_work(plan, loads, COSTS)
    kinds = 1 + len(plan.shards)
    shape = spread_servers(work, len(plan.shards), servers, COSTS)
    if shape is None:
        assert servers < kinds
        return
    assert shape.servers == servers
    best = min(
        busiest(work, ClusterShape(counts[0], counts[1:]))
        for counts in product(range(1, servers + 1), repeat=kinds)
        if sum(counts) == servers
    )
    assert busiest(work, shape) == pytest.approx(best)


def test_cores_and_bytes_are_of_all_servers() -> None:
    loads = [load_of("a", 100), load_of("b", 10)]
    plan = make_plan(Strategy.CAPACITY_BALANCED, loads, 2, ROOMY)
    shape = ClusterShape(3, (1, 2))
    assert shape.cores(COSTS) == 3 * 2 + 3
    assert shape.size_bytes(plan) == 3 * plan.main_bytes + plan.shard_bytes[0] + 2 * plan.shard_bytes[1]
    assert smallest_shape(plan) == ClusterShape(1, (1, 1))
