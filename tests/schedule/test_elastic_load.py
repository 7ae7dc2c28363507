"""A full version and a variant that takes half as long, in made-up time, through the real books, on the same two cores:
what being elastic gives under too much load, and that it ends with the load."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.errors import Overloaded
from rankd.schedule.admission import Limits
from rankd.schedule.elastic_config import ElasticConfig
from rankd.schedule.elastic_policy import LoadMeter, Seen, Standing, look
from rankd.schedule.ledger import Ledger, Work
from rankd.schedule.served import Asked
from rankd.schedule.waiting import NEVER, Waiting
from tests.schedule.made_up import ROOMY, rules_of

CORES = 2
VERSIONS = ("full", "half")
CONFIG = ElasticConfig(("half",), to_lighter_ms=100.0, to_full_ms=50.0, dwell_seconds=0.5, calm_seconds=2.0)
ROWS = (10, 40, 100, 300)
RULES = [rules_of(CORES), rules_of(CORES, scale=0.5)]
CAPACITY = 1e3 * CORES / float(np.mean([RULES[0].work_ms(rows, 0.2) for rows in ROWS]))
"""Requests a second that the full version can do."""


@dataclass(slots=True, eq=False)
class Request:
    at: float
    rows: int
    by: int = -1
    ended: float = -1.0


@dataclass
class Elastic:
    """Runs arrivals. `changes` are (when, level)."""

    variants: bool = True
    limits: Limits = ROOMY
    standing: Standing = field(default_factory=Standing)
    changes: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waitings: list[Waiting] = []
        self._ledgers = [Ledger[Request](rules, self.limits, lambda: self._waitings) for rules in RULES]
        self._waitings.extend(ledger.waiting for ledger in self._ledgers)
        self._meter = LoadMeter(CONFIG.dwell_seconds)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers, self._idle = count(), CORES

    def run(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._at(request.at, lambda now, request=request: self._comes(request, now))  # type: ignore[misc]
        while self._events:
            now, _, happens = heapq.heappop(self._events)
            happens(now)
            while self._idle and (ledger := self._first()) is not None:
                work = ledger.next(1, now)
                assert work is not None
                self._idle -= 1
                self._runs(ledger, work, now)

    def _at(self, moment: float, happens: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._numbers), happens))

    def _comes(self, request: Request, now: float) -> None:
        self._meter.came(now, {v: r.work_ms(request.rows, 0.2) for v, r in zip(VERSIONS, RULES, strict=True)})
        loads = self._meter.loads(now, VERSIONS, CORES)
        waiting_ms = sum(waiting.total_ms() for waiting in self._waitings) / CORES
        standing = look(self.standing, Seen(now, waiting_ms, loads if self.variants else loads[:1]), CONFIG)
        if standing.level != self.standing.level:
            self.changes.append((now, standing.level))
        self.standing = standing
        request.by = standing.level
        ledger = self._ledgers[request.by]
        try:
            ledger.comes(ledger.accept(request, Asked(request.rows, resident=True), now))
        except Overloaded:
            request.by = -1

    def _first(self) -> Ledger[Request] | None:
        turns = [waiting.turn[: waiting.size].min(initial=NEVER) for waiting in self._waitings]
        first = int(np.argmin(turns))
        return self._ledgers[first] if turns[first] < NEVER else None

    def _runs(self, ledger: Ledger[Request], work: Work[Request], now: float) -> None:
        for job in list(work.unprepared):
            ledger.prepared(job)
        ms = 0.2 * len(work.unprepared) + ledger.rules.costs.score(work.bucket, len(work.parts)) if work.bucket else 0.2

        def ends(then: float) -> None:
            for job in ledger.done(work) if work.parts else ():
                assert job.item.ended < 0
                job.item.ended = then
            ledger.leave(work.jobs)
            self._idle += 1

        self._at(now + ms / 1e3, ends)


def arrivals(*phases: tuple[float, float], seed: int = 0) -> list[Request]:
    """Phases of (seconds, share of the full version's capacity)."""
    random, made, begin = np.random.default_rng(seed), list[Request](), 0.0
    for seconds, load in phases:
        now = begin
        while load and (now := now + float(random.exponential(1 / (load * CAPACITY)))) < begin + seconds:
            made.append(Request(now, int(random.choice(ROWS))))
        begin += seconds
    return made


def latency_ms(requests: Sequence[Request], share: float) -> float:
    return float(np.quantile([(one.ended - one.at) * 1e3 for one in requests], share))


def test_more_than_the_full_version_can_do_is_done_with_the_variant_and_it_comes_back() -> None:
    phases = [(5.0, 0.5), (30.0, 1.5), (15.0, 0.4)]
    elastic, alone = Elastic(), Elastic(variants=False)
    requests, same = arrivals(*phases), arrivals(*phases)
    elastic.run(requests)
    alone.run(same)
    assert [level for _, level in elastic.changes] == [1, 0]  # once each way, and no more
    assert alone.changes == []
    (up, _), (down, _) = elastic.changes
    assert 5.0 < up < 8.0
    assert 35.0 < down < 40.0
    assert {one.by for one in requests if one.at < 5.0} == {0}
    assert {one.by for one in requests if up < one.at < 35.0} == {1}
    assert {one.by for one in requests if one.at > 40.0} == {0}
    assert min(one.ended for one in (*requests, *same)) > 0  # nobody was forgotten
    busy, busy_alone = ([one for one in some if 10.0 < one.at < 35.0] for some in (requests, same))
    assert latency_ms(busy, 0.99) < 300.0
    assert latency_ms(busy_alone, 0.99) > 5000.0


def test_more_answers_where_what_waits_is_limited() -> None:
    phases, limits = [(5.0, 0.5), (30.0, 1.5)], Limits(10**9, 400.0)
    elastic, alone = Elastic(limits=limits), Elastic(variants=False, limits=limits)
    requests, same = arrivals(*phases), arrivals(*phases)
    elastic.run(requests)
    alone.run(same)
    answered, answered_alone = (sum(one.ended > 0 for one in some) / len(some) for some in (requests, same))
    assert answered > 0.99
    assert answered_alone == pytest.approx((5 * 0.5 + 30 * 1.0) / (5 * 0.5 + 30 * 1.5), abs=0.1)


PHASES = st.lists(st.tuples(st.floats(0.2, 4.0), st.sampled_from((0.0, 0.5, 0.9, 1.1, 1.6, 3.0))), max_size=4)


@settings(max_examples=10, deadline=None)
@given(PHASES, st.integers(0, 5))
def test_whatever_comes_there_is_no_flapping_and_the_full_version_is_back(
    phases: list[tuple[float, float]], seed: int
) -> None:
    elastic = Elastic(limits=Limits(10**9, 1000.0))
    requests = arrivals(*phases, (15.0, 0.3), seed=seed)
    elastic.run(requests)
    assert elastic.standing.level == 0
    assert requests[-1].by == 0
    moments = [now for now, _ in elastic.changes]
    assert all(later - earlier >= CONFIG.dwell_seconds for earlier, later in pairwise(moments))
    ways_back = [now for now, level in elastic.changes if level == 0]
    assert all(later - earlier >= CONFIG.calm_seconds for earlier, later in pairwise(ways_back))
    assert all((one.ended > 0) == (one.by >= 0) for one in requests)
