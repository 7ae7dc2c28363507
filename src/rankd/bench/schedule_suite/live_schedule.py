"""`rankd bench schedule`: the schedule on real sockets, beside first come, first served, and beside general servers.

In: a workload. Out: a Report. One contestant (`live_contestants.py`) runs at a time, all in turn in every round, around
the same weights on OpenVINO; a generator in a process of its own sends all of them the same requests at the same times.

    highest rates    of each, such that its p99 stays under `bound_ms`; errors count as misses
    at SHARES        of rankd's highest rate: latencies of everybody
    twice it         rankd alone, with that deadline in each request
    left out         peers that did not start, or answered nothing: the others are measured all the same
    the generator    the same requests at the same times against a server that does nothing
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankd.bench.arrivals import POISSON, Arrivals
from rankd.bench.null_server import generator_alone
from rankd.bench.parity import against_torch, scores_in_process
from rankd.bench.peers.peer_process import Peer
from rankd.bench.report import Neighbours, Report, Row, commit, machine, medians
from rankd.bench.schedule_suite.live_contestants import (
    DEADLINES,
    OURS,
    PADDED,
    QUEUE,
    RANKD,
    Contestant,
    Launch,
    ours,
    peer_contestant,
)
from rankd.bench.schedule_suite.live_load import CONNECTIONS, FEWEST, LoadedServer, Promise
from rankd.bench.schedule_suite.simulated_schedule import build_with_buckets, fine_buckets
from rankd.bench.served_model import ServedModel
from rankd.bench.synthetic_model import users_for
from rankd.bench.workload import Workload, draw_requests, largest
from rankd.errors import EngineFailure, Unavailable
from rankd.ranker import Ranker
from rankd.types import Float32Array, RankRequest

log = logging.getLogger("rankd")
CHECKED = 16
REQUESTS = 4000
SHARES = (0.4, 0.7, 0.9)
"""Of rankd's highest rate: where everybody's latencies are measured."""
AT = 0.7
"""The one of them that ratios are taken at."""
Step = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """`seconds` of a measurement at least, rounds, the p99 to keep, seconds at twice the highest rate, general servers
    to measure beside, when requests come, and the names of contestants around the same engine that are left out."""

    seconds: float = 10.0
    runs: int = 1
    bound_ms: float = 100.0
    overload_seconds: float = 60.0
    peers: tuple[Peer, ...] = ()
    arrivals: Arrivals = POISSON
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Subject:
    """The model with many buckets, what is asked of it, and what has to be answered."""

    fine: Path
    requests: Sequence[RankRequest]
    expected: Sequence[Float32Array]
    precision: str
    executors: int


class _Suite:
    """The measurements of one run, as they grow."""

    def __init__(self, workload: Workload, subject: Subject, options: LiveOptions) -> None:
        self._workload, self._subject, self._options = workload, subject, options
        self.parity: dict[str, float] = {}
        self.highest: dict[str, list[float]] = {}
        self.shares: dict[tuple[str, float], list[Row]] = {}
        self.tried: list[Row] = []
        self.capacities: list[Row] = []
        self.padding = 0.0
        self.left_out: dict[str, str] = {}
        self._chosen: dict[Launch, int] = {}

    def measure_peer(self, contestant: Contestant, number: int) -> None:
        """As `measure`; a peer that fails is left out, from here on and of the rounds before."""
        name = contestant.name
        if name in self.left_out:
            return
        try:
            self.measure(contestant, number)
        except (EngineFailure, Unavailable) as error:
            log.warning("%s is left out: %s", name, error)
            self.left_out[name] = str(error)
            self.highest.pop(name, None)
            self.parity.pop(name, None)

    def measure(self, contestant: Contestant, number: int) -> None:
        """One contestant's part of a round."""
        if contestant.launch not in self._chosen:
            self._chosen[contestant.launch] = self._choose(contestant)
        promise = Promise(self._options.bound_ms, self._options.seconds)
        with contestant.launch(self._chosen[contestant.launch]) as server:
            loaded = self._loaded(contestant, server, number)
            self.parity[contestant.name] = loaded.check(self._subject.expected, self._subject.precision)
            rate = loaded.highest(loaded.warm(), promise, self.tried)
            self.highest.setdefault(contestant.name, []).append(rate)
            for share in SHARES:
                row = loaded.offer(share * self.highest[RANKD][number], promise)
                self.shares.setdefault((contestant.name, share), []).append(row)
            if contestant.name == RANKD and isinstance(server, ServedModel):
                self.padding = _padding(server)

    def overload(self, contestant: Contestant) -> tuple[Row, Row]:
        """What becomes of requests at twice rankd's highest rate; and what the generator itself took of that."""
        rate = 2 * statistics.median(self.highest[RANKD])
        with contestant.launch(self._chosen[contestant.launch]) as server:
            loaded = self._loaded(contestant, server, 0)
            loaded.warm()
            row, encoded, arrivals = loaded.overload(rate, self._options.overload_seconds, self._options.bound_ms)
        return row, generator_alone(encoded, arrivals, CONNECTIONS)

    def _choose(self, contestant: Contestant) -> int:
        """Of a contestant's settings the one with the highest capacity."""
        if len(contestant.variants) == 1:
            return 0
        found = []
        for variant, name in enumerate(contestant.variants):
            with contestant.launch(variant) as server:
                found.append(self._loaded(contestant, server, 0).warm(FEWEST))
            self.capacities.append(
                {"contestant": contestant.name, "table": f"capacity, {name}", "requests_a_second": found[-1]}
            )
        return found.index(max(found))

    def _loaded(self, contestant: Contestant, server: Any, number: int) -> LoadedServer:
        seed = self._workload.seed + number
        return LoadedServer(contestant, server, self._subject.requests, self._options.arrivals, seed)


def run_live(workload: Workload, options: LiveOptions, advance: Step) -> Report:
    """Run the suite.

    Raises:
        MissingExtra: torch is not installed.
        EngineFailure: scores differ from those in process, or a contestant answers nothing.
        Unavailable: a contestant does not start.
    """
    surroundings = machine()
    steps, done = 2 + options.runs * (len(set(OURS) - set(options.without)) + len(options.peers)), 1
    with TemporaryDirectory(prefix="rankd-bench-") as folder:
        advance(0, steps, "models and parity")
        subject, parity, about = build_subject(workload, Path(folder), options)
        single = Path(folder) / "one"
        build_with_buckets(workload, single, (largest(workload.candidates),))
        own = [one for one in ours(subject.fine, single) if one.name not in options.without]
        version = subject.fine / workload.name / "1"
        peers = [peer_contestant(peer, version, subject.executors, subject.requests[0]) for peer in options.peers]
        suite, neighbours = _Suite(workload, subject, options), Neighbours()
        for number in range(options.runs):
            for contestant in (*own, *peers):
                advance(done, steps, f"{contestant.name}, round {number + 1}")
                (suite.measure_peer if contestant in peers else suite.measure)(contestant, number)
                done += 1
        advance(done, steps, "twice the highest rate")
        overload, generator = suite.overload(own[0])
        surroundings["others_cpu_share"] = neighbours.share()
        advance(steps, steps, "done")
    highest = {name: statistics.median(rates) for name, rates in suite.highest.items()}
    results = _rows(suite, highest)
    results.append({"contestant": RANKD, "table": "twice the highest rate", **overload})
    results.append({"contestant": "load generator", "table": "against a server that does nothing", **generator})
    ratios = _ratios(workload, suite, highest, options)
    ratios["goodput_at_2x"] = overload["good_rate"] / highest[RANKD]
    return Report("schedule", about, surroundings, commit(), parity | suite.parity, results, ratios)


def build_subject(
    workload: Workload, folder: Path, options: LiveOptions
) -> tuple[Subject, dict[str, float], dict[str, Any]]:
    """A workload's model in a folder; how far it is from torch; and what a report says of it.

    Raises:
        MissingExtra: torch is not installed. EngineFailure: it differs too much.
    """
    fine = folder / "fine"
    build_with_buckets(workload, fine, fine_buckets(largest(workload.candidates)))
    with Ranker.load(fine / workload.name / "1") as ranker:
        users = users_for(ranker.catalogue, workload)
        requests = draw_requests(workload, users, ranker.catalogue.ids.items, REQUESTS, ranker.manifest.name)
        expected = scores_in_process(ranker, requests[:CHECKED])
        parity = {"in-process": against_torch(ranker, requests[:CHECKED], expected)}
        flops, backend = workload.flops(), ranker.backend
        precision = backend.precision.value
        about = {
            "name": workload.name,
            "use": workload.use,
            "arrivals": options.arrivals.name,
            "bound_ms": options.bound_ms,
            "served": {
                "target": backend.target,
                "precision": precision,
                "executors": backend.num_executors,
                "buckets": len(ranker.schema.candidate_buckets),
            },
            "flops": {name: getattr(flops, name) for name in flops.__struct_fields__},
            "runs": options.runs,
        }
    return Subject(fine, requests, expected, precision, backend.num_executors), parity, about


def _rows(suite: _Suite, highest: Mapping[str, float]) -> list[Row]:
    rows: list[Row] = [{"contestant": name, "table": "highest rates", "rate": rate} for name, rate in highest.items()]
    rows += suite.capacities
    rows += [{"contestant": name, "table": "left out", "why": why} for name, why in suite.left_out.items()]
    for share in SHARES:
        for name in highest:
            figures = [{key: one[key] for key in one if key != "contestant"} for one in suite.shares[name, share]]
            row = {"contestant": name, "table": f"at {share:.0%} of rankd's highest rate", "share": share}
            rows.append(row | medians(figures))
    rows += [row | {"table": "every rate that was tried"} for row in suite.tried]
    return rows


def _ratios(workload: Workload, suite: _Suite, highest: Mapping[str, float], options: LiveOptions) -> dict[str, float]:
    """Of medians; `latency_gain_*` is of p99, of short requests where the workload has some."""

    def p99_of(name: str) -> float:
        rows = suite.shares[name, AT]
        return statistics.median(float(row["short_p99_ms" if "short_p99_ms" in row else "p99_ms"]) for row in rows)

    p99 = {name: p99_of(name) for name in highest}
    others = [name for name in highest if name not in {RANKD, DEADLINES}]
    groups = {"": others}
    groups |= {suffix: [name] for suffix, name in (("_padded", PADDED), ("_queue", QUEUE)) if name in highest}
    for suffix, states in (("_peers", False), ("_peers_with_states", True)):
        if names := [peer.name for peer in options.peers if peer.states is states and peer.name in highest]:
            groups[suffix] = names
    ratios = {}
    for suffix, names in groups.items() if others else ():
        best = max(highest[name] for name in names)
        ratios[f"throughput_gain{suffix}"] = highest[RANKD] / best
        if DEADLINES in highest:
            ratios[f"throughput_gain_with_deadlines{suffix}"] = highest[DEADLINES] / best
        ratios[f"latency_gain_{workload.name}{suffix}"] = min(p99[name] for name in names) / p99[RANKD]
    return ratios | {"padding_waste": suite.padding}


def _padding(server: ServedModel) -> float:
    rows = server.counter("rankd_schedule_rows_total")
    return server.counter("rankd_schedule_padded_rows_total") / max(rows, 1.0)
