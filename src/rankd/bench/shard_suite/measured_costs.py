"""All costs that plans reckon with, measured on this machine.

In: how long, and a model version if its dense part counts. Out: a CostModel, and notes that say what it is from. What
cannot be measured on one machine, the wire between two, keeps its assumption.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from rankd.artifact import Artifact
from rankd.bench.report import machine
from rankd.bench.served_model import ServedModel
from rankd.bench.shard_suite.call_costs import call_costs
from rankd.bench.shard_suite.lookup_costs import lookup_costs
from rankd.bench.shard_suite.served_costs import served_cpu, version_requests
from rankd.engine.backend import EngineConfig, Precision
from rankd.engine.targets import served_precision
from rankd.plan.cost_model import CostModel
from rankd.plan.request_work import Line, request_work
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Strategy
from rankd.plan.table_statistics import TableLoad
from rankd.shards.shard_config import SumFormat
from rankd.shards.table_config import sums_in

Step = Callable[[int, int, str], None]
STEPS = 3
COSTS = frozenset(CostModel.__struct_fields__)


@dataclass(frozen=True, slots=True)
class CostOptions:
    """Seconds of each measurement, bytes of the tables that look-ups are measured in, and how shards send sums back."""

    seconds: float = 1.0
    table_bytes: int = 256 * 1024**2
    sums: SumFormat = SumFormat.FP32


def table_costs(options: CostOptions, advance: Step) -> tuple[CostModel, list[str]]:
    """Costs of look-ups and calls, in servers with as many cores as this one; and notes about them.

    Raises:
        Unavailable: a shard did not start.
    """
    with TemporaryDirectory(prefix="rankd-costs-") as folder:
        advance(0, STEPS, "look-ups")
        lookups, pooled_value_us = lookup_costs(Path(folder), options.table_bytes)
        advance(1, STEPS, "calls")
        calls = call_costs(Path(folder), options.seconds, options.sums)
    cores = os.cpu_count() or 1
    measured = {name: value for name, value in asdict(calls).items() if name in COSTS}
    about = machine()
    notes = [
        f"Measured on {about['cpu']}, {cores} cores. Microseconds; see rankd/plan/cost_model.py.",
        f"Look-ups in tables of {options.table_bytes / 1024**2:,.0f} MiB, ids drawn uniformly.",
        f"The smallest call of a shard takes {calls.call_wall_us:,.0f} us between two processes of this machine.",
        f"Shards send sums back in {options.sums.value}.",
        "wire_us and wire_bytes_us are assumptions.",
    ]
    return CostModel(
        lookups=lookups, pooled_value_us=pooled_value_us, main_cores=cores, shard_cores=cores, **measured
    ), notes


def with_dense_part(costs: CostModel, cpu_us: Line, loads: Sequence[TableLoad], smallest_bucket: int) -> CostModel:
    """Costs of which a request takes so much CPU where all its tables are in the main server."""
    alone = make_plan(Strategy.SINGULAR, loads, 1, MemoryLimits())
    looked_up_us = request_work(alone, loads, costs).local_us.each
    return msgspec.structs.replace(
        costs,
        dense_us=cpu_us.fixed,
        dense_sample_us=max(cpu_us.each - looked_up_us, 0.0),
        piece_samples=smallest_bucket,
    )


def at_load(costs: CostModel, loads: Sequence[TableLoad], cpu_us: float, samples: float) -> CostModel:
    """Costs whose dense part is made larger or smaller, so that a request of so many samples takes so much CPU where
    all tables are in the main server: under load, cores share memory and caches, and calls of all shapes follow each
    other."""
    work = request_work(make_plan(Strategy.SINGULAR, loads, 1, MemoryLimits()), loads, costs)
    dense_us = work.dense_us.at(samples)
    if not dense_us:
        return costs
    factor = max(cpu_us - work.local_us.at(samples), 0.0) / dense_us
    return msgspec.structs.replace(
        costs, dense_us=costs.dense_us * factor, dense_sample_us=costs.dense_sample_us * factor
    )


def sums_of(version: Path) -> SumFormat:
    """How shards send sums back to a server of this version that nothing was said to.

    Raises:
        ArtifactError: it cannot be read, or was not built for an engine of this machine.
    """
    return sums_in(served_precision(Artifact.open(version), EngineConfig()) is Precision.BF16)


def model_costs(costs: CostModel, version: Path, loads: Sequence[TableLoad], seconds: float) -> CostModel:
    """The same with the dense part of a version, whose repository is served for it, and requests as large as its
    candidate buckets; `loads` are its tables, if any.

    Raises:
        ConfigError, ArtifactError: a version that cannot be asked or read.
        Unavailable, EngineFailure: it could not be served.
    """
    opened = Artifact.open(version)
    requests, smallest = version_requests(opened), opened.schema.candidate_buckets[0]
    costs = msgspec.structs.replace(costs, samples=tuple(sorted({len(one.candidates) for one in requests})))
    with ServedModel(opened.path.resolve().parent.parent, ("rankd", "serve", "--store", "memory:")) as server:
        return with_dense_part(costs, served_cpu(server, requests, seconds), loads, smallest)
