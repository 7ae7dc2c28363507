"""The ways to divide a model's tables that are measured: singular, and each strategy with each number of shards.

In: a version's tables and how they are asked. Out: Layouts with their plans' files; strategies that place rows alike
are one layout with several names. Each strategy is there with all tables on shards, as studies of sharding have them,
and as `rankd plan` makes its plans unless told otherwise, with the small tables in the main process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from rankd.bench.shard_suite.dlrm_workload import DlrmWorkload
from rankd.errors import ConfigError
from rankd.plan.declaration import Declaration, loads_of, read_declaration
from rankd.plan.plan_file import write_plan
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Plan, Strategy
from rankd.plan.table_statistics import TableLoad

SINGULAR = Strategy.SINGULAR.value
SHARDED = tuple(strategy for strategy in Strategy if strategy is not Strategy.SINGULAR)
LIMITS = MemoryLimits(replicate_bytes=0)
PLANNED = MemoryLimits()
SMALL_HERE = ", small tables here"


@dataclass(slots=True)
class Layout:
    """A plan's file (None: singular), other names of the same plan, its figures round by round, and the latencies of
    all requests."""

    name: str
    plan: Plan
    path: Path | None
    same: list[str] = field(default_factory=list)
    rounds: list[dict[str, float]] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (self.name, *self.same)


def layout_name(strategy: Strategy, num_shards: int, limits: MemoryLimits = LIMITS) -> str:
    """As it stands in the report."""
    small_here = SMALL_HERE if limits.replicate_bytes else ""
    if strategy in (Strategy.SINGULAR, Strategy.ONE_SHARD):
        return f"{strategy.value}{small_here}"
    return f"{strategy.value} on {num_shards}{small_here}"


def workload_loads(workload: DlrmWorkload, declaration: Declaration) -> tuple[TableLoad, ...]:
    """A version's tables, asked as the workload's declaration says."""
    known = {f"item.{load.name}": load.statistics for load in loads_of(read_declaration(workload.tables))}
    return tuple(
        TableLoad(load.spec, load.net, known.get(load.name, load.statistics)) for load in loads_of(declaration)
    )


def all_layouts(
    declaration: Declaration, loads: Sequence[TableLoad], numbers: Sequence[int], folder: Path
) -> list[Layout]:
    """Singular first; plans are written to `folder`."""
    found = [Layout(SINGULAR, make_plan(Strategy.SINGULAR, loads, 1, LIMITS), None)]
    ways = [(strategy, number) for strategy in SHARDED for number in _numbers(strategy, numbers)]
    for limits, (strategy, number) in product((LIMITS, PLANNED), ways):
        try:
            plan = make_plan(strategy, loads, number, limits)
        except ConfigError:  # fewer tables than shards
            continue
        name = layout_name(strategy, number, limits)
        known = next((one for one in found if one.plan.shards == plan.shards), None)
        if known is not None:
            known.same.append(name)
            continue
        path = folder / f"plan-{len(found)}.json"
        write_plan(path, declaration, plan)
        found.append(Layout(name, plan, path))
    return found


def _numbers(strategy: Strategy, numbers: Sequence[int]) -> Sequence[int]:
    return numbers[:1] if strategy is Strategy.ONE_SHARD else numbers
