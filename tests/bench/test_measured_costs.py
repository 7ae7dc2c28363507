"""Costs that are measured: the arithmetic against servers whose costs are known, and the command for real."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rankd.bench.shard_suite.call_costs import Shape, Sides, fitted, medians, shapes
from rankd.bench.shard_suite.lookup_costs import line_of_rows
from rankd.bench.shard_suite.measured_costs import at_load, with_dense_part
from rankd.bench.shard_suite.served_costs import line_through, small_and_large
from rankd.cli.planning import plan
from rankd.embeddings.table_spec import TableSpec, TableStorage
from rankd.plan.cost_model import CostModel, LookupCost
from rankd.plan.costs_file import read_costs
from rankd.plan.request_work import Line, request_work
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Strategy
from rankd.plan.table_statistics import TableLoad, TableStatistics
from rankd.types import RankRequest

costs_us = st.floats(0.001, 1000)


@given(costs_us, costs_us, costs_us, costs_us, costs_us, costs_us, costs_us, st.floats(0, 100))
def test_costs_of_calls_are_found_again(
    call: float,
    each: float,
    split: float,
    byte: float,
    shard_call: float,
    shard_id: float,
    shard_byte: float,
    way: float,
) -> None:
    def measured(shape: Shape) -> Sides:
        (table,) = shape.asked.tables
        ids = len(shape.asked.ids) if shape.asked.num_samples > 1 else 0  # one is next to nothing, and taken as that
        answer = shape.answer_bytes if table == "answer" else 0  # so are the answers of the other shapes
        parts = 2 if table == "split" else 1
        client = parts * call + ids * (each + (parts - 1) * split) + answer * byte
        shards = parts * shard_call + ids * shard_id + answer * shard_byte
        return Sides(client, shards, client + shards + 2 * way)

    found = fitted({name: measured(shape) for name, shape in shapes().items()})
    assert found.call_us == pytest.approx(call)
    assert found.id_us == pytest.approx(each, rel=1e-3)
    assert found.split_id_us == pytest.approx(split, rel=1e-3)
    assert found.answer_byte_us == pytest.approx(byte, rel=1e-3)
    assert found.shard_call_us == pytest.approx(shard_call)
    assert found.shard_id_us == pytest.approx(shard_id, rel=1e-3)
    assert found.shard_answer_byte_us == pytest.approx(shard_byte, rel=1e-3)
    assert found.loopback_us == pytest.approx(way, abs=1e-6)


def test_a_round_that_something_else_disturbed_does_not_count() -> None:
    rounds = [Sides(300.0, 200.0, 500.0), Sides(310.0, 190.0, 520.0), Sides(1800.0, 210.0, 510.0)]
    assert medians(rounds) == Sides(310.0, 200.0, 510.0)


def test_no_two_samples_are_alike() -> None:
    """Ids that all samples have are sent once: such a shape would measure something else."""
    for name, shape in shapes().items():
        samples = shape.asked.num_samples
        bags = {tuple(one) for one in shape.asked.ids.reshape(samples, -1).tolist()}
        assert len(bags) > samples / 4, name


@given(st.floats(0, 10), st.floats(0, 10))
def test_rows_are_a_line_that_neither_falls_nor_begins_below_nothing(short: float, long: float) -> None:
    cost = line_of_rows([(100, short), (400, long)])
    assert min(cost.row_us, cost.byte_us) >= 0
    assert cost.row_us + 100 * cost.byte_us == pytest.approx(short)
    if short <= long <= 4 * short:
        assert cost.row_us + 400 * cost.byte_us == pytest.approx(long)


@given(st.floats(0, 1e4), st.floats(0, 1e3))
def test_a_line_is_found_again(fixed: float, each: float) -> None:
    found = line_through([(size, fixed + each * size) for size in (150.0, 400.0)])
    for size in (150.0, 400.0, 700.0):
        assert found.at(size) == pytest.approx(fixed + each * size, rel=1e-6, abs=1e-6)
    assert line_through([(50.0, 100.0)]) == Line(0.0, 2.0)
    assert line_through([(100.0, 300.0), (700.0, 200.0)]) == Line(250.0, 0.0)
    assert line_through([(100.0, 100.0), (200.0, 400.0)]) == Line(0.0, 1.5)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_small_and_large_are_all(sizes: list[int]) -> None:
    requests = [RankRequest("user", ("item",) * size) for size in sizes]
    halves = small_and_large(requests)
    assert sorted(map(id, [request for half in halves for request in half])) == sorted(map(id, requests))
    if len(halves) == 2:
        small, large = ([len(request.candidates) for request in half] for half in halves)
        assert max(small) < min(large)


def test_the_dense_part_is_what_lookups_leave() -> None:
    load = TableLoad(TableSpec("a", 100, 25), "all", TableStatistics("a", 10.0))
    costs = CostModel(lookups={TableStorage.FP32: LookupCost(1.0, 0.01)}, pooled_value_us=0.0)
    found = with_dense_part(costs, Line(500.0, 30.0), [load], 16)
    assert (found.dense_us, found.piece_samples) == (500.0, 16)
    assert found.dense_sample_us == pytest.approx(30.0 - 10 * 2.0)
    work = request_work(make_plan(Strategy.SINGULAR, [load], 1, MemoryLimits()), [load], found)
    assert work.cpu_us.at(100) == pytest.approx(500 + 100 * 30)


def test_under_load_a_request_takes_what_was_measured() -> None:
    load = TableLoad(TableSpec("a", 100, 25), "all", TableStatistics("a", 10.0))
    costs = CostModel(dense_us=500.0, dense_sample_us=30.0)
    loaded = at_load(costs, [load], 9000.0, 200)
    work = request_work(make_plan(Strategy.SINGULAR, [load], 1, MemoryLimits()), [load], loaded)
    assert work.cpu_us.at(200) == pytest.approx(9000)
    assert loaded.dense_us / loaded.dense_sample_us == pytest.approx(500 / 30)
    nothing = CostModel(dense_sample_us=0.0)
    assert at_load(nothing, [load], 9000.0, 200) == nothing


@pytest.mark.real_run
def test_the_command_writes_what_plans_read(tmp_path: Path) -> None:
    out = tmp_path / "costs.toml"
    arguments = ["costs", "--out", str(out), "--seconds", "0.1", "--table-size", "64KiB", "--json"]
    done = CliRunner().invoke(plan, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    costs = read_costs(out)
    assert msgspec.json.decode(done.stdout, type=CostModel) == costs
    assert set(costs.lookups) == set(TableStorage)
    assert min(costs.call_us, costs.shard_call_us, costs.row_us(TableSpec("a", 1, 8))) > 0
    assert "dense_us, dense_sample_us and piece_samples are no measurements" in out.read_text()
    used = CliRunner().invoke(
        plan, ["dlrm-v2", "--costs", str(out), "--shards", "2", "--rate", "5"], catch_exceptions=False
    )
    assert used.exit_code == 0
