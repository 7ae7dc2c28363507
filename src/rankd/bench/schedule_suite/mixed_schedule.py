"""`rankd bench schedule --simulate` with executors of two kinds: the schedule beside a threshold between them.

In: a workload that declares two kinds, or a mix of targets that is measured here. Out: a Report. The same requests go,
in made-up time and as quickly as is asked, through

    rankd, mixed        both kinds under `schedule.mixed_policy`
    best threshold      requests of up to t candidates go to the one kind, larger ones to the other, first come first
                        served in each, lists cut as is cheapest: what DeepRecSys does. t is the best of all distinct
                        sizes, either way around, found by a sweep anew for every rate
    rankd, <kind>       that kind alone

Each one's highest rate is that whose p99 stays under `bound_ms`; latencies are compared at shares of the threshold's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rankd.bench.report import Report, Row, commit, machine
from rankd.bench.schedule_suite.queue_kernels import threshold_latencies
from rankd.bench.schedule_suite.simulated_schedule import (
    STEPS,
    SimulationOptions,
    arrivals_of,
    build_with_buckets,
    costs_of,
    figures,
    fine_buckets,
    highest_rate,
    most_requests,
    through_rankd,
)
from rankd.bench.workload import DeclaredExecutors, Workload, largest
from rankd.engine.backend import EngineConfig
from rankd.engine.mixed_targets import parts_of
from rankd.errors import ConfigError
from rankd.ranker import Ranker
from rankd.schedule.costs import Warmed
from rankd.schedule.kinds import Mix
from rankd.schedule.packing import SIZES
from rankd.schedule.policy import Rules
from rankd.schedule.schedule_config import ScheduleConfig, make_rules
from rankd.schedule.simulation import Arrival
from rankd.types import Array

SHARES = (0.3, 0.5, 0.7, 0.85, 0.95)
"""Of the threshold's highest rate: where latencies are compared."""
CLEARLY = 1.002
"""A threshold is looked at more closely only if it keeps the bound at so many times the best rate so far."""


def run_mixed(
    workload: Workload, mix: tuple[str, ...], options: SimulationOptions, advance: Callable[[int, int, str], None]
) -> Report:
    """Run the suite, with the mix of targets measured here or, if that is empty, with the kinds that are declared.

    Raises:
        ConfigError: not two kinds.
        MissingExtra: torch is not installed, and calls have to be measured.
    """
    surroundings = machine()
    advance(0, 3, "costs")
    kinds = _measured(workload, mix) if mix else [declared_rules(workload, one) for one in workload.executors]
    if len(kinds) != 2:
        raise ConfigError(f"a threshold is between two kinds of executors, and {len(kinds)} are given: name two")
    prepare_ms = [(rules.costs.prepare(True), rules.costs.warmed.most_encode_ms) for rules in kinds]
    most = 1.1 * sum(most_requests(workload, rules) for rules in kinds)
    at = same_at_rates(arrivals_of(workload, prepare_ms, options, most / 2), most / 2)
    advance(1, 3, "thresholds")
    sweep = ThresholdSweep(kinds, at)
    best, found = sweep.highest_rate(options.bound_ms, most)
    results: list[Row] = [{"contestant": "best threshold", "table": "highest rates", "rate": best} | found.about(kinds)]
    advance(2, 3, "schedules")
    contestants: dict[str, Rules | Mix] = {"rankd, mixed": Mix(kinds)}
    contestants |= {f"rankd, {rules.name}": rules for rules in kinds}
    highest = {}
    for name, rules in contestants.items():
        number = None if isinstance(rules, Mix) else kinds.index(rules)
        schedule = partial(_rankd, rules, number)
        highest[name] = highest_rate(schedule, at, most, options.bound_ms)
        results.append({"contestant": name, "table": "highest rates", "rate": highest[name]})
    gains = []
    for share in SHARES:
        arrivals = at(share * best)
        load = sweep.load(arrivals)
        threshold = load.best()
        about: Row = {"table": f"at {share:.0%} of the threshold's highest rate", "share": share, "rate": share * best}
        latencies = load.latencies(threshold).tolist()
        theirs = about | figures(arrivals, latencies, 0.0, options.bound_ms) | threshold.about(kinds)
        ours = about | figures(arrivals, *_rankd(Mix(kinds), None, arrivals), options.bound_ms)
        results += [{"contestant": "best threshold"} | theirs, {"contestant": "rankd, mixed"} | ours]
        gains.append((share, theirs["p99_ms"] / ours["p99_ms"], theirs["p50_ms"] / ours["p50_ms"]))
    advance(3, 3, "done")
    ratios = {
        "mixed_vs_best_threshold": highest["rankd, mixed"] / best,
        "mixed_vs_best_alone": highest["rankd, mixed"] / max(highest[f"rankd, {rules.name}"] for rules in kinds),
    }
    for share, p99, p50 in gains:
        ratios |= {f"mixed_p99_vs_best_threshold_{share:.0%}": p99, f"mixed_p50_vs_best_threshold_{share:.0%}": p50}
    return Report("schedule", _about(workload, kinds, options), surroundings, commit(), {}, results, ratios)


def same_at_rates(arrivals: Sequence[Arrival], rate: float) -> Callable[[float], list[Arrival]]:
    """The requests that come at a rate, at any other: what differs is how quickly they come, so that rates of
    contestants differ by nothing else."""

    def at(other: float) -> list[Arrival]:
        return [replace(one, at=one.at * rate / other) for one in arrivals]

    return at


@dataclass(frozen=True, slots=True)
class Threshold:
    """Requests of up to `rows` candidates go to the kind `small`, the others to the other one."""

    small: int
    rows: int

    def about(self, kinds: Sequence[Rules]) -> Row:
        """For a report."""
        return {"threshold_rows": self.rows, "up_to_it": kinds[self.small].name}


class ThresholdSweep:
    """All thresholds between two kinds. A request is a sequence of calls of one executor."""

    def __init__(self, kinds: Sequence[Rules], arrivals_at: Callable[[float], list[Arrival]]) -> None:
        self._kinds, self._at = kinds, arrivals_at
        self._score_ms: list[dict[int, float]] = [{} for _ in kinds]

    def highest_rate(self, bound_ms: float, most: float) -> tuple[float, Threshold]:
        """The highest rate that any threshold does within the bound, and which one that is."""
        sample = self.load(self._at(most / 4))
        limits = {one: sample.limit(one) for one in sample.thresholds()}
        loads = lru_cache(maxsize=4)(lambda rate: self.load(self._at(rate)))
        best, found = 0.0, next(iter(limits))
        for threshold in sorted(limits, key=limits.__getitem__, reverse=True):
            low, high = best, min(limits[threshold] * 1.1, most)
            if high <= best or (best and loads(best * CLEARLY).p99_ms(threshold) > bound_ms):
                continue
            for _ in range(STEPS):
                rate = (low + high) / 2
                if loads(rate).p99_ms(threshold) <= bound_ms:
                    low, best, found = rate, rate, threshold
                else:
                    high = rate
        return best, found

    def load(self, arrivals: Sequence[Arrival]) -> ThresholdLoad:
        """The same arrivals for all thresholds."""
        takes_ms = [[one.prepare_ms[kind] + self._score(kind, one.rows) for one in arrivals] for kind in (0, 1)]
        return ThresholdLoad(arrivals, takes_ms, [rules.num_executors for rules in self._kinds])

    def _score(self, kind: int, rows: int) -> float:
        known, rules = self._score_ms[kind], self._kinds[kind]
        if rows not in known:
            pieces = rules.cutter.pieces(rows, rules.cutter.buckets[-1])
            known[rows] = rules.costs.calls(pieces) + rules.costs.rows(rows)
        return known[rows]


class ThresholdLoad:
    """Arrivals, and what each takes on each kind of executors, of which there are `executors`."""

    def __init__(
        self, arrivals: Sequence[Arrival], takes_ms: Sequence[Sequence[float]], executors: Sequence[int]
    ) -> None:
        self._executors = executors
        self._at, self._takes_s = np.asarray([one.at for one in arrivals]), np.asarray(takes_ms) / 1e3
        self._rows = np.asarray([one.rows for one in arrivals], np.int64)

    def thresholds(self) -> list[Threshold]:
        """All that differ."""
        sizes = [0, *np.unique(self._rows).tolist()]
        return [Threshold(small, rows) for rows in sizes for small in (0, 1)]

    def best(self) -> Threshold:
        """The one with the lowest p99."""
        rate = len(self._at) / max(self._at[-1], 1e-3)
        possible = [one for one in self.thresholds() if self.limit(one) > 0.95 * rate]
        return min(possible or self.thresholds(), key=self.p99_ms)

    def p99_ms(self, threshold: Threshold) -> float:
        """Of all requests."""
        return float(np.quantile(self.latencies(threshold), 0.99))

    def latencies(self, threshold: Threshold) -> Array:
        """Milliseconds of each request."""
        free = np.full((2, max(self._executors)), np.inf)
        for line, count in zip(free, self._executors, strict=True):
            line[:count] = 0.0
        taken_s = np.empty_like(self._at)
        threshold_latencies(self._at, self._rows, self._takes_s, threshold.rows, threshold.small, free, taken_s)
        return taken_s * 1e3

    def limit(self, threshold: Threshold) -> float:
        """Requests a second with which the busier kind has no idle moment."""
        small = self._rows <= threshold.rows
        of_kind = (small, ~small) if threshold.small == 0 else (~small, small)
        busy_s = [
            float(takes[here].sum()) / count
            for takes, here, count in zip(self._takes_s, of_kind, self._executors, strict=True)
        ]
        return len(self._at) / max(*busy_s, 1e-9)


def _rankd(rules: Rules | Mix, kind: int | None, arrivals: Sequence[Arrival]) -> tuple[list[float], float]:
    """Both kinds, or the one of that number alone: latencies, and padded rows over real ones."""
    if kind is not None:
        arrivals = [replace(one, prepare_ms=(one.prepare_ms[kind],)) for one in arrivals]
    return through_rankd(arrivals, rules)


def declared_rules(workload: Workload, executors: DeclaredExecutors) -> Rules:
    """Rules over the buckets of the suite, with the costs that a workload declares."""
    buckets = fine_buckets(largest(workload.candidates))
    users = [count for count in SIZES if count <= executors.most_users]
    score_ms = {
        (bucket, count): executors.call_ms + executors.row_ms * bucket * count for bucket in buckets for count in users
    }
    warmed = Warmed(score_ms, {workload.block_tokens: executors.encode_ms} if executors.encode_ms else {})
    rules = make_rules(ScheduleConfig(), buckets, warmed, lambda _: users[-1], executors.count)
    return replace(rules, name=executors.name)


def _measured(workload: Workload, mix: tuple[str, ...]) -> list[Rules]:
    """Rules with what the workload's model takes on this machine, on each target of a mix."""
    buckets, engine = fine_buckets(largest(workload.candidates)), EngineConfig(mix=mix)
    targets = tuple(part.target for part in parts_of(engine))
    with TemporaryDirectory(prefix="rankd-bench-") as folder:
        path = build_with_buckets(workload, Path(folder), buckets, targets)
        with Ranker.load(path, engine) as ranker:
            kinds = ranker.schedule.all_rules.kinds
            most = [{bucket: rules.most_users(bucket) for bucket in buckets} for rules in kinds]
    made = []
    for rules, users in zip(kinds, most, strict=True):
        warmed, count = rules.costs.warmed, rules.num_executors
        anew = make_rules(ScheduleConfig(), buckets, warmed, users.__getitem__, count)
        made.append(replace(anew, name=rules.name))
    return made


def _about(workload: Workload, kinds: Sequence[Rules], options: SimulationOptions) -> dict[str, Any]:
    flops = workload.flops()
    return {
        "name": workload.name,
        "use": workload.use,
        "flops": {name: getattr(flops, name) for name in flops.__struct_fields__},
        "runs": 1,
        "arrivals": options.arrivals.name,
        "bound_ms": options.bound_ms,
        "executors": {
            rules.name: {
                "count": rules.num_executors,
                **costs_of(rules.costs.warmed),
            }
            for rules in kinds
        },
    }
