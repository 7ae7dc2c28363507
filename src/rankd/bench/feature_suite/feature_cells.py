"""One cell of the suite `features`: so many candidates, so much delay to the store, all contestants in turn.

In: servers that are warm. Out: figures of every contestant, round by round. Three things are measured:

    all at the same moderate rate     latency, hit rate, bytes from the store, processor time
    each at full load (closed loop)   its capacity, from which its search begins
    each at its own highest rate      whose p99 stays under that of no cache at 70% of what no cache can do

Everybody gets the same requests, and none of them twice: what was asked a moment ago would be in any cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from rankd.bench.arrivals import poisson_arrivals
from rankd.bench.feature_suite.delaying_proxy import DelayingProxy
from rankd.bench.feature_suite.feature_server import NONE, FeatureServer, ServerFigures
from rankd.bench.feature_suite.redis_process import RedisProcess
from rankd.bench.feature_suite.zipf_requests import ZipfRequests
from rankd.bench.load import Connection, LoadPlan, LoadResult, generate, open_loop
from rankd.bench.placement import Placement, cpu_seconds, on_cpus
from rankd.bench.rate_search import highest_rate
from rankd.bench.report import percentile, percentiles
from rankd.errors import EngineFailure
from rankd.features.feature_config import MIB

CONNECTIONS = 64
CLOSED_CONNECTIONS = 4
"""Of a closed loop: enough that the server always has a request, few enough that they do not wait long for it."""
COMMON_SHARE = 0.4
BOUND_SHARE = 0.7
PROBES = 5
FEWEST_REQUESTS = 300
"""Of a measurement, so that its p99 is not its worst request; but at most LONGEST times the seconds that were asked."""
LONGEST = 4.0
LEAD = 0.1
"""Of a measurement's time that comes before it and does not count: others had the processor until now."""
TURN = 100_000
"""Places in the sequence of requests from one measurement to the next; more than any of them needs."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that runs: the servers by contestant, the store, and the network between them."""

    servers: Sequence[FeatureServer]
    redis: RedisProcess
    proxy: DelayingProxy
    place: Placement

    def warm(self, server: FeatureServer, requests: list[bytes]) -> None:
        """Requests that nobody takes the time of, so that this process may send them itself."""
        with ExitStack() as opened:
            connections = [
                opened.enter_context(closing(Connection(server.host, server.port))) for _ in range(CLOSED_CONNECTIONS)
            ]
            arrivals = [0.0] * len(requests)
            _good(server, open_loop(LoadPlan(server.host, server.port, requests, arrivals_s=arrivals), connections))

    def flood(self, server: FeatureServer, requests: list[bytes]) -> LoadResult:
        """Requests over a few connections, each as soon as one is free."""
        return self._generate(server, requests, [0.0] * len(requests), CLOSED_CONNECTIONS)

    def offer(self, server: FeatureServer, requests: list[bytes], arrivals_s: list[float]) -> LoadResult:
        """Requests at their times."""
        return self._generate(server, requests, arrivals_s, CONNECTIONS)

    def _generate(
        self, server: FeatureServer, requests: list[bytes], arrivals_s: list[float], connections: int
    ) -> LoadResult:
        plan = LoadPlan(server.host, server.port, requests, arrivals_s=arrivals_s, connections=connections)
        with on_cpus(self.place.others):
            return generate(plan)


@dataclass(slots=True)
class Turns:
    """A place in the sequence of requests for each measurement; all contestants of a turn begin at the same one."""

    place: int = 0

    def next(self) -> int:
        """One that nobody has had."""
        self.place += TURN
        return self.place


@dataclass(frozen=True, slots=True)
class Cell:
    """What is asked for. `delay_s` is what an answer of the store takes longer; `seconds` those of a measurement."""

    requests: ZipfRequests
    delay_s: float
    seconds: float
    seed: int

    @property
    def candidates(self) -> int:
        """Of a request."""
        return self.requests.candidates

    @property
    def suffix(self) -> str:
        """How it is called in the names of ratios."""
        return f"{self.candidates}_{self.delay_s * 1e3:g}ms"

    @property
    def title(self) -> str:
        """How it is called in the report's tables."""
        return f"{self.candidates} candidates, {self.delay_s * 1e3:g} ms to the store"


@dataclass(frozen=True, slots=True)
class Rates:
    """Requests a second: each contestant's capacity, the rate that all are offered, and that of no cache alone whose
    p99 is the bound for all."""

    capacity: Mapping[str, float]
    common: float
    of_bound: float


@dataclass(frozen=True, slots=True)
class CellRound:
    """The figures of one round by contestant; `failed` counts the errors, which are added and not averaged."""

    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)


def find_rates(scene: Scene, cell: Cell, turns: Turns) -> Rates:
    """Capacities by closed loops, and from that of no cache the rate and the bound for all.

    Raises:
        EngineFailure: a contestant answered nothing.
        Unavailable: one of the processes ended.
    """
    capacity: dict[str, float] = {}
    start = turns.next()
    none, fewest = _without_cache(scene), 2 * CLOSED_CONNECTIONS
    trial = scene.flood(none, cell.requests.encoded(turns.next(), fewest * 4))
    count = min(max(int(cell.seconds * len(_good(none, trial)) / trial.wall_s), fewest), TURN)
    for server in scene.servers:
        result = scene.flood(server, cell.requests.encoded(start, count))
        capacity[server.contestant.name] = len(_good(server, result)) / result.wall_s
    return Rates(capacity, COMMON_SHARE * capacity[NONE.name], BOUND_SHARE * capacity[NONE.name])


def measure_round(scene: Scene, cell: Cell, rates: Rates, turns: Turns, number: int) -> CellRound:
    """All contestants one after the other; who comes first differs from round to round.

    Raises:
        EngineFailure: a contestant answered nothing.
        Unavailable: one of the processes ended.
    """
    one, places, seed = CellRound(), [turns.next() for _ in range(1 + PROBES)], cell.seed + number
    latencies, _ = _offered(scene, _without_cache(scene), cell, rates.of_bound, turns.next(), seed)
    bound_ms = percentile(latencies, 0.99)
    first = number % len(scene.servers)
    for server in [*scene.servers[first:], *scene.servers[:first]]:
        name = server.contestant.name
        figures, one.failed[name] = _at_common_rate(scene, server, cell, rates.common, places[0], seed)
        guess = BOUND_SHARE * rates.capacity[name]
        best = _highest(scene, server, cell, (guess, bound_ms), places[1:], seed)
        one.figures[name] = figures | {
            "capacity": rates.capacity[name],
            "p99_bound_ms": bound_ms,
            "rate_at_bound": best,
            "throughput_at_bound": best * cell.candidates,
        }
    return one


def hit_rate(before: ServerFigures, after: ServerFigures) -> float:
    """The share of item rows, between two looks, that did not have to be fetched."""
    total = sum(after.rows.values()) - sum(before.rows.values())
    return 1.0 - (after.fetched + after.shared - before.fetched - before.shared) / total if total else 0.0


def _at_common_rate(
    scene: Scene, server: FeatureServer, cell: Cell, rate: float, place: int, seed: int
) -> tuple[dict[str, float], int]:
    before, redis_before = server.figures(), scene.redis.figures()
    others = {"redis": scene.redis.pid, "proxy": scene.proxy.pid}
    spent = {name: cpu_seconds(pid) for name, pid in others.items()}
    latencies, result = _offered(scene, server, cell, rate, place, seed)
    after, redis_after = server.figures(), scene.redis.figures()
    answered = len(result.statuses)
    spent = {name: cpu_seconds(pid) - spent[name] for name, pid in others.items()}
    spent["server"] = after.cpu_s - before.cpu_s
    figures = percentiles(latencies) | {
        "requests": float(len(latencies)),
        "throughput": cell.candidates * answered / result.wall_s,
        "rate_planned": rate,
        "rate_achieved": answered / result.wall_s,
        "generator_late_p99_ms": percentile(result.late_s, 0.99) * 1e3,
        "generator_cpu_share": result.cpu_s / result.wall_s,
        "hit_rate": hit_rate(before, after),
        "state_hit_rate": _state_hit_rate(before, after),
        **_row_shares(before, after),
        "store_bytes_a_request": (after.read_bytes - before.read_bytes) / answered,
        "redis_sent_bytes_a_request": (redis_after.sent_bytes - redis_before.sent_bytes) / answered,
        **{f"{name}_cpu_ms_a_request": used * 1e3 / answered for name, used in spent.items()},
        "degraded_share": (after.degraded - before.degraded) / answered,
        "cache_mib": after.cache_bytes / MIB,
        "cache_over_budget": max(before.fullest, after.fullest),
        "resident_mib": after.resident_bytes / MIB,
    }
    return figures, sum(status != 200 for status in result.statuses)


def _highest(
    scene: Scene, server: FeatureServer, cell: Cell, goal: tuple[float, float], places: Sequence[int], seed: int
) -> float:
    """The highest rate of a contestant whose p99 stays under a bound; `goal` is a guess at it, and the bound in ms."""
    (guess, bound_ms), unused = goal, iter(places)

    def keeps(rate: float) -> bool:
        latencies, result = _offered(scene, server, cell, rate, next(unused), seed)
        whole = all(status == 200 for status in result.statuses)
        return whole and percentile(latencies, 0.99) <= bound_ms

    return highest_rate(keeps, guess, len(places))


def _offered(
    scene: Scene, server: FeatureServer, cell: Cell, rate: float, place: int, seed: int
) -> tuple[list[float], LoadResult]:
    """Latencies in ms, from the scheduled times, of what came after the lead and was answered well."""
    seconds = min(max(cell.seconds, FEWEST_REQUESTS / rate), LONGEST * cell.seconds)
    lead = LEAD * seconds
    arrivals = poisson_arrivals(rate, lead + seconds, seed)[:TURN] or [0.0]
    result = scene.offer(server, cell.requests.encoded(place, len(arrivals)), arrivals)
    latencies = [
        (result.done_s[i] - result.scheduled_s[i]) * 1e3 for i in _good(server, result) if result.scheduled_s[i] >= lead
    ]
    return latencies or [(result.done_s[0] - result.scheduled_s[0]) * 1e3], result


def _good(server: FeatureServer, result: LoadResult) -> list[int]:
    good = [place for place, status in enumerate(result.statuses) if status == 200]
    if not good:
        raise EngineFailure(
            f"contestant '{server.contestant.name}': none of {len(result.statuses)} requests was answered with 200"
        )
    return good


def _without_cache(scene: Scene) -> FeatureServer:
    return next(server for server in scene.servers if server.contestant == NONE)


def _row_shares(before: ServerFigures, after: ServerFigures) -> dict[str, float]:
    rows = {source: number - before.rows[source] for source, number in after.rows.items()}
    total = sum(rows.values()) or 1.0
    return {f"rows_{source}": number / total for source, number in rows.items()}


def _state_hit_rate(before: ServerFigures, after: ServerFigures) -> float:
    """The share of requests whose user's state was not computed from nothing."""
    total = sum(after.states.values()) - sum(before.states.values())
    return 1.0 - (after.states.get("encoded", 0.0) - before.states.get("encoded", 0.0)) / total if total else 0.0
