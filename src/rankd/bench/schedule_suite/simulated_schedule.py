"""`rankd bench schedule --simulate`: policies against each other in made-up time, with what calls take on this machine.

In: a workload. Out: a Report. The workload's model is built and its calls are measured; then the same arrivals go
through three schedules over the same executors:

    fcfs padded     one queue, each request one call, padded to the largest bucket: implicit shapes
    fcfs            the same, padded to the smallest bucket that holds it
    rankd           `schedule.policy`: cut, packed, ordered

Each one's highest rate is that whose p99 stays under `bound_ms`; then rankd is offered twice its own, with deadlines.
It also times decisions over a thousand waiting requests.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np

from rankd.bench.arrivals import POISSON, Arrivals
from rankd.bench.report import Report, Row, commit, machine, percentile
from rankd.bench.synthetic_model import build_model
from rankd.bench.workload import Workload, draw, largest, zipf_ranks
from rankd.engine.backend import EngineConfig
from rankd.engine.targets import check_target, float_precision
from rankd.ranker import Ranker
from rankd.schedule.admission import Limits
from rankd.schedule.costs import Warmed
from rankd.schedule.kinds import Mix
from rankd.schedule.ledger import Ledger
from rankd.schedule.policy import Rules
from rankd.schedule.schedule_config import ScheduleConfig, make_rules
from rankd.schedule.served import Asked
from rankd.schedule.simulation import Arrival, simulate

SMALLEST = 16
NO_LIMITS = Limits(candidates=10**9, work_ms=1e9)
SHARES = (0.3, 0.5, 0.7, 0.85, 0.95)
"""Of the highest rate: where latencies are reported."""
STEPS = 9
SHORT_ROWS = 64
WAITING = 1000
DECISIONS = 2000
Simulate = Callable[[Sequence[Arrival]], tuple[list[float], float]]
"""Latencies in ms in the order of arrivals, and padded rows over real ones."""


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """`seconds` of arrivals in each simulated run; the p99 that a highest rate has to keep; when requests come; whose
    calls are measured."""

    seconds: float = 60.0
    bound_ms: float = 100.0
    arrivals: Arrivals = POISSON
    target: str = "openvino"


def run_simulated(workload: Workload, options: SimulationOptions, advance: Callable[[int, int, str], None]) -> Report:
    """Run the suite.

    Raises:
        MissingExtra: torch is not installed.
        ConfigError: no such target.
        BuildError, ArtifactError: the target cannot be had here.
    """
    check_target(options.target)
    surroundings = machine()
    advance(0, 3, "model and costs")
    rules, encode_ms, about = _measured(workload, options.target)
    about |= {"arrivals": options.arrivals.name, "bound_ms": options.bound_ms}
    advance(1, 3, "simulation")
    schedules: dict[str, Simulate] = {
        "fcfs padded": lambda arrivals: _fcfs(arrivals, rules, lambda rows: rules.cutter.buckets[-1]),
        "fcfs": lambda arrivals: _fcfs(arrivals, rules, rules.cutter.bucket_for),
        "rankd": lambda arrivals: through_rankd(arrivals, rules),
    }
    results: list[Row] = []
    at = partial(_arrivals, workload, rules, encode_ms, options)
    most = 1.1 * most_requests(workload, rules)
    highest = {name: highest_rate(one, at, most, options.bound_ms) for name, one in schedules.items()}
    for name, one in schedules.items():
        for share in SHARES:
            rate = share * highest["rankd"]
            arrivals = at(rate)
            results.append(
                {"contestant": name, "table": f"at {share:.0%} of rankd's highest rate", "share": share, "rate": rate}
                | figures(arrivals, *one(arrivals), options.bound_ms)
            )
    goodput, refused = _goodput(workload, rules, encode_ms, options, highest["rankd"])
    advance(2, 3, "decisions")
    decisions = _decisions(rules)
    advance(3, 3, "done")
    at_70 = {row["contestant"]: row for row in results if row.get("share") == 0.7}
    peers = [name for name in schedules if name != "rankd"]
    ratios = {
        "throughput_gain_simulated": highest["rankd"] / max(highest[name] for name in peers),
        "throughput_gain_padded_simulated": highest["rankd"] / highest["fcfs padded"],
        "p99_gain_padded_simulated": _p99_over_padded(schedules, at(0.7 * highest["fcfs padded"])),
        "latency_gain_short_simulated": min(at_70[name]["short_p99_ms"] for name in peers)
        / at_70["rankd"]["short_p99_ms"],
        "padding_waste": at_70["rankd"]["padding"],
        "goodput_at_2x_simulated": goodput,
        "refused_at_2x_simulated": refused,
        "scheduler_us_p50": percentile(decisions.requests, 0.5),
        "scheduler_us": percentile(decisions.requests, 0.99),
        "scheduler_us_admission": percentile(decisions.admissions, 0.99),
        "scheduler_us_call": percentile(decisions.calls, 0.99),
        "calls_a_request": len(decisions.calls) / len(decisions.requests),
    }
    for name, rate in highest.items():
        results.append({"contestant": name, "table": "highest rates", "rate": rate})
    return Report("schedule", about, surroundings, commit(), {}, results, ratios)


def _p99_over_padded(schedules: Mapping[str, Simulate], arrivals: Sequence[Arrival]) -> float:
    """By how much fixed shapes have the higher p99, at a rate that they can keep up with."""
    padded, ours = (percentile(schedules[name](arrivals)[0], 0.99) for name in ("fcfs padded", "rankd"))
    return padded / ours


def fine_buckets(most: int) -> tuple[int, ...]:
    """Four an octave from 16 on, and the most candidates: 16, 20, 24, 28, 32, 40, ..."""
    steps = {SMALLEST * 2**octave * quarter // 4 for octave in range(12) for quarter in range(4, 8)}
    return (*sorted(step for step in steps if step < most), most)


def build_with_buckets(
    workload: Workload, root: Path, buckets: tuple[int, ...], targets: tuple[str, ...] = ("openvino",)
) -> Path:
    """The workload's model with other candidate buckets, in bfloat16 where the machine has it on all targets."""
    changed = msgspec.structs.replace(workload.buckets, candidates=buckets)
    return build_model(msgspec.structs.replace(workload, buckets=changed), root, targets, float_precision(*targets))


def _measured(workload: Workload, target: str) -> tuple[Rules, float, dict[str, Any]]:
    """Rules with the costs of the workload's model on this machine, and what encoding a full history takes."""
    buckets = fine_buckets(largest(workload.candidates))
    with TemporaryDirectory(prefix="rankd-bench-") as folder:
        path = build_with_buckets(workload, Path(folder), buckets, (target,))
        with Ranker.load(path, EngineConfig(target)) as ranker:
            warmed = ranker.schedule.rules.costs.warmed
            most_users = {bucket: ranker.schedule.rules.most_users(bucket) for bucket in buckets}
            flops = workload.flops()
            executors = ranker.backend.num_executors
            about: dict[str, Any] = {
                "name": workload.name,
                "use": workload.use,
                "served": {
                    "target": ranker.backend.target,
                    "precision": ranker.backend.precision.value,
                    "executors": executors,
                },
                "flops": {name: getattr(flops, name) for name in flops.__struct_fields__},
                "runs": 1,
                **costs_of(warmed),
            }
    rules = make_rules(ScheduleConfig(), buckets, warmed, most_users.__getitem__, executors)
    return rules, warmed.most_encode_ms, about


def costs_of(warmed: Warmed) -> dict[str, Any]:
    """What calls take, for a report."""
    return {
        "score_ms": {f"{bucket} x {users}": ms for (bucket, users), ms in warmed.score_ms.items()},
        "encode_ms": warmed.most_encode_ms,
    }


def _arrivals(
    workload: Workload, rules: Rules, encode_ms: float, options: SimulationOptions, rate: float
) -> list[Arrival]:
    return arrivals_of(workload, [(rules.costs.prepare(True), encode_ms)], options, rate)


def arrivals_of(
    workload: Workload, prepare_ms: Sequence[tuple[float, float]], options: SimulationOptions, rate: float
) -> list[Arrival]:
    """Requests of the workload; a user's first visit encodes the history, later ones find the state. `prepare_ms` says
    of each kind of executors what finding takes, and what encoding does on top of it."""
    random = np.random.default_rng(workload.seed)
    times = options.arrivals.times(rate, options.seconds, workload.seed) or [0.0]
    count = len(times)
    sizes, users = draw(workload.candidates, random, count), zipf_ranks(workload.users, random, count)
    warm = set(zipf_ranks(workload.users, random, 20 * workload.users.count).tolist())
    made = []
    for at, rows, user in zip(times, sizes.tolist(), users.tolist(), strict=True):
        resident = user in warm
        by_kind = tuple(found_ms + (0.0 if resident else encode_ms) for found_ms, encode_ms in prepare_ms)
        made.append(Arrival(at, rows, by_kind, resident))
    return made


def _fcfs(arrivals: Sequence[Arrival], rules: Rules, bucket_of: Callable[[int], int]) -> tuple[list[float], float]:
    """First come, first served: a request is one call of one executor."""
    free = [0.0] * rules.num_executors
    latencies, real, padded = [], 0, 0
    for arrival in arrivals:
        bucket = bucket_of(arrival.rows)
        service_ms = arrival.prepare_ms[0] + rules.costs.rows(arrival.rows) + rules.costs.score(bucket)
        end = max(heapq.heappop(free), arrival.at) + service_ms / 1e3
        heapq.heappush(free, end)
        latencies.append((end - arrival.at) * 1e3)
        real, padded = real + arrival.rows, padded + bucket - arrival.rows
    return latencies, padded / real


def through_rankd(arrivals: Sequence[Arrival], rules: Rules | Mix) -> tuple[list[float], float]:
    """Latencies in milliseconds, and padded rows over real ones."""
    simulated = simulate(arrivals, rules, NO_LIMITS)
    return [one.latency_ms for one in simulated.outcomes], simulated.padded_rows / max(simulated.rows, 1)


def most_requests(workload: Workload, rules: Rules) -> float:
    """Requests a second that executors of a kind can do, if they find all states."""
    sizes = draw(workload.candidates, np.random.default_rng(workload.seed), 10_000)
    mean_ms = float(np.mean([rules.work_ms(int(rows), 0.0) for rows in sizes.tolist()]))
    return 1e3 * rules.speed / mean_ms


def highest_rate(
    schedule: Simulate, arrivals_at: Callable[[float], list[Arrival]], most: float, bound_ms: float
) -> float:
    """The highest rate whose p99 stays under the bound, by bisection between nothing and what no schedule can do."""
    low, high = 0.0, most
    for _ in range(STEPS):
        rate = (low + high) / 2
        latencies, _ = schedule(arrivals_at(rate))
        if percentile(latencies, 0.99) <= bound_ms:
            low = rate
        else:
            high = rate
    return float(max(low, high / 2**STEPS))


def figures(arrivals: Sequence[Arrival], latencies: Sequence[float], padding: float, bound_ms: float) -> Row:
    """Latencies of requests, all of them and the short ones, and how many keep the bound."""
    short = [ms for ms, arrival in zip(latencies, arrivals, strict=True) if arrival.rows <= SHORT_ROWS] or latencies
    return {
        "p50_ms": percentile(latencies, 0.5),
        "p99_ms": percentile(latencies, 0.99),
        "short_p99_ms": percentile(short, 0.99),
        "padding": padding,
        "in_time": sum(ms <= bound_ms for ms in latencies) / len(latencies),
    }


def _goodput(
    workload: Workload, rules: Rules, encode_ms: float, options: SimulationOptions, highest: float
) -> tuple[float, float]:
    """Offered twice the highest rate with deadlines: the share of that rate answered in time, and of all refused."""
    plain = _arrivals(workload, rules, encode_ms, options, 2 * highest)
    arrivals = [replace(one, timeout_ms=options.bound_ms) for one in plain]
    outcomes = simulate(arrivals, rules, NO_LIMITS).outcomes
    good = sum(one.how == "scored" for one in outcomes) / (options.seconds * highest)
    return good, sum(one.how == "refused" for one in outcomes) / len(outcomes)


@dataclass(frozen=True, slots=True)
class _Decisions:
    """Microseconds of each admission, of each call that an executor was given, and of all that went by from one request
    that was done to the next."""

    admissions: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)


def _decisions(rules: Rules) -> _Decisions:
    """What admission and decisions take while a thousand others wait."""
    random, ledger = np.random.default_rng(0), Ledger[int](rules, NO_LIMITS)
    most, taken = rules.cutter.most_rows, _Decisions()

    def accept(now: float) -> None:
        rows, patience = int(random.integers(1, most + 1)), float(random.uniform(50, 1000))
        asked = Asked(rows, bool(random.random() < 0.7), now + patience if random.random() < 0.5 else None)
        started = time.perf_counter()
        ledger.comes(ledger.accept(0, asked, now))
        taken.admissions.append((time.perf_counter() - started) * 1e6)

    def call(now: float) -> bool:
        """Give an executor a call, and book it; whether a request is done with it."""
        started = time.perf_counter()
        work = ledger.next(1, now)
        assert work is not None  # noqa: S101 - a thousand wait
        for job in work.unprepared:
            ledger.prepared(job)
        ended = ledger.done(work) if work.parts else []
        ledger.leave(work.jobs)
        taken.calls.append((time.perf_counter() - started) * 1e6)
        return bool(ended)

    for _ in range(WAITING):
        accept(0.0)
    taken.admissions.clear()
    for number in range(DECISIONS):
        now, first = 0.001 * number, len(taken.calls)
        accept(now)
        while not call(now):
            pass
        taken.requests.append(taken.admissions[-1] + sum(taken.calls[first:]))
    return taken
