"""Plans on 1 to many servers."""

from __future__ import annotations

import msgspec
import pytest

from rankd.plan.cluster_simulation import Stragglers
from rankd.plan.cluster_sizes import ClusterRow, SizeOptions, best_rows, simulate_sizes, smallest_plans
from rankd.plan.cost_model import CostModel
from rankd.plan.declaration import loads_of, read_declaration
from rankd.plan.table_plan import MemoryLimits, Strategy

TERABYTE = loads_of(read_declaration("dlrm-v2x10"))
LIMITS = MemoryLimits(128 * 1024**3, 128 * 1024**3)


def rows_of(strategies: tuple[Strategy, ...], options: SizeOptions, limits: MemoryLimits = LIMITS) -> list[ClusterRow]:
    plans, _ = smallest_plans(TERABYTE, strategies, limits)
    told: list[tuple[int, int]] = []
    rows = simulate_sizes(plans, TERABYTE, CostModel(), options, lambda done, total, line: told.append((done, total)))
    assert told == [(done, len(told)) for done in range(1, len(told) + 1)]
    assert len(told) == len(plans) * len(options.servers)
    return rows


def test_plans_have_the_fewest_shards_that_fit() -> None:
    plans, refused = smallest_plans(TERABYTE, Strategy, LIMITS)
    assert {plan.strategy.value: len(plan.shards) for plan in plans} == {
        "capacity-balanced": 8, "load-balanced": 8, "net-aware": 8
    }  # fmt: skip
    assert [text.split()[0] for text in refused] == ["singular", "one-shard"]
    plans, _ = smallest_plans(TERABYTE, (Strategy.LOAD_BALANCED,), LIMITS, num_shards=12)
    assert [len(plan.shards) for plan in plans] == [12]
    plans, refused = smallest_plans(TERABYTE, (Strategy.LOAD_BALANCED,), LIMITS, num_shards=7)
    assert (plans, len(refused)) == ([], 1)


def test_a_cluster_needs_a_server_for_each_shard_and_a_main_one() -> None:
    rows = rows_of((Strategy.LOAD_BALANCED,), SizeOptions((8, 9, 16), 50.0, Stragglers()))
    assert [(row.servers, row.mains, row.rate) for row in rows] == [(9, 1, 450.0), (16, 8, 800.0)]
    overloaded, served = rows
    assert (overloaded.p50_ms, overloaded.p99_ms) == (None, None)
    assert overloaded.busy > 1
    assert served.p99_ms is not None
    assert served.p50_ms is not None
    assert served.p50_ms < served.p99_ms
    assert 0 < served.busy < 1
    assert served.size_bytes > sum(load.spec.size_bytes for load in TERABYTE)


def test_everything_everywhere_takes_more_memory_and_stragglers_take_time() -> None:
    limits = msgspec.structs.replace(LIMITS, main_bytes=None)
    strategies = (Strategy.SINGULAR, Strategy.LOAD_BALANCED)
    alone, shards = rows_of(strategies, SizeOptions((16,), 50.0, Stragglers()), limits)
    assert alone.size_bytes == 16 * sum(load.spec.size_bytes for load in TERABYTE) > 10 * shards.size_bytes
    (slower,) = rows_of((Strategy.LOAD_BALANCED,), SizeOptions((16,), 50.0, Stragglers(1.0)))
    assert slower.p50_ms is not None
    assert shards.p50_ms is not None
    assert slower.p50_ms > shards.p50_ms


def test_the_highest_rate_that_keeps_a_bound() -> None:
    """A little above it p99 is over the bound; a tighter bound takes more server-hours; one that nothing keeps none."""
    strategies = (Strategy.LOAD_BALANCED,)
    (found,) = rows_of(strategies, SizeOptions((16,), 1.0, Stragglers(), 60.0))
    assert found.p99_ms is not None
    assert found.p99_ms <= 60
    assert found.server_hours == pytest.approx(16 / found.rate * 1e6 / 3600)
    (above,) = rows_of(strategies, SizeOptions((16,), found.rate / 16 * 1.1, Stragglers()))
    assert above.p99_ms is None or above.p99_ms > 60
    (tighter,) = rows_of(strategies, SizeOptions((16,), 1.0, Stragglers(), 40.0))
    assert tighter.server_hours is not None
    assert found.server_hours is not None
    assert tighter.server_hours > found.server_hours
    (never,) = rows_of(strategies, SizeOptions((16,), 1.0, Stragglers(), 0.1))
    assert never.server_hours is None
    assert best_rows([never], by_cost=True) == []


def test_the_best_is_the_cheapest_or_the_quickest() -> None:
    row = ClusterRow("load-balanced", 4, 2, 2, 100.0, 1, 8, 1.0, 0.5, 1.0, 20.0, 11.0)
    cheap = msgspec.structs.replace(row, strategy="net-aware", p99_ms=30.0, server_hours=10.0)
    lost = msgspec.structs.replace(row, strategy="one-shard", p99_ms=None, server_hours=None)
    other = msgspec.structs.replace(lost, servers=8)
    assert best_rows([lost, row, cheap, other], by_cost=False) == [row]
    assert best_rows([lost, row, cheap, other], by_cost=True) == [cheap]
