"""What is said of sharded inference (arXiv 2011.02084 and those who built it), each confirmed or refuted by a figure.

In: measured layouts, overheads by size of requests, and the simulator's word where this machine cannot say. Out: rows
of the report, each a ratio and a verdict. Below 1 the direction holds, unless the row says otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from rankd.bench.report import Row
from rankd.bench.shard_suite.layout_prediction import Costs, simulated_ms
from rankd.bench.shard_suite.layouts import LIMITS, Layout, layout_name
from rankd.bench.shard_suite.open_loop import Offered
from rankd.plan.request_work import request_work
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import Strategy
from rankd.plan.table_statistics import TableLoad

TABLE = "hypotheses"
CLOSE = 0.05
"""Two that differ by no more are close."""
BALANCED = (Strategy.CAPACITY_BALANCED, Strategy.LOAD_BALANCED)
MADE_UP_NETS = ("first half", "second half")


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured: layouts, singular first; and by the samples of a request that comes alone, its latency in the
    best sharded layout over singular's. `loads`, `costs` and `rounds` are what the simulator needs."""

    layouts: Sequence[Layout]
    overhead_by_samples: Mapping[int, float]
    loads: Sequence[TableLoad]
    costs: Costs
    rounds: Sequence[Offered]

    def figure(self, name: str, wanted: str) -> float | None:
        """The median of a figure of the layout of that name; None if it was not measured."""
        for layout in self.layouts:
            if wanted in layout.names:
                return statistics.median(one[name] for one in layout.rounds)
        return None

    def apart_ms(self, strategy: Strategy, num_shards: int) -> float:
        """p99 with a server for each shard, simulated."""
        plan = make_plan(strategy, self.loads, num_shards, LIMITS)
        return simulated_ms(plan, self.loads, self.costs.apart, self.rounds)["p99_ms"]


def all_hypotheses(found: Findings, numbers: Sequence[int]) -> list[Row]:
    """A row for each that the measured layouts can say something of."""
    rows = _one_shard(found, numbers) + _calls(found.loads, found.costs, max(numbers))
    if len(numbers) > 1:
        rows += _more_shards(found, min(numbers), max(numbers))
    rows += _balanced(found, numbers)
    if len(found.overhead_by_samples) > 1:
        rows += _larger_batches(found)
    return rows


def _one_shard(found: Findings, numbers: Sequence[int]) -> list[Row]:
    """The other layouts' p99 over one shard's: the largest of them, all with all tables on shards."""
    one = found.figure("p99_ms", Strategy.ONE_SHARD.value)
    others = [
        statistics.median(figures["p99_ms"] for figures in layout.rounds)
        for layout in found.layouts[1:]
        if not layout.plan.replicated and Strategy.ONE_SHARD.value not in layout.names
    ]
    several = [number for number in numbers if number > 1]
    if one is None or not others or not several:
        return []
    alone = found.apart_ms(Strategy.ONE_SHARD, 1)
    apart = max(found.apart_ms(strategy, number) for strategy in BALANCED for number in several)
    return [
        _below("one shard is the worst: the worst other p99 over its", max(others) / one),
        _below("the same, simulated with a server a shard", apart / alone),
    ]


def _more_shards(found: Findings, few: int, many: int) -> list[Row]:
    """p99 and CPU of load-balanced on many shards over those on few."""
    rows = []
    names = [layout_name(Strategy.LOAD_BALANCED, number) for number in (many, few)]
    p99 = [found.figure("p99_ms", name) for name in names]
    cpu = [[found.figure(side, name) for side in ("server_cpu_ms", "shards_cpu_ms")] for name in names]
    title = f"{many} shards over {few}"
    if p99[0] is not None and p99[1] is not None:
        rows.append(_below(f"more shards, less latency: p99 of {title}", p99[0] / p99[1]))
    apart = found.apart_ms(Strategy.LOAD_BALANCED, many) / found.apart_ms(Strategy.LOAD_BALANCED, few)
    rows.append(_below(f"the same, simulated with a server a shard: {title}", apart))
    sums = [sum(one for one in both if one is not None) for both in cpu]
    if all(sums):
        rows.append(_row(f"more shards, more compute (above 1): CPU of {title}", sums[0] / sums[1], sums[0] > sums[1]))
    return rows


def _calls(loads: Sequence[TableLoad], costs: Costs, num_shards: int) -> list[Row]:
    """Calls of a request in net-aware over the fewest of the others, with the tables in two nets, half and half: which
    belong together is not published."""
    if num_shards < len(MADE_UP_NETS) or len(loads) < len(MADE_UP_NETS):
        return []
    half = len(loads) // 2
    two_nets = [replace(load, net=MADE_UP_NETS[place >= half]) for place, load in enumerate(loads)]
    calls = {
        strategy: len(request_work(make_plan(strategy, two_nets, num_shards, LIMITS), two_nets, costs.here).calls)
        for strategy in (Strategy.NET_AWARE, *BALANCED)
    }
    ratio = calls[Strategy.NET_AWARE] / min(calls[strategy] for strategy in BALANCED)
    title = f"net-aware makes the fewest calls: over the others, two nets on {num_shards} shards"
    return [_below(title, ratio)]


def _balanced(found: Findings, numbers: Sequence[int]) -> list[Row]:
    """p99 of load-balanced over capacity-balanced, where the two are different plans."""
    rows = []
    for number in numbers:
        names = [layout_name(strategy, number) for strategy in BALANCED]
        if any(set(names) <= set(layout.names) for layout in found.layouts):
            continue
        capacity, load = (found.figure("p99_ms", name) for name in names)
        if capacity is not None and load is not None:
            title = (
                f"by bytes and by look-ups come out close (within {CLOSE:.0%}): p99 of look-ups over bytes on {number}"
            )
            rows.append(_row(title, load / capacity, abs(load / capacity - 1) <= CLOSE))
    return rows


def _larger_batches(found: Findings) -> list[Row]:
    """What sharding adds to a large request over what it adds to a small one."""
    small, large = min(found.overhead_by_samples), max(found.overhead_by_samples)
    ratio = found.overhead_by_samples[large] / found.overhead_by_samples[small]
    title = f"larger batches favour sharding: latency over singular's with {large} candidates over that with {small}"
    best = min(found.layouts[1:], key=lambda one: statistics.median(figures["p99_ms"] for figures in one.rounds))
    apart = [_overhead_apart(found, best, samples) for samples in (large, small)]
    return [_below(title, ratio), _below("the same, simulated with a server a shard", apart[0] / apart[1])]


def _overhead_apart(found: Findings, layout: Layout, samples: int) -> float:
    """p50 over singular's, all requests of so many samples, one at a time."""
    costs = msgspec.structs.replace(found.costs.apart, samples=(samples,))
    alone = [Offered([], [samples], [float(second) for second in range(10)])]
    sharded, singular = (
        simulated_ms(one.plan, found.loads, costs, alone)["p50_ms"] for one in (layout, found.layouts[0])
    )
    return sharded / singular


def _below(title: str, ratio: float) -> Row:
    return _row(title, ratio, ratio < 1)


def _row(title: str, ratio: float, holds: bool) -> Row:
    return {"contestant": title, "table": TABLE, "ratio": ratio, "verdict": "confirmed" if holds else "refuted"}
