"""Which strategy, and how many shards: all are planned and predicted, and the best is chosen with its reason.

In: tables, limits, a cost model. Out: a Choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rankd.errors import ConfigError
from rankd.plan.byte_sizes import show_bytes
from rankd.plan.cost_model import CostModel
from rankd.plan.prediction import Prediction, predict
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Plan, Strategy, show_shards
from rankd.plan.table_statistics import TableLoad

ALONE = (Strategy.SINGULAR, Strategy.ONE_SHARD)
"""Strategies that have no number of shards."""
ALIKE = 1.02
"""Of the lowest p99: so near predictions say nothing, and the cheaper plan is taken."""


@dataclass(frozen=True, slots=True)
class Option:
    """A plan and what is predicted of it."""

    plan: Plan
    prediction: Prediction

    @property
    def title(self) -> str:
        """ "load-balanced on 4 shards"."""
        if self.plan.strategy in ALONE:
            return self.plan.strategy.value
        return f"{self.plan.strategy.value} on {show_shards(len(self.plan.shards))}"

    @property
    def p99_ms(self) -> float:
        """Infinite if a server cannot keep up."""
        return math.inf if self.prediction.p99_ms is None else self.prediction.p99_ms


@dataclass(frozen=True, slots=True)
class Choice:
    """The best option and why, all options that fit, and of each strategy why others do not."""

    best: Option
    reason: str
    options: tuple[Option, ...]
    refused: tuple[str, ...]


def all_options(
    loads: Sequence[TableLoad],
    strategies: Iterable[Strategy],
    shards: Iterable[int],
    limits: MemoryLimits,
    costs: CostModel,
) -> tuple[list[Option], list[str]]:
    """Every strategy with every number of shards that fits, and of each that does not, its last refusal."""
    options: list[Option] = []
    refused: dict[Strategy, str] = {}
    numbers = list(shards)
    for strategy in strategies:
        for number in numbers[:1] if strategy in ALONE else numbers:
            try:
                plan = make_plan(strategy, loads, number, limits)
            except ConfigError as error:
                refused[strategy] = str(error)
                continue
            options.append(Option(plan, predict(plan, loads, costs)))
    return options, list(refused.values())


def choose(
    loads: Sequence[TableLoad],
    strategies: Iterable[Strategy],
    shards: Iterable[int],
    limits: MemoryLimits,
    costs: CostModel,
    bound_ms: float | None = None,
) -> Choice:
    """The option with the lowest p99, or one that is cheaper and nearly as quick; with a bound, the one with the fewest
    cores whose p99 keeps it.

    Raises:
        ConfigError: nothing fits the limits, keeps up with the rate, or keeps the bound.
    """
    options, refused = all_options(loads, strategies, shards, limits, costs)
    if not options:
        raise ConfigError(f"nothing fits: {'; '.join(refused)}")
    quickest = min(options, key=lambda one: (one.p99_ms, one.prediction.busiest))
    if quickest.p99_ms == math.inf:
        raise ConfigError(
            f"nothing keeps up with {costs.rate:,.0f} requests a second: the busiest server of {quickest.title} would "
            f"be {quickest.prediction.busiest:.0%} busy; give servers more cores, or a lower rate"
        )
    if bound_ms is not None and quickest.p99_ms > bound_ms:
        raise ConfigError(
            f"nothing keeps a p99 of {bound_ms:,.1f} ms: the quickest is {quickest.title} with {quickest.p99_ms:,.1f} "
            "ms; give servers more cores, a lower rate or another bound"
        )
    ranked = sorted(options, key=lambda one: _order(one, bound_ms, quickest.p99_ms))
    reason = _reason(ranked, bound_ms, costs)
    return Choice(ranked[0], reason, tuple(options), tuple(refused))


def _order(option: Option, bound_ms: float | None, lowest_ms: float) -> tuple[float, int, float, float, int]:
    """The smallest comes first: who keeps the bound, then cores, then p99. Without a bound: p99, save that those near
    the lowest are alike; then cores, then CPU."""
    parts = sum(len(shard.parts) for shard in option.plan.shards)
    told = option.prediction
    if bound_ms is None:
        return max(option.p99_ms, ALIKE * lowest_ms), told.cores, told.cpu_ms, option.p99_ms, parts
    return float(option.p99_ms > bound_ms), told.cores, option.p99_ms, told.cpu_ms, parts


def _reason(ranked: Sequence[Option], bound_ms: float | None, costs: CostModel) -> str:
    aim = "a p99 as low as any" if bound_ms is None else f"the fewest cores with a p99 of at most {bound_ms:,.1f} ms"
    said = f"{ranked[0].title}: {aim} at {costs.rate:,.0f} requests a second, {_figures(ranked[0])}."
    if len(ranked) == 1:
        return said
    return f"{said} Next is {ranked[1].title}, {_figures(ranked[1])}."


def _figures(option: Option) -> str:
    one = option.prediction
    p99 = "which cannot keep up" if one.p99_ms is None else f"p99 {one.p99_ms:,.2f} ms"
    largest = max((size for size in (option.plan.main_bytes, *option.plan.shard_bytes)), default=0)
    return f"{p99}, {one.calls} calls, {one.cpu_ms:,.2f} ms of CPU, {one.cores} cores, {show_bytes(largest)} a server"
