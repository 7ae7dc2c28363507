"""One contestant that runs, under load: the requests that all of them get, at times that all of them get.

In: rates. Out: what became of every request, and its figures. A request that was not answered with scores counts as one
that took as long as the generator waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rankd.bench.arrivals import Arrivals
from rankd.bench.load import ANSWER_TIMEOUT_S, LoadPlan, LoadResult, generate
from rankd.bench.parity import SAME, check_same
from rankd.bench.placement import memory_of_all
from rankd.bench.rate_search import highest_rate
from rankd.bench.report import Row, percentile
from rankd.bench.schedule_suite.live_contestants import Contestant
from rankd.bench.schedule_suite.simulated_schedule import SHORT_ROWS
from rankd.bench.served_model import ServedModel
from rankd.bench.server_process import ServerProcess
from rankd.errors import EngineFailure
from rankd.features.feature_config import MIB
from rankd.types import Float32Array, RankRequest

CONNECTIONS = 256
SHARE = 0.7
PROBES = 6
WARMING = 1500
"""Requests before anything is measured: the states of users who come often are there then, as they are in operation."""
FEWEST, LONGEST = 400, 3.0
"""Requests of a measurement, so that its p99 is four of them; but at most LONGEST times the seconds asked for."""
REFUSED, LATE = 503, 504
STEP = 1009
"""From one measurement to the next in the sequence of requests."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What a rate has to keep: a p99 of `bound_ms`, over `seconds` at least."""

    bound_ms: float
    seconds: float


class LoadedServer:
    """A contestant's server that is up. `seed` draws arrival times."""

    def __init__(
        self,
        contestant: Contestant,
        server: ServerProcess,
        requests: Sequence[RankRequest],
        arrivals: Arrivals,
        seed: int,
    ) -> None:
        self.contestant, self.server, self._requests = contestant, server, requests
        self._encoded = [contestant.encode(request) for request in requests]
        self._arrivals, self._seed, self._place = arrivals, seed, 0

    def check(self, expected: Sequence[Float32Array], precision: str) -> float:
        """The largest difference of a score to those in process.

        Raises:
            EngineFailure: too large a difference, or an error instead of scores.
        """
        given = [
            self.contestant.decode(self.server.exchange(encoded), request)
            for encoded, request, _ in zip(self._encoded, self._requests, expected, strict=False)
        ]
        return check_same(self.contestant.name, expected, given, SAME[precision])

    def warm(self, count: int | None = None) -> float:
        """The first `count` requests, or WARMING; how many it answers a second when it always has some.

        Raises:
            EngineFailure: it answers none of them.
        """
        count = WARMING if count is None else count
        plan = self._plan(self._encoded[:count], [0.0] * count, connections=4)
        result = generate(plan)
        good = sum(status == 200 for status in result.statuses)
        if not good:
            raise EngineFailure(f"contestant '{self.contestant.name}': none of {count} requests was answered with 200")
        return good / result.wall_s

    def highest(self, capacity: float, promise: Promise, tried: list[Row]) -> float:
        """The highest rate that keeps the promise; every one that was tried is noted."""

        def keeps(rate: float) -> bool:
            row = self.offer(rate, promise)
            tried.append(row)
            return bool(row["p99_ms"] <= promise.bound_ms)

        return highest_rate(keeps, SHARE * capacity, PROBES)

    def offer(self, rate: float, promise: Promise) -> Row:
        """Figures of requests at a rate."""
        seconds = min(max(promise.seconds, FEWEST / rate), LONGEST * promise.seconds)
        arrivals = self._arrivals.times(rate, seconds, self._seed)
        self._place += STEP
        some = [(self._place + number) % len(self._requests) for number in range(len(arrivals))]
        timed = self.contestant.says_deadlines
        encoded = self._timed(some, promise.bound_ms) if timed else [self._encoded[one] for one in some]
        result = generate(self._plan(encoded, arrivals))
        sizes = [len(self._requests[some[index]].candidates) for index in result.index]
        taken = _latencies(result)
        short = [ms for ms, rows in zip(taken, sizes, strict=True) if rows <= SHORT_ROWS]
        return {
            "contestant": self.contestant.name,
            "rate": rate,
            "p50_ms": percentile(taken, 0.5),
            "p99_ms": percentile(taken, 0.99),
            **({"short_p99_ms": percentile(short, 0.99)} if short else {}),
            "failed": sum(status != 200 for status in result.statuses),
            "requests": len(taken),
            "generator_late_p99_ms": percentile(result.late_s, 0.99) * 1e3,
        }

    def overload(self, rate: float, seconds: float, bound_ms: float) -> tuple[Row, list[bytes], list[float]]:
        """What becomes of requests with a deadline, more than can be answered; and what was sent when."""
        arrivals = self._arrivals.times(rate, seconds, self._seed)
        encoded = self._timed([number % len(self._requests) for number in range(len(arrivals))], bound_ms)
        before, states = memory_of_all(self.server.pid), _state_bytes(self.server)
        result = generate(self._plan(encoded, arrivals))
        states = _state_bytes(self.server) - states
        taken = zip(result.statuses, _latencies(result), strict=True)
        refusals = [
            (done - sent) * 1e3
            for status, sent, done in zip(result.statuses, result.sent_s, result.done_s, strict=True)
            if status == REFUSED
        ] or [0.0]
        row: Row = {
            "offered_rate": rate,
            "good_rate": sum(status == 200 and ms <= bound_ms for status, ms in taken) / seconds,
            "answered": result.statuses.count(200),
            "refused": result.statuses.count(REFUSED),
            "late": result.statuses.count(LATE),
            "lost": len(arrivals) - sum(result.statuses.count(status) for status in (200, REFUSED, LATE)),
            "twice": len(result.index) - len(set(result.index)),
            "refusal_p50_ms": percentile(refusals, 0.5),
            "refusal_p99_ms": percentile(refusals, 0.99),
            "refusal_most_ms": max(refusals),
            "generator_late_p99_ms": percentile(result.late_s, 0.99) * 1e3,
            "generator_cpu_share": result.cpu_s / result.wall_s,
            "memory_growth_mib": (memory_of_all(self.server.pid) - before) / MIB,
            "states_growth_mib": states / MIB,
        }
        return row, encoded, arrivals

    def _timed(self, numbers: Sequence[int], bound_ms: float) -> list[bytes]:
        """Those requests, with a deadline."""
        return [self.contestant.encode(replace(self._requests[one], timeout_ms=bound_ms)) for one in numbers]

    def _plan(self, requests: list[bytes], arrivals: list[float], connections: int = CONNECTIONS) -> LoadPlan:
        return LoadPlan(self.server.host, self.server.port, requests, arrivals_s=arrivals, connections=connections)


def _state_bytes(server: ServerProcess) -> float:
    """Memory of users' states, which grows up to its budget as users come."""
    return server.counter("rankd_state_bytes") if isinstance(server, ServedModel) else 0.0


def _latencies(result: LoadResult) -> list[float]:
    """Milliseconds from the scheduled time."""
    return [
        (done - planned) * 1e3 if status == 200 else ANSWER_TIMEOUT_S * 1e3
        for status, planned, done in zip(result.statuses, result.scheduled_s, result.done_s, strict=True)
    ]
