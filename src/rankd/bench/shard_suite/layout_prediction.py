"""What the simulator says of the layouts that were measured, for the same requests at the same moments.

In: layouts, how tables are asked, costs measured in the same run. Out: predicted quantiles where all processes share
this machine, and where each shard is a server of its own; and which layout `auto` takes.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from rankd.bench.report import percentile
from rankd.bench.shard_suite.layouts import LIMITS, PLANNED, SHARDED, Layout
from rankd.bench.shard_suite.open_loop import KnownCosts, Offered
from rankd.plan.choice import choose
from rankd.plan.cluster_shape import smallest_shape
from rankd.plan.cluster_simulation import ClusterRequests, simulate_cluster
from rankd.plan.cost_model import CostModel
from rankd.plan.request_work import request_work
from rankd.plan.table_plan import Plan
from rankd.plan.table_statistics import TableLoad


@dataclass(frozen=True, slots=True)
class Costs:
    """The same costs for this machine, which all processes share (`here`), and with a server for each (`apart`)."""

    here: CostModel
    apart: CostModel


def both_costs(measured: CostModel, rate: float, samples: Sequence[int]) -> Costs:
    """At the rate and sizes of the run. A shard here has one worker, on a server of its own one for each core."""
    cores = os.cpu_count() or 1
    apart = msgspec.structs.replace(
        measured, rate=rate, samples=tuple(samples), main_cores=cores, shard_cores=cores, machine_cores=None
    )
    return Costs(msgspec.structs.replace(apart, shard_cores=1, machine_cores=cores), apart)


def simulated_ms(
    plan: Plan, loads: Sequence[TableLoad], costs: CostModel, rounds: Sequence[Offered]
) -> dict[str, float]:
    """Medians over the rounds of p50, p99 and the mean, a server of each kind."""
    work, found = request_work(plan, loads, costs), list[tuple[float, float, float]]()
    for offered in rounds:
        samples = np.resize(np.asarray(offered.samples, np.float64), len(offered.arrivals_s))
        requests = ClusterRequests(np.asarray(offered.arrivals_s) * 1e6, samples)
        latency_ms = (simulate_cluster(requests, work, smallest_shape(plan), costs).latency_us / 1e3).tolist()
        found.append((percentile(latency_ms, 0.5), percentile(latency_ms, 0.99), statistics.mean(latency_ms)))
    p50_ms, p99_ms, mean_ms = (statistics.median(one) for one in zip(*found, strict=True))
    return {"p50_ms": p50_ms, "p99_ms": p99_ms, "mean_ms": mean_ms}


def predicted(layout: Layout, loads: Sequence[TableLoad], costs: Costs, rounds: Sequence[Offered]) -> dict[str, float]:
    """For the row of a layout: quantiles here and apart, CPU, and by how much the prediction of p99 is off."""
    here, apart = (simulated_ms(layout.plan, loads, one, rounds) for one in (costs.here, costs.apart))
    work, samples = request_work(layout.plan, loads, costs.here), costs.here.mean_samples
    measured_ms = {name: statistics.median(one[name] for one in layout.rounds) for name in ("p50_ms", "p99_ms")}
    return {
        "predicted_p50_ms": here["p50_ms"],
        "predicted_p99_ms": here["p99_ms"],
        "p50_error": here["p50_ms"] / measured_ms["p50_ms"] - 1,
        "p99_error": here["p99_ms"] / measured_ms["p99_ms"] - 1,
        "predicted_cpu_ms": work.cpu_us.at(samples) / 1e3,
        "predicted_calls": float(len(work.calls)),
        "apart_p50_ms": apart["p50_ms"],
        "apart_p99_ms": apart["p99_ms"],
    }


def known_costs(plan: Plan, loads: Sequence[TableLoad], costs: CostModel) -> KnownCosts:
    """What the attribution cannot see from outside, of a mean request."""
    work, samples = request_work(plan, loads, costs), costs.mean_samples
    row_us = {load.name: costs.row_us(load.spec) for load in loads}
    asked = {load.name: load.statistics.lookups for load in loads}
    rows_us = sum(
        asked[part.table] / part.modulus * row_us[part.table] for shard in plan.shards for part in shard.parts
    )
    return KnownCosts(
        serialise_ms=(work.send_us + work.join_us).at(samples) / 1e3,
        shard_lookup_ms=rows_us * samples / max(len(work.calls), 1) / 1e3,
    )


def auto_layout(
    layouts: Sequence[Layout], loads: Sequence[TableLoad], numbers: Sequence[int], costs: CostModel
) -> Layout:
    """The sharded layout that `rankd plan` takes by itself; where all tables are small, of those that share these."""
    plans = (choose(loads, SHARDED, numbers, limits, costs).best.plan for limits in (PLANNED, LIMITS))
    chosen = next(plan for plan in plans if plan.shards)
    return next(layout for layout in layouts if layout.plan.shards == chosen.shards)
