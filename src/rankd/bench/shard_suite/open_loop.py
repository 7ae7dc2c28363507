"""One measurement of one layout: an open loop at a given rate, and where the time of its requests went.

In: a running layout and requests. Out: figures, mean milliseconds of a request unless they are quantiles:

    outside         what the client sees beside the server: HTTP, sockets, the wait for a connection
    queue           waiting for an executor
    features        the candidates' columns and ids
    serialise       ids routed and sent, sums received and added, by the measured costs of them
    network         the rest of what look-ups are waited for: sockets, waking up, waiting for the slowest shard
    shard_queue     waiting for a worker of a shard
    shard_service   the shards' work but for look-ups
    lookup          rows found and added: measured where tables are in the server, by the measured costs on shards
    dense           the engine
    order           the answer's order
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from rankd.bench.load import LoadPlan, generate
from rankd.bench.report import percentile
from rankd.bench.served_model import ServedModel
from rankd.bench.shard_suite.placed_server import PlacedServer, ShardWork
from rankd.errors import EngineFailure

CONNECTIONS = 32
STAGES = ("queue", "features", "encode", "score", "order")
PARTS = (
    "outside_ms",
    "queue_ms",
    "features_ms",
    "serialise_ms",
    "network_ms",
    "shard_queue_ms",
    "shard_service_ms",
    "lookup_ms",
    "dense_ms",
    "order_ms",
)


@dataclass(frozen=True, slots=True)
class Offered:
    """What is sent: requests with how many samples each has, in turn, at these seconds."""

    encoded: list[bytes]
    samples: list[int]
    arrivals_s: list[float]


@dataclass(frozen=True, slots=True)
class KnownCosts:
    """Of a request, in ms, by the measured costs: ids routed and sums joined in the server, rows looked up by a shard's
    call."""

    serialise_ms: float
    shard_lookup_ms: float


def measured(placed: PlacedServer, offered: Offered, known: KnownCosts) -> tuple[dict[str, float], list[float]]:
    """Send all; figures, and the latencies in ms of the requests that were answered.

    Raises:
        EngineFailure: nothing was answered.
    """
    server, before, stages = placed.server, placed.work(), _stages(placed.server)
    plan = LoadPlan(server.host, server.port, offered.encoded, arrivals_s=offered.arrivals_s, connections=CONNECTIONS)
    result = generate(plan)
    after, now = placed.work(), _stages(server)
    spent = {name: now[name] - stages[name] for name in now}
    latencies = [
        (done - planned) * 1e3
        for status, planned, done in zip(result.statuses, result.scheduled_s, result.done_s, strict=True)
        if status == 200
    ]
    if not latencies:
        raise EngineFailure(f"none of {len(offered.arrivals_s)} requests was answered with 200")
    count = len(latencies)
    figures = {
        "p50_ms": percentile(latencies, 0.5),
        "p99_ms": percentile(latencies, 0.99),
        "requests": float(count),
        "failed": float(len(result.statuses) - count),
        "throughput": sum(offered.samples[index] for index in result.index) / result.wall_s,
        "server_cpu_ms": (after.server_cpu_s - before.server_cpu_s) * 1e3 / count,
        "shards_cpu_ms": (after.shards_cpu_s - before.shards_cpu_s) * 1e3 / count,
        "calls": (after.calls - before.calls) / count,
    }
    return figures | attribution(spent, before, after, statistics.mean(latencies), count, known), latencies


def attribution(
    spent: Mapping[str, float], before: ShardWork, after: ShardWork, seen_ms: float, count: int, known: KnownCosts
) -> dict[str, float]:
    """The parts of a request, mean milliseconds; see this file's head. `spent`: of all `count` requests together."""
    waited_ms = spent["lookup"] * 1e3 / count
    calls = after.calls - before.calls
    queue_ms = service_ms = serialise_ms = network_ms = 0.0
    lookup_ms = waited_ms
    if calls:
        queue_ms, service_ms = (
            (after.queue_ms - before.queue_ms) / calls,
            (after.service_ms - before.service_ms) / calls,
        )
        beside_ms = max(waited_ms - queue_ms - service_ms, 0.0)
        serialise_ms = min(known.serialise_ms, beside_ms)
        network_ms = beside_ms - serialise_ms
        lookup_ms = min(known.shard_lookup_ms, service_ms)
        service_ms -= lookup_ms
    return {
        "outside_ms": max(seen_ms - spent["total"] / count, 0.0),
        "queue_ms": spent["queue"] / count,
        "features_ms": max(spent["features"] / count - waited_ms, 0.0),
        "serialise_ms": serialise_ms,
        "network_ms": network_ms,
        "shard_queue_ms": queue_ms,
        "shard_service_ms": service_ms,
        "lookup_ms": lookup_ms,
        "dense_ms": (spent["encode"] + spent["score"]) / count,
        "order_ms": spent["order"] / count,
    }


def most_requests_a_second(server: ServedModel, encoded: list[bytes], count: int, connections: int) -> float:
    """How many it answers when it always has some.

    Raises:
        EngineFailure: it answers nothing.
    """
    plan = LoadPlan(server.host, server.port, encoded, arrivals_s=[0.0] * count, connections=connections)
    result = generate(plan)
    good = sum(status == 200 for status in result.statuses)
    if not good:
        raise EngineFailure(f"none of {count} requests was answered with 200")
    return good / result.wall_s


def one_by_one_ms(server: ServedModel, encoded: list[bytes], seconds: float) -> float:
    """The median latency of one request at a time.

    Raises:
        EngineFailure: a request was not answered with 200.
    """
    result = generate(LoadPlan(server.host, server.port, encoded, seconds=seconds, warmup=2))
    if not result.statuses or set(result.statuses) != {200}:
        raise EngineFailure(f"requests were answered with {sorted(set(result.statuses))}")
    return statistics.median((done - sent) * 1e3 for sent, done in zip(result.sent_s, result.done_s, strict=True))


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
