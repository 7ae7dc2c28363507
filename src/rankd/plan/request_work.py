"""What one request takes under a plan: by server and step, as a straight line over its samples.

In: a plan, how its tables are asked, a cost model. Out: RequestWork, which `prediction.py` reckons with by formulas and
`cluster_simulation.py` by events. The steps:

    main    [send: a call for each shard and net][local: replicated tables, hot rows]     [finish: join, dense part]
    shard                  wire -> [serve: look up, pool, answer] -> wire                 ^ local and all calls are done

Ids go out as int64 with an offset for each sample and table, pooled rows come back as float32, zeros or not. What a
request sends and receives passes its main server's own link, so each of its calls waits for all of its bytes. Every
shard is called for every net it has a part for: in hundreds of samples there is nearly always one that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankd.embeddings.table_spec import TablePart
from rankd.plan.cost_model import CostModel
from rankd.plan.table_plan import Plan
from rankd.plan.table_statistics import TableLoad, hot_share

ID_BYTES = OFFSET_BYTES = 8
VALUE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Line:
    """fixed + each * samples."""

    fixed: float = 0.0
    each: float = 0.0

    def at(self, samples: float) -> float:
        """Of a request of so many samples."""
        return self.fixed + self.each * samples

    def __add__(self, other: Line) -> Line:
        return Line(self.fixed + other.fixed, self.each + other.each)

    def __mul__(self, factor: float) -> Line:
        return Line(self.fixed * factor, self.each * factor)


@dataclass(frozen=True, slots=True)
class CallWork:
    """One call: to a shard, for a net. `lookups` over samples, bytes both ways, and the shard's CPU in us."""

    shard: int
    net: str
    lookups: Line
    out_bytes: Line
    back_bytes: Line
    serve_us: Line


@dataclass(frozen=True, slots=True)
class RequestWork:
    """All of a request: CPU of its main server in us, the calls, and one call's way on the wire, there and back."""

    send_us: Line
    local_us: Line
    finish_us: Line
    local_lookups: Line
    calls: tuple[CallWork, ...]
    wire_us: Line

    @property
    def main_us(self) -> Line:
        """CPU of the main server."""
        return self.send_us + self.local_us + self.finish_us

    @property
    def cpu_us(self) -> Line:
        """CPU of all servers."""
        return sum((call.serve_us for call in self.calls), self.main_us)


def request_work(plan: Plan, loads: Sequence[TableLoad], costs: CostModel) -> RequestWork:
    """What a request takes; `loads` are the plan's tables."""
    by_name = {load.name: load for load in loads}
    cached = {hot.table: hot_share(by_name[hot.table], hot.rows) for hot in plan.hot_rows}
    calls = []
    for number, shard in enumerate(plan.shards):
        nets = dict.fromkeys(by_name[part.table].net for part in shard.parts)
        for net in nets:
            parts = [part for part in shard.parts if by_name[part.table].net == net]
            calls.append(_call(number, net, parts, by_name, cached, costs))
    local = [(by_name[name], 1.0) for name in plan.replicated] + [(by_name[name], s) for name, s in cached.items()]
    lookup_us = sum(load.statistics.lookups * share * _row_us(load, costs) for load, share in local)
    dims = sum(load.spec.dim * min(load.statistics.used, load.statistics.lookups * share) for load, share in local)
    out = sum((call.out_bytes for call in calls), Line())
    back = sum((call.back_bytes for call in calls), Line())
    return RequestWork(
        send_us=Line(costs.call_us * len(calls)) + out * costs.serialise_byte_us,
        local_us=Line(0.0, lookup_us + dims * costs.pooled_value_us),
        finish_us=Line(costs.dense_us, costs.dense_sample_us)
        + back * (costs.serialise_byte_us + costs.pooled_value_us / VALUE_BYTES),
        local_lookups=Line(0.0, sum(load.statistics.lookups * share for load, share in local)),
        calls=tuple(calls),
        wire_us=Line(2 * costs.wire_us) + (out + back) * (1 / costs.wire_bytes_us) if calls else Line(),
    )


def _call(
    shard: int,
    net: str,
    parts: Sequence[TablePart],
    by_name: Mapping[str, TableLoad],
    cached: Mapping[str, float],
    costs: CostModel,
) -> CallWork:
    """The call for the parts of one net in one shard. A look-up is in a part with the chance 1 / modulus."""
    lookups = rows_us = pooled = dims = 0.0
    for part in parts:
        load = by_name[part.table]
        asked = load.statistics.lookups * (1 - cached.get(part.table, 0.0)) / part.modulus
        lookups += asked
        rows_us += asked * _row_us(load, costs)
        pooled += load.spec.dim * min(load.statistics.used, asked)
        dims += load.spec.dim
    out = Line(OFFSET_BYTES, OFFSET_BYTES * len(parts) + ID_BYTES * lookups)
    back = Line(0.0, VALUE_BYTES * dims)
    serve = Line(costs.call_us, rows_us + pooled * costs.pooled_value_us) + (out + back) * costs.serialise_byte_us
    return CallWork(shard, net, Line(0.0, lookups), out, back, serve)


def _row_us(load: TableLoad, costs: CostModel) -> float:
    return costs.lookup_us + load.spec.row_bytes * costs.lookup_byte_us
