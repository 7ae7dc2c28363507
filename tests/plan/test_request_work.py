"""What a request takes, counted by hand."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.plan.cost_model import CostModel
from rankd.plan.request_work import Line, request_work
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Strategy
from rankd.plan.table_statistics import TableLoad
from tests.plan.made_up import FREE, ROOMY, load_of, some_loads


def test_a_call_by_hand() -> None:
    """Two tables of one net, dims 4 and 8, with 2 and 3 look-ups, in one shard; 10 samples."""
    loads = [load_of("a", 100, 4, 2.0), load_of("b", 100, 8, 3.0)]
    plan = make_plan(Strategy.ONE_SHARD, loads, 1, ROOMY)
    costs = msgspec.structs.replace(
        FREE, call_us=7, serialise_byte_us=0.5, lookup_us=1, lookup_byte_us=0.25, wire_us=3, wire_bytes_us=10,
        pooled_value_us=2, dense_us=11, dense_sample_us=13,
    )  # fmt: skip
    work = request_work(plan, loads, costs)
    (call,) = work.calls
    out = (2 * 10 + 1) * 8 + (2 + 3) * 10 * 8
    back = (4 + 8) * 10 * 4
    assert (call.out_bytes.at(10), call.back_bytes.at(10), call.lookups.at(10)) == (out, back, 50)
    rows = 10 * (2 * (1 + 16 / 4) + 3 * (1 + 32 / 4))
    assert call.serve_us.at(10) == 7 + rows + 12 * 10 * 2 + (out + back) / 2
    assert work.wire_us.at(10) == 2 * 3 + (out + back) / 10
    assert work.send_us.at(10) == 7 + out / 2
    assert work.finish_us.at(10) == 11 + 13 * 10 + back / 2 + 12 * 10 * 2
    assert (work.local_us, work.local_lookups) == (Line(), Line())


def test_a_shard_is_called_once_for_each_net_that_it_serves() -> None:
    loads = [load_of("a", 10, net="x"), load_of("b", 10, net="y"), load_of("c", 10, net="x")]
    work = request_work(make_plan(Strategy.ONE_SHARD, loads, 1, ROOMY), loads, CostModel())
    assert [(call.shard, call.net, call.lookups.at(1)) for call in work.calls] == [(0, "x", 2.0), (0, "y", 1.0)]


def test_hot_rows_are_looked_up_in_the_main_process() -> None:
    load = load_of("a", 10_000, lookups=10.0, hot=(0.3, 0.3, 0.3, 0.3))
    plan = make_plan(Strategy.ONE_SHARD, [load], 1, MemoryLimits(replicate_bytes=0, hot_row_bytes=load.spec.row_bytes))
    work = request_work(plan, [load], CostModel())
    assert work.local_lookups.at(100) == pytest.approx(300)
    assert work.calls[0].lookups.at(100) == pytest.approx(700)


@given(some_loads(), st.sampled_from(Strategy), st.integers(1, 8), st.integers(0, 20_000), st.integers(0, 20_000))
def test_every_lookup_is_made_once(
    loads: list[TableLoad], strategy: Strategy, num_shards: int, replicate: int, hot: int
) -> None:
    plan = make_plan(strategy, loads, num_shards, MemoryLimits(None, None, replicate, hot))
    work = request_work(plan, loads, CostModel())
    made = work.local_lookups.at(3) + sum(call.lookups.at(3) for call in work.calls)
    assert made == pytest.approx(3 * sum(load.statistics.lookups for load in loads))
