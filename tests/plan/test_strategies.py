"""Whatever the tables and limits: a plan covers each row once and fits, or is refused because it cannot."""

from __future__ import annotations

from collections import Counter
from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.embeddings.table_spec import TableSpec, TableStorage
from rankd.errors import ConfigError
from rankd.plan.declaration import loads_of, read_declaration
from rankd.plan.strategies import make_plan, shards_of_nets
from rankd.plan.table_plan import MemoryLimits, Plan, Strategy
from rankd.plan.table_statistics import TableLoad
from tests.plan.made_up import ROOMY, load_of, some_limits, some_loads

SHARDED = [strategy for strategy in Strategy if strategy is not Strategy.SINGULAR]
GIB = 1024**3


def owners(plan: Plan) -> Counter[tuple[str, int]]:
    """How often each row of each table is somewhere, counted row by row."""
    seen: Counter[tuple[str, int]] = Counter()
    specs = {table.name: table for table in plan.tables}
    for shard in plan.shards:
        for part in shard.parts:
            seen.update(
                (part.table, row) for row in range(specs[part.table].rows) if row % part.modulus == part.remainder
            )
    for name in plan.replicated:
        seen.update((name, row) for row in range(specs[name].rows))
    return seen


@given(some_loads(), st.sampled_from(Strategy), st.integers(1, 9), some_limits)
def test_a_plan_covers_each_row_once_and_fits_or_is_refused(
    loads: list[TableLoad], strategy: Strategy, num_shards: int, limits: MemoryLimits
) -> None:
    try:
        plan = make_plan(strategy, loads, num_shards, limits)
    except ConfigError:
        assert not roomy_enough(loads, strategy, num_shards, limits)
        return
    assert owners(plan) == {(load.name, row): 1 for load in loads for row in range(load.spec.rows)}
    assert len(plan.shards) <= num_shards
    assert all(shard.parts for shard in plan.shards)
    assert all(limits.shard_bytes is None or size <= limits.shard_bytes for size in plan.shard_bytes)
    assert limits.main_bytes is None or plan.main_bytes <= limits.main_bytes


def roomy_enough(loads: list[TableLoad], strategy: Strategy, num_shards: int, limits: MemoryLimits) -> bool:
    """Whether it certainly fits: all in the main process, or a part of every table in every shard."""
    specs = [load.spec for load in loads]
    if strategy is Strategy.SINGULAR:
        return limits.main_bytes is None or sum(spec.size_bytes for spec in specs) <= limits.main_bytes
    if limits.main_bytes is not None and limits.hot_row_bytes > limits.main_bytes:
        return False
    shards = 1 if strategy is Strategy.ONE_SHARD else num_shards
    parts = sum(-(-spec.rows // shards) * spec.row_bytes for spec in specs)
    return limits.shard_bytes is None or parts <= limits.shard_bytes


@given(some_loads(), st.integers(1, 9))
def test_shards_are_within_a_quarter_of_the_best(loads: list[TableLoad], num_shards: int) -> None:
    """The heaviest shard cannot have less than a fair share; it has at most 1.25 of them and a row."""
    bytes_of = {load.name: float(load.spec.size_bytes) for load in loads}
    lookups_of = {load.name: load.statistics.lookups for load in loads}
    for strategy, weights in ((Strategy.CAPACITY_BALANCED, bytes_of), (Strategy.LOAD_BALANCED, lookups_of)):
        plan = make_plan(strategy, loads, num_shards, ROOMY)
        specs = plan.specs
        heaviest = max(
            sum(weights[p.table] * p.rows_of(specs[p.table]) / specs[p.table].rows for p in shard.parts)
            for shard in plan.shards
        )
        row = max(weights[load.name] / load.spec.rows for load in loads)
        assert heaviest <= 1.25 * sum(weights.values()) / num_shards + row + 1e-6


def test_dlrm_v2_is_balanced_by_what_each_strategy_balances() -> None:
    loads = loads_of(read_declaration("dlrm-v2"))
    lookups = {load.name: load.statistics.lookups for load in loads}
    for num_shards in (2, 3, 5, 8, 16):
        by_bytes = make_plan(Strategy.CAPACITY_BALANCED, loads, num_shards, MemoryLimits())
        assert max(by_bytes.shard_bytes) <= 1.1 * sum(by_bytes.shard_bytes) / num_shards
        by_lookups = make_plan(Strategy.LOAD_BALANCED, loads, num_shards, MemoryLimits())
        asked = [sum(lookups[part.table] / part.modulus for part in shard.parts) for shard in by_lookups.shards]
        assert max(asked) <= 1.1 * sum(asked) / num_shards


def test_heavy_tables_are_cut_and_no_others() -> None:
    """Five equal tables on four shards: one is cut in four, so that each shard has one and a quarter."""
    loads = [load_of(f"t{number}", 1000) for number in range(5)]
    plan = make_plan(Strategy.CAPACITY_BALANCED, loads, 4, ROOMY)
    assert sorted(part.modulus for shard in plan.shards for part in shard.parts) == [1, 1, 1, 1, 4, 4, 4, 4]
    assert set(plan.shard_bytes) == {1250 * loads[0].spec.row_bytes}


def test_lookups_left_after_hot_rows_are_what_is_balanced() -> None:
    """All look-ups of `hot` go to its first rows, which are cached: `cold` is what is left to balance."""
    hot = load_of("hot", 10_000, lookups=1000.0, hot=(1, 1, 1, 1))
    cold = load_of("cold", 1000, lookups=10.0)
    limits = MemoryLimits(replicate_bytes=0, hot_row_bytes=hot.spec.row_bytes)
    moduli = {
        part.table: part.modulus
        for shard in make_plan(Strategy.LOAD_BALANCED, [hot, cold], 2, limits).shards
        for part in shard.parts
    }
    assert moduli == {"hot": 1, "cold": 2}


@given(some_loads(), st.integers(1, 9))
def test_net_aware_shards_serve_the_fewest_nets(loads: list[TableLoad], num_shards: int) -> None:
    net_of = {load.name: load.net for load in loads}
    plan = make_plan(Strategy.NET_AWARE, loads, num_shards, ROOMY)
    calls = [len({net_of[part.table] for part in shard.parts}) for shard in plan.shards]
    nets = len(set(net_of.values()))
    assert sum(calls) <= max(nets, num_shards)
    if nets <= num_shards:
        assert set(calls) == {1}


def test_nets_share_shards_where_they_would_not_fit_alone() -> None:
    """12 and 4 tables of 64 bytes on 4 shards of 256: 3 shards and 1, nothing left over; 13 and 3 have to share."""
    limits = MemoryLimits(shard_bytes=4 * 64, replicate_bytes=0)
    for first, shared in ((12, False), (13, True)):
        loads = [load_of(f"t{number}", 4, net="a" if number < first else "b") for number in range(16)]
        net_of = {load.name: load.net for load in loads}
        plan = make_plan(Strategy.NET_AWARE, loads, 4, limits)
        assert (max(len({net_of[part.table] for part in shard.parts}) for shard in plan.shards) > 1) is shared


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 100), min_size=1), st.integers(0, 5))
def test_no_other_division_of_shards_among_nets_is_better(weights: dict[str, float], more: int) -> None:
    counts = shards_of_nets(weights, len(weights) + more)
    assert sum(counts.values()) == len(weights) + more
    best = min(
        max(weights[net] / (1 + extra.count(net)) for net in weights)
        for extra in combinations_with_replacement(weights, more)
    )
    assert max(weights[net] / counts[net] for net in weights) == pytest.approx(best)


def test_small_tables_are_replicated_as_far_as_the_main_process_has_room() -> None:
    loads = [load_of("a", 10), load_of("b", 5), load_of("c", 20)]  # 160, 80 and 320 bytes
    for strategy in SHARDED:
        assert make_plan(strategy, loads, 2, MemoryLimits(replicate_bytes=160)).replicated == ("a", "b")
        assert make_plan(strategy, loads, 2, MemoryLimits(None, 200, 160)).replicated == ("b",)
    everything = make_plan(Strategy.ONE_SHARD, loads, 1, MemoryLimits(replicate_bytes=320))
    assert (everything.replicated, everything.shards) == (("a", "b", "c"), ())


def test_singular_has_everything_in_the_main_process() -> None:
    loads = [load_of("a", 10), load_of("b", 5)]
    plan = make_plan(Strategy.SINGULAR, loads, 7, ROOMY)
    assert (plan.shards, plan.replicated, plan.main_bytes) == ((), ("a", "b"), 240)


@pytest.mark.parametrize("strategy", SHARDED)
def test_a_refusal_says_what_would_help(strategy: Strategy) -> None:
    loads = loads_of(read_declaration("dlrm-v2"))
    with pytest.raises(ConfigError, match=r"needs 97.4 GiB on \d shards?, and 10.0 GiB each are allowed") as refusal:
        make_plan(strategy, loads, 4, MemoryLimits(10 * GIB))
    assert "the largest table is 't00' with 19.1 GiB" in str(refusal.value)
    assert "take 10 shards, or keep tables as int8, 25.9 GiB in all" in str(refusal.value)


def test_a_refusal_of_int8_tables_does_not_say_int8() -> None:
    load = TableLoad(TableSpec("a", 1000, 64, TableStorage.INT8), "all", load_of("a", 1).statistics)
    with pytest.raises(ConfigError, match=r"'a' with 70.3 KiB; take 8 shards$"):
        make_plan(Strategy.CAPACITY_BALANCED, [load], 2, MemoryLimits(10 * 1024, replicate_bytes=0))


def test_what_the_main_process_cannot_have_is_refused() -> None:
    load = TableLoad(TableSpec("a", 1000, 64), "all", load_of("a", 1).statistics)
    with pytest.raises(ConfigError, match=r"singular needs 250.0 KiB .* 100.0 KiB are allowed"):
        make_plan(Strategy.SINGULAR, [load], 1, MemoryLimits(None, 100 * 1024))
    with pytest.raises(ConfigError, match=r"200 B for hot rows are more .*, 100 B"):
        make_plan(Strategy.ONE_SHARD, [load], 1, MemoryLimits(None, 100, hot_row_bytes=200))
    with pytest.raises(ConfigError, match="0 shards"):
        make_plan(Strategy.LOAD_BALANCED, [load], 0, MemoryLimits())
