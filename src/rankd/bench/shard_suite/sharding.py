"""`rankd bench shards`: every way to divide a model's tables, beside all of them in one process.

In: a DLRM workload. Out: a Report. A layout runs at a time, all in turn in every round; the generator offers all of
them the same requests at half of what one process (`singular`) answers at most. Shards share this machine's cores with
the server, so the processor time of both stands beside each latency.

Where the time of a request goes, mean milliseconds: what the client sees beside the server (`outside`), the server's
stages, of the look-ups what shards waited and worked for (`shard_queue`, `shard_service`) and the rest of their wait
(`wire`: routing, both sides' frames, sockets, and waiting for the slowest).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from rankd.artifact import Artifact
from rankd.bench.arrivals import poisson_arrivals
from rankd.bench.load import LoadPlan, generate
from rankd.bench.parity import SAME, max_difference
from rankd.bench.report import Neighbours, Report, Row, commit, machine, medians, percentile
from rankd.bench.served_model import ServedModel
from rankd.bench.shard_suite.dlrm_workload import DlrmWorkload, build_dlrm, draw_dlrm_requests
from rankd.bench.shard_suite.placed_server import PlacedServer, ShardWork
from rankd.bench.wire_forms import Form, decode_scores, encode_request
from rankd.errors import ConfigError, EngineFailure
from rankd.plan.choice import choose
from rankd.plan.cost_model import CostModel
from rankd.plan.declaration import Declaration, loads_of, read_declaration, tables_of
from rankd.plan.plan_file import write_plan
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Plan
from rankd.plan.table_plan import Strategy as Placing
from rankd.plan.table_statistics import TableLoad
from rankd.types import RankRequest

SINGULAR = Placing.SINGULAR.value
REQUESTS, CHECKED, WARM = 400, 8, 60
CONNECTIONS = 32
HALF = 0.5
STAGES = ("queue", "features", "encode", "score", "order")
Step = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """Numbers of shards, seconds of a measurement, rounds."""

    shards: tuple[int, ...] = (1, 2, 4)
    seconds: float = 10.0
    runs: int = 5


@dataclass(slots=True)
class _Layout:
    """A plan's file (None: singular), other names of the same plan, and its figures round by round."""

    name: str
    plan: Plan
    path: Path | None
    same: list[str] = field(default_factory=list)
    rounds: list[dict[str, float]] = field(default_factory=list)


def run_shards(workload: DlrmWorkload, options: ShardOptions, advance: Step) -> Report:
    """Run the suite.

    Raises:
        MissingExtra: torch is not installed.
        EngineFailure: scores of a layout differ from singular's, or it answers nothing.
    """
    surroundings, parity = machine(), dict[str, float]()
    with TemporaryDirectory(prefix="rankd-bench-") as folder:
        advance(0, 1, "model")
        version = build_dlrm(workload, Path(folder) / "models")
        declaration = tables_of(version)
        loads = _loads(workload, declaration)
        layouts = _layouts(declaration, loads, options.shards, Path(folder))
        (record,) = Artifact.open(version).manifest.engines.values()
        bound = SAME[record.precision]
        requests = draw_dlrm_requests(workload, REQUESTS)
        encoded = [encode_request(Form.BINARY, request) for request in requests]
        steps, done, neighbours = 1 + options.runs * len(layouts), 1, Neighbours()
        rate, expected = 0.0, list[Any]()
        for number in range(options.runs):
            for layout in layouts:
                advance(done, steps, f"{layout.name}, round {number + 1}")
                with PlacedServer(version.parent.parent, version, layout.path) as placed:
                    given = _scores(placed.server, encoded[:CHECKED])
                    expected = expected or given
                    parity[layout.name] = _same(layout.name, expected, given, bound)
                    capacity = _capacity(placed.server, encoded)
                    rate = rate or HALF * capacity
                    seed = workload.seed + number
                    layout.rounds.append(_measure(placed, encoded, requests, rate, options.seconds, seed))
                done += 1
        surroundings["others_cpu_share"] = neighbours.share()
        advance(steps, steps, "done")
    results = [_row(layout, rate) for layout in layouts]
    return Report(
        "shards",
        _about(workload, declaration, options, rate),
        surroundings,
        commit(),
        parity,
        results,
        _ratios(layouts, loads, options, _costs(layouts[0], requests, rate)),
    )


def _loads(workload: DlrmWorkload, declaration: Declaration) -> tuple[TableLoad, ...]:
    """The version's tables, asked as the workload's declaration says."""
    known = {f"item.{load.name}": load.statistics for load in loads_of(read_declaration(workload.tables))}
    return tuple(
        TableLoad(load.spec, load.net, known.get(load.name, load.statistics)) for load in loads_of(declaration)
    )


def _layouts(
    declaration: Declaration, loads: Sequence[TableLoad], numbers: Sequence[int], folder: Path
) -> list[_Layout]:
    """Singular, and every strategy with every number of shards; one that places rows as another does is named there."""
    limits = MemoryLimits(replicate_bytes=0)
    found = [_Layout(SINGULAR, make_plan(Placing.SINGULAR, loads, 1, limits), None)]
    for strategy in Placing:
        for number in numbers:
            alone = strategy in (Placing.SINGULAR, Placing.ONE_SHARD)
            if strategy is Placing.SINGULAR or (alone and number != numbers[0]):
                continue
            try:
                plan = make_plan(strategy, loads, number, limits)
            except ConfigError:  # fewer tables than shards
                continue
            name = strategy.value if alone else f"{strategy.value} on {number}"
            known = next((one for one in found if one.plan.shards == plan.shards), None)
            if known is not None:
                known.same.append(name)
                continue
            path = folder / f"plan-{len(found)}.json"
            write_plan(path, declaration, plan)
            found.append(_Layout(name, plan, path))
    return found


def _scores(server: ServedModel, encoded: Sequence[bytes]) -> list[Any]:
    return [decode_scores(Form.BINARY, server.exchange(one)) for one in encoded]


def _same(name: str, expected: Sequence[Any], given: Sequence[Any], bound: float) -> float:
    """The largest difference; sums of the parts of a table round otherwise than those of the whole."""
    worst = max_difference(expected, given)
    most = max(float(abs(scores).max()) for scores in expected)
    if not worst <= bound * max(most, 1.0):
        raise EngineFailure(f"the scores of layout '{name}' differ from singular's by {worst:.3g} of {most:.3g}")
    return worst


def _capacity(server: ServedModel, encoded: list[bytes]) -> float:
    """Requests a second when it always has some; it is warm afterwards."""
    plan = LoadPlan(server.host, server.port, encoded[:WARM], arrivals_s=[0.0] * WARM, connections=4)
    result = generate(plan)
    good = sum(status == 200 for status in result.statuses)
    if not good:
        raise EngineFailure(f"none of {WARM} requests was answered with 200")
    return good / result.wall_s


def _measure(
    placed: PlacedServer,
    encoded: list[bytes],
    requests: Sequence[RankRequest],
    rate: float,
    seconds: float,
    seed: int,
) -> dict[str, float]:
    server, before, stages = placed.server, placed.work(), _stages(placed.server)
    arrivals = poisson_arrivals(rate, seconds, seed)
    plan = LoadPlan(server.host, server.port, encoded, arrivals_s=arrivals, connections=CONNECTIONS)
    result = generate(plan)
    after, spent = placed.work(), _differences(stages, _stages(server))
    latencies = [
        (done - planned) * 1e3
        for status, planned, done in zip(result.statuses, result.scheduled_s, result.done_s, strict=True)
        if status == 200
    ]
    if not latencies:
        raise EngineFailure(f"none of {len(arrivals)} requests was answered with 200")
    count = len(latencies)
    figures = {
        "p50_ms": percentile(latencies, 0.5),
        "p99_ms": percentile(latencies, 0.99),
        "failed": float(len(result.statuses) - count),
        "throughput": sum(len(requests[index].candidates) for index in result.index) / result.wall_s,
        "server_cpu_ms": (after.server_cpu_s - before.server_cpu_s) * 1e3 / count,
        "shards_cpu_ms": (after.shards_cpu_s - before.shards_cpu_s) * 1e3 / count,
        "calls": (after.calls - before.calls) / count,
    }
    return figures | _attribution(spent, before, after, statistics.mean(latencies), count)


def _attribution(
    spent: Mapping[str, float], before: ShardWork, after: ShardWork, seen_ms: float, count: int
) -> dict[str, float]:
    """Mean milliseconds of a request, by where they went; see this file's head."""
    lookup_ms = spent["lookup"] * 1e3 / count
    calls = max(after.calls - before.calls, 1)
    queue_ms, service_ms = (
        (getattr(after, name) - getattr(before, name)) / calls for name in ("queue_ms", "service_ms")
    )
    sharded = after.calls > before.calls
    wire_ms = max(lookup_ms - queue_ms - service_ms, 0.0) if sharded else 0.0
    return {
        "outside_ms": max(seen_ms - spent["total"] / count, 0.0),
        "queue_ms": spent["queue"] / count,
        "features_ms": max(spent["features"] / count - lookup_ms, 0.0),
        "lookup_ms": 0.0 if sharded else lookup_ms,
        "wire_ms": wire_ms,
        "shard_queue_ms": queue_ms if sharded else 0.0,
        "shard_service_ms": service_ms if sharded else 0.0,
        "dense_ms": (spent["encode"] + spent["score"]) / count,
        "order_ms": spent["order"] / count,
    }


def _stages(server: ServedModel) -> dict[str, float]:
    """Milliseconds of each stage so far, and seconds of look-ups."""
    found = dict.fromkeys((*STAGES, "total", "lookup"), 0.0)
    for family in text_string_to_metric_families(server.metrics_text()):
        for sample in family.samples:
            if sample.name == "rankd_stage_milliseconds_sum":
                found[sample.labels["stage"]] += sample.value
            elif sample.name == "rankd_table_lookup_seconds_total":
                found["lookup"] += sample.value
    return found


def _differences(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after}


def _row(layout: _Layout, rate: float) -> Row:
    same = f" (and {', '.join(layout.same)})" if layout.same else ""
    table = f"{rate:.1f} requests a second, half of what singular answers at most"
    about: Row = {"contestant": layout.name + same, "table": table, "shards": len(layout.plan.shards)}
    return about | medians(layout.rounds)


def _costs(singular: _Layout, requests: Sequence[RankRequest], rate: float) -> CostModel:
    """The planner's costs with what the dense part was measured to take here."""
    samples = tuple(len(request.candidates) for request in requests)
    dense_ms = statistics.median(one["dense_ms"] for one in singular.rounds)
    return CostModel(
        rate=rate,
        main_cores=os.cpu_count() or 1,
        shard_cores=1,
        dense_sample_us=dense_ms * 1e3 / statistics.mean(samples),
        samples=samples,
    )


def _ratios(
    layouts: Sequence[_Layout], loads: Sequence[TableLoad], options: ShardOptions, costs: CostModel
) -> dict[str, float]:
    """Of a layout over singular, in the same round; medians of the rounds. `auto` picks among the sharded ones."""
    singular = layouts[0].rounds
    p99, cpu = dict[str, float](), dict[str, float]()
    for layout in layouts[1:]:
        pairs = list(zip(layout.rounds, singular, strict=True))
        p99[layout.name] = statistics.median(one["p99_ms"] / alone["p99_ms"] for one, alone in pairs)
        cpu[layout.name] = statistics.median(
            (one["server_cpu_ms"] + one["shards_cpu_ms"]) / (alone["server_cpu_ms"] + alone["shards_cpu_ms"])
            for one, alone in pairs
        )
    best = min(p99, key=lambda name: p99[name])
    sharded = [strategy for strategy in Placing if strategy is not Placing.SINGULAR]
    chosen = choose(loads, sharded, options.shards, MemoryLimits(replicate_bytes=0), costs).best.plan
    auto = next(layout.name for layout in layouts if layout.plan.shards == chosen.shards)
    ratios = {"p99_overhead_best": p99[best], "p99_overhead_auto": p99[auto], "cpu_overhead_best": cpu[best]}
    return ratios | {f"p99_overhead {name}": value for name, value in p99.items()}


def _about(workload: DlrmWorkload, declaration: Declaration, options: ShardOptions, rate: float) -> dict[str, Any]:
    size = sum(table.size_bytes for table in declaration.tables)
    return {
        "name": workload.name,
        "use": workload.use,
        "runs": options.runs,
        "rate": rate,
        "served": {"tables": len(declaration.tables), "bytes": size, "storage": workload.storage.value},
        "flops": {},
    }
