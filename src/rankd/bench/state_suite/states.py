"""Suite `states`: how much memory the user states need, and what less of it costs.

A trace of visits is replayed twice. Without computing anything, at several byte budgets and with every policy: hit
rates of the whole trace. With the engine, at the same budgets: latencies, one after the other in one process, of a
sample of the users with a like share of the memory, so that hits and misses come as in the whole (spatial sampling:
Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST 2015). The real cache and its rules are used both
times. Out: rows, ratios, and a picture if asked for.
"""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from rankd.artifact import Artifact
from rankd.bench.parity import BOUNDS, max_difference
from rankd.bench.report import Neighbours, Report, Row, commit, machine, percentiles
from rankd.bench.serve_suite.serving import Advance
from rankd.bench.state_suite.traces import Visit, log_trace, zipf_trace
from rankd.bench.synthetic_model import model_for, users_for
from rankd.bench.workload import Workload, draw
from rankd.engine.backend import EngineConfig, InThisProcess, Precision, StateType
from rankd.engine.openvino_backend import why_not
from rankd.engine.state_arrays import APPEND_BUCKETS, empty_state
from rankd.engine.targets import choose_target
from rankd.errors import EngineFailure
from rankd.features.assembly import history_arrays, until
from rankd.features.catalogue import Catalogue
from rankd.features.reading.stored_events import empty_history
from rankd.features.reading.version_features import features_in_memory
from rankd.observe.state_metrics import StateCounts
from rankd.ranker import Ranker
from rankd.states.cache import StateCache
from rankd.states.lending import Origin
from rankd.states.state_config import MIB, Policy, StateConfig, Storage
from rankd.states.storage import StateLayout
from rankd.types import Array, Float32Array, RankRequest, UserState

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Budgets, as shares of what the states of all users of the trace take."""
CHECKED = 100
BLOCK = 40


@dataclass(frozen=True, slots=True)
class StatesOptions:
    """`trace`: "zipf", or a log file that `describe` describes; `visits` of a Zipf trace; about `requests` are computed
    at each budget, of which the second half is timed."""

    trace: str = "zipf"
    describe: str = ""
    visits: int = 20_000
    requests: int = 1200
    storage: Storage = Storage.AUTO


@dataclass(frozen=True, slots=True)
class Subject:
    """What is replayed: a model version and its visits."""

    artifact: Artifact
    catalogue: Catalogue
    visits: list[Visit]
    precision: Precision
    storage: Storage

    @property
    def layout(self) -> StateLayout:
        """How the states lie in memory."""
        own = StateType.BF16 if self.precision is Precision.BF16 else StateType.FP32
        return StateLayout(self.artifact.manifest.state, own, self.storage)


def run_states(workload: Workload, options: StatesOptions, advance: Advance) -> Report:
    """Run the suite.

    Raises:
        MissingExtra: torch is needed for the model or the log, and is not installed.
        ConfigError, DataError: the log cannot be read.
        EngineFailure: scores with states differ from scores without.
    """
    steps = 3 + 2 * len(SHARES)
    advance(0, steps, "model and trace")
    surroundings, neighbours = machine(), Neighbours()
    with tempfile.TemporaryDirectory(prefix="rankd-bench-") as folder:
        subject = _subject(workload, options, Path(folder) / "built")
        everything = replay(subject, Policy.LRU, None)
        smallest = max(subject.layout.size_bytes(room) for room in subject.artifact.schema.history_buckets)
        budgets = sorted({max(int(everything.used_bytes * share), smallest) for share in SHARES})
        rows: list[Row] = []
        for number, budget in enumerate(budgets):
            advance(1 + number, steps, f"hit rates with {budget / MIB:.0f} MiB")
            rows += [_hit_row(policy, budget, replay(subject, policy, budget)) for policy in Policy]
        visits, share = sample(subject.visits, options.requests)
        calls = list(zip(visits, _requests(workload, subject, visits), strict=True))
        middle = budgets[len(budgets) // 2] / MIB
        contestants = [
            Contestant("no states", 0.0, ""),
            *(Contestant(f"states, {budget / MIB:.0f} MiB", budget / MIB, "") for budget in budgets),
            Contestant(f"disk too, {middle:.0f} MiB", middle, str(Path(folder) / "spill")),
        ]

        def step(part: float) -> None:
            advance(1 + len(SHARES) + int(part * (1 + len(SHARES))), steps, "latencies")

        timed_rows, parity = timed(subject, calls, contestants, share, step)
        rows += timed_rows
    surroundings["others_cpu_share"] = neighbours.share()
    advance(steps, steps, "done")
    return Report(
        suite="states",
        workload=_about(workload, options, subject, everything),
        machine=surroundings,
        commit=commit(),
        parity=parity,
        results=rows,
        ratios=_ratios(rows),
    )


def replay(subject: Subject, policy: Policy, budget_bytes: int | None) -> StateCounts:
    """The whole trace against a cache of the given budget (None: room for all), with nothing computed."""
    schema, layout = subject.artifact.schema, subject.layout
    if budget_bytes is None:
        users = len({visit.user_id for visit in subject.visits})
        spare = len(schema.history_buckets) + 1  # a state that grows into a larger room has two for a moment
        budget_bytes = (users + spare) * max(layout.size_bytes(room) for room in schema.history_buckets)
    config = StateConfig(policy=policy, storage=subject.storage)
    extends = subject.artifact.manifest.extends
    cache = StateCache(layout, schema.history_buckets, extends, config, None, budget_bytes)
    features, executor = features_in_memory(schema, subject.catalogue), _ComputesNothing(subject)
    items = features.items
    for visit in subject.visits:
        history = until(features.stored_history(visit.user_id) or empty_history(schema), visit.time)
        with cache.held(visit.user_id, history, lambda h=history: history_arrays(schema, items, h), executor):  # type: ignore[misc]
            pass
        if visit.events:
            features.append(visit.user_id, visit.events)
    return cache.counts()


class _ComputesNothing(InThisProcess):
    """An executor for questions of which and not of what: its states stay as they are."""

    def __init__(self, subject: Subject) -> None:
        state_type = subject.layout.state_type
        self._added = {room: empty_state(subject.artifact.manifest.state, room, state_type) for room in APPEND_BUCKETS}
        rooms = subject.artifact.schema.history_buckets
        self._whole = {room: empty_state(subject.artifact.manifest.state, room, state_type) for room in rooms}

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """Some state of that size."""
        return into if into is not None else self._whole[history["history_item"].shape[2]]

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        """Some additions of that size."""
        return self._added[new["history_item"].shape[2]]

    def score(self, states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        """Nobody asks."""
        raise NotImplementedError


def sample(visits: Sequence[Visit], wanted: int) -> tuple[list[Visit], float]:
    """The visits of a share of the users, chosen by a hash of their ids, about `wanted` in all; and that share."""
    share = min(wanted / len(visits), 1.0)
    bound = int(share * 2**32)
    kept = [visit for visit in visits if crc32(visit.user_id.encode()) < bound]
    return kept, share


@dataclass(frozen=True, slots=True)
class Contestant:
    """A way of keeping states: `budget_mib` for all users, of which a sample gets its share; a folder to spill to."""

    name: str
    budget_mib: float
    spill: str


@dataclass(slots=True)
class _Lane:
    """A contestant's ranker, and what it did."""

    contestant: Contestant
    ranker: Ranker
    origins: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    scores: list[Float32Array] = field(default_factory=list)

    def visit(self, visit: Visit, request: RankRequest) -> None:
        """One request and what follows it."""
        started = time.perf_counter()
        answer = self.ranker.rank(request)
        self.latencies.append((time.perf_counter() - started) * 1e3)
        self.origins.append(answer.state)
        if len(self.scores) < CHECKED:
            self.scores.append(answer.scores)
        if visit.events:
            self.ranker.append_events(visit.user_id, visit.events)


def timed(
    subject: Subject,
    calls: Sequence[tuple[Visit, RankRequest]],
    contestants: Sequence[Contestant],
    share: float,
    step: Callable[[float], None],
) -> tuple[list[Row], dict[str, float]]:
    """All contestants over the same visits, a block of them each in turn: rows of the second half, and parity.

    Raises:
        EngineFailure: scores with states differ from scores without (the first contestant's).
    """
    engine = EngineConfig(precision=subject.precision, executors=1)
    with ExitStack() as stack:
        lanes = []
        for one in contestants:
            config = StateConfig(budget_mib=math.ceil(one.budget_mib * share), storage=subject.storage, spill=one.spill)
            ranker = stack.enter_context(Ranker.load(subject.artifact.path, engine, states=config))
            lanes.append(_Lane(one, ranker))
        gc.collect()
        for start in range(0, len(calls), BLOCK):
            step(start / len(calls))
            for lane in lanes:
                for visit, request in calls[start : start + BLOCK]:
                    lane.visit(visit, request)
    first = lanes[0].scores
    parity = {lane.contestant.name: _check(lane.scores, first, subject.precision) for lane in lanes[1:]}
    return [_timed_row(lane, calls) for lane in lanes], parity


def _timed_row(lane: _Lane, calls: Sequence[tuple[Visit, RankRequest]]) -> Row:
    half = len(calls) // 2
    latencies, origins = lane.latencies[half:], lane.origins[half:]
    by_origin: dict[str, list[float]] = {}
    for origin, ms in zip(origins, latencies, strict=True):
        by_origin.setdefault(origin, []).append(ms)
    row: Row = {
        "contestant": lane.contestant.name,
        "table": "latency, one request after the other, a sample of the users",
        "budget_mib": lane.contestant.budget_mib,
        "hit_rate": 1.0 - origins.count(Origin.ENCODED.value) / len(origins),
        **percentiles(latencies),
        "mean_ms": statistics.fmean(latencies),
        "throughput": sum(len(request.candidates) for _, request in calls[half:]) / (sum(latencies) / 1e3),
    }
    return row | {f"{origin}_p50_ms": statistics.median(ms) for origin, ms in sorted(by_origin.items())}


def _subject(workload: Workload, options: StatesOptions, folder: Path) -> Subject:
    precision = Precision.FP32 if why_not(Precision.BF16) else Precision.BF16
    _, path = model_for(workload, folder, precision)
    artifact = Artifact.open(path)
    catalogue = Catalogue.load(artifact.path / "tables", artifact.schema)
    items = catalogue.ids.items
    if options.trace == "zipf":
        users = users_for(catalogue, workload)
        visits = zipf_trace(workload, artifact.schema, users, items, options.visits)
    else:
        visits = log_trace(Path(options.trace), options.describe, artifact.schema, items)
    return Subject(artifact, catalogue, visits, precision, options.storage)


def _requests(workload: Workload, subject: Subject, visits: Sequence[Visit]) -> list[RankRequest]:
    """The requests of visits, with as many candidates as the workload says."""
    random = np.random.default_rng(workload.seed)
    sizes = draw(workload.candidates, random, len(visits)).tolist()
    items = subject.catalogue.ids.items
    picked = [random.choice(len(items), size, replace=False).tolist() for size in sizes]
    return [
        RankRequest(visit.user_id, tuple(items[item] for item in chosen), time=visit.time)
        for visit, chosen in zip(visits, picked, strict=True)
    ]


def _hit_row(policy: Policy, budget: int, counts: StateCounts) -> Row:
    total = sum(counts.origins.values())
    return {
        "contestant": f"{policy.value}, {budget / MIB:.0f} MiB",
        "table": "hit rates of the whole trace",
        "policy": policy.value,
        "budget_mib": budget / MIB,
        "users": counts.users,
        "hit_rate": counts.hit_rate,
        **{origin.value: counts.origins[origin.value] / total for origin in Origin},
        "evicted": counts.evicted,
    }


def _check(scores: Sequence[Float32Array], expected: Sequence[Float32Array], precision: Precision) -> float:
    worst = max_difference(expected, scores)
    if not worst <= BOUNDS[precision.value]:
        raise EngineFailure(f"scores with states differ by {worst:.3g} from scores without; nothing is reported")
    return worst


def _about(workload: Workload, options: StatesOptions, subject: Subject, everything: StateCounts) -> dict[str, Any]:
    schema, layout = subject.artifact.schema, subject.layout
    largest = layout.size_bytes(schema.history_buckets[-1])
    users = len({visit.user_id for visit in subject.visits})
    flops = workload.flops()
    return {
        "name": workload.name,
        "use": workload.use,
        "runs": 1,
        "trace": options.trace,
        "flops": {"needed": flops.needed, "candidates": flops.candidates},
        "served": {
            "target": choose_target(subject.artifact, EngineConfig(precision=subject.precision)),
            "precision": subject.precision.value,
            "storage": layout.storage.value,
            "visits": len(subject.visits),
            "users": users,
            "returning": 1.0 - users / len(subject.visits),
            "state_bytes": largest,
            "states_per_gib": (1 << 30) // largest,
            "all_states_mib": everything.used_bytes / MIB,
        },
    }


def _ratios(rows: Sequence[Row]) -> dict[str, float]:
    """How the policies compare over all budgets, and what all the memory gains over none."""
    hits = {p: [row["hit_rate"] for row in rows if row.get("policy") == p.value] for p in Policy}
    timed_rows = [row for row in rows if "mean_ms" in row and not row["contestant"].startswith("disk too")]
    return {
        "segmented_over_lru_hits": statistics.fmean(hits[Policy.SEGMENTED_LRU]) / statistics.fmean(hits[Policy.LRU]),
        "latency_gain": timed_rows[0]["mean_ms"] / timed_rows[-1]["mean_ms"],
    }


def draw_picture(report: Report, path: Path) -> None:
    """Hit rate and latency against memory, as a PNG or SVG.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    from rankd.picture import new_picture

    figure, (left, right) = new_picture(path, 2)
    for policy in Policy:
        rows = [row for row in report.results if row.get("policy") == policy.value]
        left.plot([r["budget_mib"] for r in rows], [r["hit_rate"] for r in rows], marker="o", label=policy.value)
    left.set(xscale="log", xlabel="memory for states, MiB", ylabel="hit rate", ylim=(0, 1))
    rows = [row for row in report.results if row["contestant"].startswith("states, ")]
    without = next(row for row in report.results if row["contestant"] == "no states")
    for figure_name in ("p50_ms", "p99_ms", "mean_ms"):
        (line,) = right.plot(
            [r["budget_mib"] for r in rows], [r[figure_name] for r in rows], marker="o", label=figure_name
        )
        right.axhline(without[figure_name], color=line.get_color(), linestyle=":", linewidth=1)
    right.set(xscale="log", xlabel="memory for states, MiB (dotted: no states)", ylabel="latency, ms", ylim=(0, None))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    served = report.workload["served"]
    figure.suptitle(
        f"workload {report.workload['name']}, {served['precision']}: {served['users']:,} users, "
        f"{served['visits']:,} visits, {served['state_bytes'] / MIB:.2f} MiB a state at most"
    )
    figure.savefig(path, dpi=120)
