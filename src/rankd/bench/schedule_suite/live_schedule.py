"""`rankd bench schedule`: the schedule on real sockets, beside first come, first served over the same engine.

In: a workload. Out: a Report. Contestants are `rankd serve` processes over the same weights on OpenVINO, all with
users' states kept; a generator in a process of its own sends the same requests at the same Poisson times:

    rankd            the schedule as it is
    one queue        first come, first served, a request one call, padded to the smallest bucket that holds it
    one queue, padded   the same with one bucket, the largest: implicit shapes

Each one's highest rate is that whose p99 stays under `bound_ms`, errors counting as misses. Then all are offered 70% of
rankd's, and rankd alone twice its own, with that deadline in each request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankd.bench.load import LoadPlan, LoadResult, generate, poisson_arrivals
from rankd.bench.parity import against_torch, check_same, scores_in_process
from rankd.bench.placement import resident_bytes
from rankd.bench.rate_search import highest_rate
from rankd.bench.report import Neighbours, Report, Row, commit, machine, percentile
from rankd.bench.schedule_suite.simulated_schedule import SHORT_ROWS, build_with_buckets, fine_buckets
from rankd.bench.served_model import ServedModel
from rankd.bench.synthetic_model import users_for
from rankd.bench.wire_forms import Form, decode_scores, encode_request
from rankd.bench.workload import Workload, draw_requests, largest
from rankd.errors import EngineFailure
from rankd.features.feature_config import MIB
from rankd.ranker import Ranker
from rankd.types import RankRequest

CONNECTIONS = 256
CHECKED = 16
SHARE = 0.7
PROBES = 6
FEWEST, LONGEST = 400, 3.0
"""Requests of a measurement, so that its p99 is four of them; but at most LONGEST times the seconds asked for."""
REFUSED = 503
Step = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server's name, whether it has one bucket alone, and its settings."""

    name: str
    one_bucket: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)


IN_ORDER = {"RANKD_SCHEDULE__STRETCH": "0", "RANKD_SCHEDULE__QUANTUM_MS": "1e9", "RANKD_SCHEDULE__SPREAD": "false"}
CONTESTANTS = (
    Contestant("rankd"),
    Contestant("one queue", variables=IN_ORDER),
    Contestant("one queue, padded", one_bucket=True, variables=IN_ORDER),
)


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """`seconds` of a measurement at least, rounds, the p99 to keep, seconds at twice the highest rate."""

    seconds: float = 10.0
    runs: int = 1
    bound_ms: float = 100.0
    overload_seconds: float = 60.0


class _Scene:
    """Servers that are ready, and the requests that all of them get."""

    def __init__(self, workload: Workload, servers: Mapping[str, ServedModel], requests: Sequence[RankRequest]) -> None:
        self.workload, self.servers, self.requests = workload, servers, requests
        self._encoded = [encode_request(Form.BINARY, request) for request in requests]
        self._place = 0

    def offer(
        self, name: str, rate: float, seconds: float, seed: int, place: int | None = None
    ) -> list[tuple[int, float, int]]:
        """(status, latency in ms from the scheduled time, candidates) of requests at Poisson times."""
        arrivals = poisson_arrivals(rate, min(max(seconds, FEWEST / rate), LONGEST * seconds), seed)
        start = self.turn() if place is None else place
        some = [(start + number) % len(self.requests) for number in range(len(arrivals))]
        result = self._send(name, [self._encoded[one] for one in some], arrivals)
        return [
            (status, (done - planned) * 1e3, len(self.requests[some[index]].candidates))
            for index, status, done, planned in zip(
                result.index, result.statuses, result.done_s, result.scheduled_s, strict=True
            )
        ]

    def overload(self, name: str, rate: float, seconds: float, bound_ms: float) -> LoadResult:
        """Requests with a deadline."""
        arrivals = poisson_arrivals(rate, seconds, self.workload.seed)
        timed = [encode_request(Form.BINARY, replace(one, timeout_ms=bound_ms)) for one in self.requests]
        return self._send(name, [timed[number % len(timed)] for number in range(len(arrivals))], arrivals)

    def turn(self) -> int:
        """Another place in the sequence of requests."""
        self._place += 1009
        return self._place

    def _send(self, name: str, requests: list[bytes], arrivals: list[float]) -> LoadResult:
        server = self.servers[name]
        plan = LoadPlan(server.host, server.port, requests, arrivals_s=arrivals, connections=CONNECTIONS)
        return generate(plan)


def run_live(workload: Workload, options: LiveOptions, advance: Step) -> Report:
    """Run the suite.

    Raises:
        MissingExtra: torch is not installed.
        EngineFailure: scores differ from those in process, or a contestant answers nothing.
    """
    surroundings, steps = machine(), 3 + options.runs
    most = largest(workload.candidates)
    with TemporaryDirectory(prefix="rankd-bench-") as folder, ExitStack() as running:
        advance(0, steps, "models and parity")
        fine, single = Path(folder) / "fine", Path(folder) / "one"
        build_with_buckets(workload, fine, fine_buckets(most))
        build_with_buckets(workload, single, (most,))
        requests, expected, parity, about = _reference(workload, fine, options.runs)
        precision = about["served"]["precision"]
        roots = {contestant.name: single if contestant.one_bucket else fine for contestant in CONTESTANTS}
        servers = {
            one.name: running.enter_context(
                ServedModel(roots[one.name], ("rankd", "serve", "--store", "memory:"), one.variables)
            )
            for one in CONTESTANTS
        }
        scene = _Scene(workload, servers, requests)
        parity |= {name: _parity(server, requests, expected, precision) for name, server in servers.items()}
        neighbours = Neighbours()
        advance(1, steps, "warm-up")
        rates = {name: _warm(scene, name) for name in servers}
        rounds = []
        for number in range(options.runs):
            advance(2 + number, steps, f"highest rates, round {number + 1}")
            rounds.append({name: _highest(scene, name, rates[name], options, number) for name in servers})
        highest = {name: sorted(one[name] for one in rounds)[options.runs // 2] for name in servers}
        advance(2 + options.runs, steps, "below and above it")
        results = _below(scene, highest, options)
        overload = _overloaded(scene, highest["rankd"], options)
        padding = _padding(servers["rankd"])
    surroundings["others_cpu_share"] = neighbours.share()
    advance(steps, steps, "done")
    results.append({"contestant": "rankd", "table": "twice the highest rate", **overload})
    by_name = {row["contestant"]: row for row in results if row["table"] != "twice the highest rate"}
    others = [name for name in highest if name != "rankd"]
    ratios = {
        "throughput_gain": highest["rankd"] / max(highest[name] for name in others),
        "throughput_gain_padded": highest["rankd"] / highest["one queue, padded"],
        "latency_gain_short": min(by_name[name]["short_p99_ms"] for name in others) / by_name["rankd"]["short_p99_ms"],
        "padding_waste": padding,
        "goodput_at_2x": overload["good_rate"] / highest["rankd"],
    }
    return Report("schedule", about, surroundings, commit(), parity, results, ratios)


def _reference(
    workload: Workload, root: Path, runs: int
) -> tuple[list[RankRequest], list[Any], dict[str, float], dict[str, Any]]:
    with Ranker.load(root / workload.name / "1") as ranker:
        users = users_for(ranker.catalogue, workload)
        requests = draw_requests(workload, users, ranker.catalogue.ids.items, 4000, ranker.manifest.name)
        expected = scores_in_process(ranker, requests[:CHECKED])
        parity = {"in-process": against_torch(ranker, requests[:CHECKED], expected)}
        flops = workload.flops()
        about = {
            "name": workload.name,
            "use": workload.use,
            "served": {
                "target": ranker.backend.target,
                "precision": ranker.backend.precision.value,
                "executors": ranker.backend.num_executors,
                "buckets": len(ranker.schema.candidate_buckets),
            },
            "flops": {name: getattr(flops, name) for name in flops.__struct_fields__},
            "runs": runs,
        }
    return requests, expected, parity, about


def _parity(server: ServedModel, requests: Sequence[RankRequest], expected: Sequence[Any], precision: str) -> float:
    given = [
        decode_scores(Form.BINARY, server.exchange(encode_request(Form.BINARY, one))) for one in requests[:CHECKED]
    ]
    return check_same("a server", expected, given, precision)


def _warm(scene: _Scene, name: str) -> float:
    """The first requests, and what the server can do at most: requests a second."""
    server = scene.servers[name]
    encoded = [encode_request(Form.BINARY, one) for one in scene.requests[:FEWEST]]
    plan = LoadPlan(server.host, server.port, encoded, arrivals_s=[0.0] * len(encoded), connections=4)
    result = generate(plan)
    good = sum(status == 200 for status in result.statuses)
    if not good:
        raise EngineFailure(f"contestant '{name}': none of {len(encoded)} requests was answered with 200")
    return good / result.wall_s


def _highest(scene: _Scene, name: str, capacity: float, options: LiveOptions, number: int) -> float:
    seed = scene.workload.seed + number

    def keeps(rate: float) -> bool:
        answers = scene.offer(name, rate, options.seconds, seed)
        latencies = [ms if status == 200 else float("inf") for status, ms, _ in answers]
        return percentile(latencies, 0.99) <= options.bound_ms

    return highest_rate(keeps, SHARE * capacity, PROBES)


def _below(scene: _Scene, highest: Mapping[str, float], options: LiveOptions) -> list[Row]:
    rate, rows, place = SHARE * highest["rankd"], [], scene.turn()
    for name in scene.servers:
        answers = scene.offer(name, rate, options.seconds, scene.workload.seed, place)
        good = [ms for status, ms, _ in answers if status == 200] or [float("inf")]
        short = [ms for status, ms, rows_ in answers if status == 200 and rows_ <= SHORT_ROWS] or good
        rows.append(
            {
                "contestant": name,
                "table": f"{rate:.1f} requests a second, {SHARE:.0%} of rankd's highest rate",
                "highest_rate": highest[name],
                "p50_ms": percentile(good, 0.5),
                "p99_ms": percentile(good, 0.99),
                "short_p99_ms": percentile(short, 0.99),
                "failed": sum(status != 200 for status, _, _ in answers),
                "requests": len(answers),
            }
        )
    return rows


def _overloaded(scene: _Scene, highest: float, options: LiveOptions) -> Row:
    """What becomes of requests at twice the highest rate."""
    server = scene.servers["rankd"]
    before = resident_bytes(server.pid)
    result = scene.overload("rankd", 2 * highest, options.overload_seconds, options.bound_ms)
    ends = list(zip(result.statuses, result.scheduled_s, result.sent_s, result.done_s, strict=True))
    in_time = sum(status == 200 and (done - planned) * 1e3 <= options.bound_ms for status, planned, _, done in ends)
    refusals = [(done - sent) * 1e3 for status, _, sent, done in ends if status == REFUSED] or [0.0]
    return {
        "offered_rate": 2 * highest,
        "good_rate": in_time / options.overload_seconds,
        "answered": sum(status == 200 for status, *_ in ends),
        "refused": sum(status == REFUSED for status, *_ in ends),
        "late": sum(status == 504 for status, *_ in ends),
        "lost": sum(status == 0 for status, *_ in ends),
        "refusal_p50_ms": percentile(refusals, 0.5),
        "refusal_p99_ms": percentile(refusals, 0.99),
        "generator_late_p99_ms": percentile(result.late_s, 0.99) * 1e3,
        "generator_cpu_share": result.cpu_s / result.wall_s,
        "memory_growth_mib": (resident_bytes(server.pid) - before) / MIB,
    }


def _padding(server: ServedModel) -> float:
    rows = server.counter("rankd_schedule_rows_total")
    return server.counter("rankd_schedule_padded_rows_total") / max(rows, 1.0)
