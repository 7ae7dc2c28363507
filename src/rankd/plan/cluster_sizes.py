"""Plans on 1 to many servers: what each strategy gives as a cluster grows and its requests with it.

In: tables, limits, a cost model, numbers of servers. Out: a row for each strategy and number, simulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from rankd.errors import ConfigError
from rankd.plan.choice import ALONE
from rankd.plan.cluster_shape import ClusterShape, spread_servers
from rankd.plan.cluster_simulation import Stragglers, poisson_requests, simulate_cluster
from rankd.plan.cost_model import CostModel
from rankd.plan.prediction import predict
from rankd.plan.request_work import request_work
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Plan, Strategy
from rankd.plan.table_statistics import TableLoad

REQUESTS_A_SERVER = 50
MILLION, SECONDS_AN_HOUR = 1_000_000, 3600
FEWEST_REQUESTS = 3000
PROBES = 7
"""Rates tried to find the highest one that keeps a bound; the last two differ by less than a hundredth of what fits."""
SEARCHED_SHARDS = 256
"""The fewest shards that fit are looked for up to so many."""


class ClusterRow(msgspec.Struct, frozen=True):
    """A plan on so many servers: main ones, and those with shards; `rate` is of all of them. `size_bytes` of tables in
    all servers. Latencies are None where the busiest server cannot keep up. `server_hours`: what a million requests
    take, all servers counted; None where they cannot keep up, or not the bound."""

    strategy: str
    servers: int
    mains: int
    shards: int
    rate: float
    size_bytes: int
    cores: int
    cpu_ms: float
    busy: float
    p50_ms: float | None
    p99_ms: float | None
    server_hours: float | None


@dataclass(frozen=True, slots=True)
class SizeOptions:
    """Numbers of servers, requests a second for each of them, and calls that take longer. With `bound_ms` the rate is
    the highest at which p99 keeps it."""

    servers: tuple[int, ...]
    rate_a_server: float
    stragglers: Stragglers
    bound_ms: float | None = None


def smallest_plans(
    loads: Sequence[TableLoad], strategies: Iterable[Strategy], limits: MemoryLimits, num_shards: int | None = None
) -> tuple[list[Plan], list[str]]:
    """Of each strategy the plan with so many shards, or with the fewest that fit, two at least; and the refusals."""
    plans, refused = [], []
    size = sum(load.spec.size_bytes for load in loads if load.spec.size_bytes > limits.replicate_bytes)
    for strategy in strategies:
        fewest = max(2, -(-size // limits.shard_bytes)) if limits.shard_bytes else 2
        numbers = [num_shards or min(fewest, SEARCHED_SHARDS)]
        if num_shards is None and strategy not in ALONE:
            numbers = list(range(numbers[0], SEARCHED_SHARDS + 1))
        why = ""
        for number in numbers:
            try:
                plans.append(make_plan(strategy, loads, number, limits))
                break
            except ConfigError as error:
                why = why or str(error)
        else:
            refused.append(why)
    return plans, refused


def simulate_sizes(
    plans: Sequence[Plan],
    loads: Sequence[TableLoad],
    costs: CostModel,
    options: SizeOptions,
    advance: Callable[[int, int, str], None],
) -> list[ClusterRow]:
    """A row for each plan and number of servers that is enough for it."""
    rows = []
    total = len(options.servers) * len(plans)
    for number, servers in enumerate(options.servers):
        loaded = msgspec.structs.replace(costs, rate=options.rate_a_server * servers)
        for place, plan in enumerate(plans):
            shape = spread_servers(request_work(plan, loads, loaded), len(plan.shards), servers, loaded)
            if shape is not None:
                row = _row if options.bound_ms is None else partial(_fastest_row, bound_ms=options.bound_ms)
                rows.append(row(plan, shape, loads, loaded, options.stragglers))
            advance(number * len(plans) + place + 1, total, f"{servers} servers, {plan.strategy.value}")
    return rows


def best_rows(rows: Iterable[ClusterRow], by_cost: bool) -> list[ClusterRow]:
    """For each number of servers the row with the lowest p99, or the one with the fewest server-hours."""

    def order(row: ClusterRow) -> tuple[float, float]:
        p99_ms = math.inf if row.p99_ms is None else row.p99_ms
        return (math.inf if row.server_hours is None else row.server_hours) if by_cost else 0.0, p99_ms

    found: dict[int, ClusterRow] = {}
    for row in rows:
        if row.server_hours is not None and (row.servers not in found or order(row) < order(found[row.servers])):
            found[row.servers] = row
    return list(found.values())


def _fastest_row(
    plan: Plan,
    shape: ClusterShape,
    loads: Sequence[TableLoad],
    costs: CostModel,
    stragglers: Stragglers,
    bound_ms: float,
) -> ClusterRow:
    """The row of the highest rate found whose p99 keeps the bound; if none does, of the lowest one tried."""
    low, high = 0.0, costs.rate / predict(plan, loads, costs, shape).busiest
    kept: ClusterRow | None = None
    for _ in range(PROBES):
        tried = msgspec.structs.replace(costs, rate=(low + high) / 2)
        row = _row(plan, shape, loads, tried, stragglers)
        if row.p99_ms is not None and row.p99_ms <= bound_ms:
            low, kept = tried.rate, row
        else:
            high = tried.rate
    return kept or msgspec.structs.replace(row, server_hours=None)


def _row(
    plan: Plan, shape: ClusterShape, loads: Sequence[TableLoad], costs: CostModel, stragglers: Stragglers
) -> ClusterRow:
    predicted = predict(plan, loads, costs, shape)
    p50_ms = p99_ms = None
    busy = predicted.busiest
    if predicted.p99_ms is not None:
        number = max(FEWEST_REQUESTS, REQUESTS_A_SERVER * shape.servers)
        work = request_work(plan, loads, costs)
        simulated = simulate_cluster(poisson_requests(costs, number), work, shape, costs, stragglers)
        busy = simulated.busiest(costs)
        p50_ms, p99_ms = simulated.quantile_ms(0.5), simulated.quantile_ms(0.99)
    return ClusterRow(
        strategy=plan.strategy.value,
        servers=shape.servers,
        mains=shape.mains,
        shards=len(plan.shards),
        rate=costs.rate,
        size_bytes=shape.size_bytes(plan),
        cores=predicted.cores,
        cpu_ms=predicted.cpu_ms,
        busy=busy,
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        server_hours=None if p99_ms is None else shape.servers / costs.rate * MILLION / SECONDS_AN_HOUR,
    )
