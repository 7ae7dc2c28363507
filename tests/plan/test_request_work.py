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
from tests.plan.made_up import FREE, ROOMY, load_of, row_of_a_microsecond, some_loads


def test_a_call_by_hand() -> None:
    """Two tables of one net, dims 4 and 8, with 2 and 3 look-ups, in one shard; 10 samples."""
    loads = [load_of("a", 100, 4, 2.0), load_of("b", 70_000, 8, 3.0)]
    plan = make_plan(Strategy.ONE_SHARD, loads, 1, ROOMY)
    costs = msgspec.structs.replace(
        FREE, call_us=7, id_us=0.5, split_id_us=100, answer_byte_us=0.125, shard_call_us=5, shard_id_us=0.25,
        shard_answer_byte_us=2, lookups=row_of_a_microsecond(0.25), wire_us=3, wire_bytes_us=10, pooled_value_us=2,
        dense_us=11, dense_sample_us=13,
    )  # fmt: skip
    work = request_work(plan, loads, costs)
    (call,) = work.calls
    out = 28 + 2 * 8 + 10 * (2 * 2 + 3 * 4)  # headers of the call and of two parts; ids of 2 and 4 bytes
    back = (4 + 8) * 10 * 4
    assert (call.out_bytes.at(10), call.back_bytes.at(10), call.lookups.at(10)) == (out, back, 50)
    rows = 10 * (2 * (1 + 16 / 4) + 3 * (1 + 32 / 4))
    assert call.serve_us.at(10) == 5 + rows + 12 * 10 * 2 + 50 / 4 + back * 2
    assert work.wire_us.at(10) == 2 * 3 + (out + back) / 10
    assert work.send_us.at(10) == 7 + 50 / 2
    assert (work.join_us.at(10), work.dense_us.at(10)) == (back / 8, 11 + 13 * 10)
    assert (work.local_us, work.local_lookups) == (Line(), Line())


def test_on_one_machine_bytes_have_no_wire() -> None:
    loads = [load_of("a", 100, 4, 2.0)]
    plan = make_plan(Strategy.ONE_SHARD, loads, 1, ROOMY)
    costs = msgspec.structs.replace(FREE, wire_us=1000, wire_bytes_us=1e-3, loopback_us=9, machine_cores=2)
    assert request_work(plan, loads, costs).wire_us.at(100) == pytest.approx(18)


def test_ids_of_tables_in_parts_cost_more() -> None:
    """A table in two parts: each has half of the ids, and a count of a byte for each sample."""
    loads = [load_of("a", 100, 4, 6.0)]
    plan = make_plan(Strategy.LOAD_BALANCED, loads, 2, ROOMY)
    work = request_work(plan, loads, msgspec.structs.replace(FREE, id_us=1, split_id_us=10))
    assert [call.out_bytes.at(10) for call in work.calls] == [28 + 8 + 10 * (3 * 2 + 1)] * 2
    assert work.send_us.at(10) == 10 * 6 * (1 + 10)


@given(st.floats(0.5, 3000), st.integers(1, 40), st.integers(1, 500))
def test_pieces_are_the_whole(samples: float, idle: int, multiple: int) -> None:
    loads = [load_of("a", 100)]
    costs = msgspec.structs.replace(FREE, dense_us=3, dense_sample_us=2, piece_samples=multiple)
    work = request_work(make_plan(Strategy.SINGULAR, loads, 1, ROOMY), loads, costs)
    pieces = work.pieces(samples, idle)
    assert len(pieces) <= idle
    assert sum(pieces) == pytest.approx(samples)
    assert all(piece % multiple == 0 for piece in pieces[:-1])
    assert 0 < pieces[-1] <= pieces[0]
    assert sum(work.piece_us(piece, samples) for piece in pieces) == pytest.approx(work.dense_us.at(samples))


def test_pieces_by_hand() -> None:
    loads = [load_of("a", 100)]
    work = request_work(make_plan(Strategy.SINGULAR, loads, 1, ROOMY), loads, CostModel(piece_samples=100))
    assert [work.pieces(300, idle) for idle in (1, 2, 4)] == [(300,), (200, 100), (100, 100, 100)]


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
