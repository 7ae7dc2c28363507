"""What one request takes under a plan: by server and step, as a straight line over its samples.

In: a plan, how its tables are asked, a cost model. Out: RequestWork, which `prediction.py` reckons with by formulas and
`cluster_simulation.py` by events. The steps:

    main    [send: a call for each shard and net]      [local: replicated tables, hot rows][join][dense part, in pieces]
    shard          wire -> [serve: look up, pool, answer] -> wire    ^ all calls are answered

Ids go out in as few bytes as the rows of their part need; a table in parts has a count of one byte for each sample
beside them. Pooled rows come back in the format of sums, zeros or not. What a request sends and receives passes its
main server's own link, so each of its calls waits for all of its bytes. Every shard is called for every net it has a
part for: in hundreds of samples there is nearly always one that needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankd.embeddings.table_spec import TablePart
from rankd.plan.cost_model import CostModel
from rankd.plan.table_plan import Plan
from rankd.plan.table_statistics import TableLoad, hot_share

CALL_BYTES, PART_BYTES = 28, 8
"""Of the headers of a call: of the frame, the request and its one block; and of a part."""
ID_BYTES = ((1 << 16, 2), (1 << 32, 4))
"""Of an id, for parts of up to so many rows; 8 above."""


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
    """One call: to a shard, for a net. `lookups` over samples, bytes both ways, the shard's CPU in us, and that of the
    main server which sends it."""

    shard: int
    net: str
    lookups: Line
    out_bytes: Line
    back_bytes: Line
    serve_us: Line
    send_us: Line


@dataclass(frozen=True, slots=True)
class RequestWork:
    """All of a request: CPU of its main server in us, the calls, and one call's way on the wire, there and back.
    Idle cores may share the dense part in pieces of a multiple of `piece_samples`."""

    send_us: Line
    local_us: Line
    join_us: Line
    dense_us: Line
    local_lookups: Line
    calls: tuple[CallWork, ...]
    wire_us: Line
    piece_samples: int

    @property
    def main_us(self) -> Line:
        """CPU of the main server."""
        return self.send_us + self.local_us + self.join_us + self.dense_us

    @property
    def cpu_us(self) -> Line:
        """CPU of all servers."""
        return sum((call.serve_us for call in self.calls), self.main_us)

    def pieces(self, samples: float, idle: int) -> tuple[float, ...]:
        """Samples of each piece of the dense part if so many cores may share it; all but the last are as large.

        >>> 300 samples in pieces of a multiple of 100: 2 idle cores -> (200, 100), 4 -> (100, 100, 100)
        """
        units = max(math.ceil(samples / self.piece_samples), 1)
        piece = math.ceil(units / min(max(idle, 1), units)) * self.piece_samples
        count = max(math.ceil(samples / piece), 1)
        return (*(float(piece),) * (count - 1), samples - (count - 1) * piece)

    def piece_us(self, piece: float, samples: float) -> float:
        """CPU of a piece of the dense part of `samples`; what is fixed is shared as the samples are."""
        return self.dense_us.at(samples) * (piece / samples) if samples else self.dense_us.fixed


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
    lookup_us = sum(load.statistics.lookups * share * costs.row_us(load.spec) for load, share in local)
    dims = sum(load.spec.dim * min(load.statistics.used, load.statistics.lookups * share) for load, share in local)
    out = sum((call.out_bytes for call in calls), Line())
    back = sum((call.back_bytes for call in calls), Line())
    return RequestWork(
        send_us=sum((call.send_us for call in calls), Line()),
        local_us=Line(0.0, lookup_us + dims * costs.pooled_value_us),
        join_us=back * costs.answer_byte_us,
        dense_us=Line(costs.dense_us, costs.dense_sample_us),
        local_lookups=Line(0.0, sum(load.statistics.lookups * share for load, share in local)),
        calls=tuple(calls),
        wire_us=Line(2 * costs.way_us) + (out + back) * (1 / costs.way_bytes_us) if calls else Line(),
        piece_samples=costs.piece_samples,
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
    lookups = split = rows_us = pooled = dims = out_bytes = 0.0
    for part in parts:
        load = by_name[part.table]
        asked = load.statistics.lookups * (1 - cached.get(part.table, 0.0)) / part.modulus
        lookups += asked
        rows_us += asked * costs.row_us(load.spec)
        pooled += load.spec.dim * min(load.statistics.used, asked)
        dims += load.spec.dim
        out_bytes += asked * _id_bytes(part.rows_of(load.spec))
        if part.modulus > 1:
            split += asked
            out_bytes += 1
    out = Line(CALL_BYTES + PART_BYTES * len(parts), out_bytes)
    back = Line(0.0, costs.sum_bytes * dims)
    serve = Line(costs.shard_call_us, rows_us + pooled * costs.pooled_value_us + lookups * costs.shard_id_us)
    serve += back * costs.shard_answer_byte_us
    send = Line(costs.call_us, lookups * costs.id_us + split * costs.split_id_us)
    return CallWork(shard, net, Line(0.0, lookups), out, back, serve, send)


def _id_bytes(rows: int) -> int:
    return next((size for most, size in ID_BYTES if rows <= most), 8)
