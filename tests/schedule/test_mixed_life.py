"""Requests on executors of two kinds, in any order of events: the book, the simulation and real threads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from rankd.errors import EngineFailure
from rankd.schedule.admission import Limits
from rankd.schedule.kinds import Mix, Standing
from rankd.schedule.ledger import Job, Ledger, Work
from rankd.schedule.scheduler import Scheduler
from rankd.schedule.simulation import Arrival, simulate
from rankd.schedule.waiting import NEVER
from tests.features.stores.redis_server import eventually
from tests.schedule import test_scheduler
from tests.schedule.made_up import ROOMY, rules_of, some_arrivals, two_kinds, wide_rules
from tests.schedule.test_ledger import Life, Subject
from tests.schedule.test_scheduler import PATIENCE, Item, asked, failing_once, right

EXECUTORS = (2, 1)


class MixedLife(Life):
    """As with one kind, which is in `test_ledger.py`; who takes what depends on the kind that is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger: Ledger[Subject] = Ledger(two_kinds(*EXECUTORS), Limits(candidates=1500, work_ms=120.0))
        self.jobs: list[Job[Subject]] = []
        self.kind_of: dict[Work[Subject], int] = {}

    def standings(self) -> list[Standing]:
        calls = [[work for work in self.working if self.kind_of[work] == kind] for kind in (0, 1)]
        return [
            Standing(most - len(some), tuple(work.started + work.predicted_ms / 1e3 for work in some))
            for most, some in zip(EXECUTORS, calls, strict=True)
        ]

    @rule(kind=st.integers(0, 1))
    def asks_for_work(self, kind: int) -> None:
        self.gets_work(kind)

    @precondition(lambda self: len(self.working) < 3)
    @rule()
    def works(self) -> None:
        """All who are idle are asked. If nobody works somebody begins, and not with who is behind alone."""
        nobody, waiting = not self.working, self.ledger.waiting
        self.ends(self.ledger.late(self.now), "late")
        turns = waiting.turn[: waiting.size].copy()
        first = float(turns.min()) if turns.size else NEVER
        given: list[Work[Subject]] = []
        while more := [work for kind in (0, 1) if (work := self.gets_work(kind)) is not None]:
            given += more
        if nobody:
            assert bool(given) == (first < NEVER)
            assert not given or any(float(turns[job.slot]) == first for work in given for job in work.jobs)

    def gets_work(self, kind: int) -> Work[Subject] | None:
        standings = self.standings()
        if not standings[kind].idle:
            return None
        self.ends(self.ledger.late(self.now), "late")
        work = self.ledger.next(standings[kind].idle, self.now, kind, standings)
        if work is None:
            assert (self.ledger.again < NEVER) == bool(self.ledger.waiting.runnable)
            return None
        for part, job in zip(work.parts, work.jobs, strict=False):
            assert part.item is job.item
            assert 0 < part.count <= work.bucket
        self.kind_of[work] = kind
        self.working.append(work)
        return work


MixedLife.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestMixedLife = MixedLife.TestCase


@settings(max_examples=60, deadline=None)
@given(
    some_arrivals(prepare_ms=st.tuples(st.floats(0, 20), st.floats(0, 20))),
    st.integers(1, 3),
    st.integers(1, 2),
)
def test_everybody_ends_and_nothing_is_scored_twice(arrivals: list[Arrival], quick: int, wide: int) -> None:
    arrivals.sort(key=lambda arrival: arrival.at)
    simulated = simulate(arrivals, two_kinds(quick, wide), Limits(3000, 500.0))
    assert all(one.how in ("scored", "refused", "late") for one in simulated.outcomes)
    scored = sum(one.arrival.rows for one in simulated.outcomes if one.how == "scored")
    assert scored <= simulated.rows
    for one in simulated.outcomes:
        assert one.ended >= one.arrival.at
        if one.arrival.timeout_ms is not None:
            assert one.latency_ms <= one.arrival.timeout_ms + 1e-6


def poisson(rate: float, seconds: float) -> list[Arrival]:
    """Four of five with few candidates, the others with many; preparing takes the same on both kinds."""
    draws = np.random.default_rng(7)
    times = np.cumsum(draws.exponential(1 / rate, int(rate * seconds)))
    rows = np.where(draws.random(len(times)) < 0.8, draws.integers(10, 60, len(times)), 900)
    pairs = zip(times.tolist(), rows.tolist(), strict=True)
    return [Arrival(at, size, prepare_ms=(0.2, 0.2)) for at, size in pairs]


def test_two_kinds_do_what_neither_does_alone() -> None:
    mix, arrivals = two_kinds(2, 1), poisson(550, 8.0)
    both = simulate(arrivals, mix, ROOMY)
    assert np.quantile([one.latency_ms for one in both.outcomes], 0.99) < 60.0
    assert all(busy_s > 2.0 for busy_s in both.busy_s)
    for rules in mix.kinds:
        alone = [one.latency_ms for one in simulate(arrivals, rules, ROOMY).outcomes]
        assert np.quantile(alone, 0.99) > 300.0


def test_who_is_alone_is_answered_as_soon_as_by_the_quicker_kind() -> None:
    mix = two_kinds(1, 1)
    for rows in (10, 60, 300, 1000):
        soonest = min(simulate([Arrival(0.0, rows)], rules, ROOMY).outcomes[0].latency_ms for rules in mix.kinds)
        assert simulate([Arrival(0.0, rows, (0.2, 0.2))], mix, ROOMY).outcomes[0].latency_ms <= soonest + 0.2


def test_executors_that_take_longer_than_they_should_are_not_waited_for() -> None:
    """The quick kind takes twenty times what is predicted: what it was to do, the other does meanwhile."""
    mix = two_kinds(1, 1)
    quick, wide = mix.kinds
    slow = [lambda bucket, users: 20 * quick.costs.score(bucket, users), wide.costs.score]
    outcomes = simulate([Arrival(at, 10, (0.2, 0.2)) for at in (0.0, 0.0001)], mix, ROOMY, slow).outcomes
    assert outcomes[0].latency_ms > 20.0
    assert outcomes[1].latency_ms < 12.0


Started = tuple[Scheduler[Item, list[float], int], test_scheduler.Work]


@contextmanager
def started(mix: Mix, hang_seconds: float = 60.0) -> Iterator[Started]:
    """Executors 0, 1, ... of the first kind, then those of the second. Others are 100, 101, ... or 200, 201, ..."""
    work, quick, wide = test_scheduler.Work(), count(100), count(200)
    schedule = Scheduler[Item, list[float], int](
        range(mix.num_executors),
        work,
        mix,
        ROOMY,
        [lambda: next(quick), lambda: next(wide)],
        hang_seconds,
    )
    schedule.start()
    try:
        yield schedule, work
    finally:
        schedule.close()


def test_scores_are_right_whichever_kinds_a_request_was_cut_over() -> None:
    draw = random.Random(3)
    with started(two_kinds(2, 1)) as (schedule, work):
        items = [Item(10_000 * number, draw.choice([1, 16, 40, 300, 1000])) for number in range(150)]
        futures = []
        for item in items:
            futures.append(schedule.submit(item, asked(item, resident=draw.random() < 0.5)))
            if draw.random() < 0.1:
                time.sleep(0.003)  # so that executors are idle now and then
        assert all(right(item, future) for item, future in zip(items, futures, strict=True))
        figures = schedule.figures()
    assert [item.dropped for item in items] == [1] * len(items)
    assert schedule.unfinished == 0
    assert [(one.name, one.num_executors) for one in figures.kinds] == [("", 2), ("wide", 1)]
    assert sum(one.counts.rows for one in figures.kinds) == figures.counts.rows == sum(item.rows for item in items)
    assert sum(one.counts.calls for one in figures.kinds) == figures.counts.calls == len(work.calls)
    for kind, executors in enumerate(((0, 1), (2,))):
        buckets = two_kinds().kinds[kind].cutter.buckets
        mine = [parts for executor, parts in work.calls if executor in executors]
        assert all(part[2] <= buckets[-1] for parts in mine for part in parts)


def test_what_a_kind_takes_is_learnt_of_it_alone() -> None:
    mix = Mix([rules_of(num_executors=1), wide_rules(1)])
    before = [rules.costs.score(rules.cutter.buckets[0]) for rules in mix.kinds]
    with started(mix) as (schedule, _):
        for number in range(20):
            item = Item(number, 5)
            assert right(item, schedule.submit(item, asked(item, resident=True)))
        busy = [one.counts.busy_seconds for one in schedule.figures().kinds]
    after = [rules.costs.score(rules.cutter.buckets[0]) for rules in mix.kinds]
    assert after[0] < before[0]  # calls of nothing take no time
    assert after[1] == before[1]
    assert busy[0] > 0.0


@pytest.mark.parametrize(("rows", "lost", "takes_its_place"), [(10, 0, 100), (1000, 1, 200)])
def test_an_executor_that_fails_is_replaced_by_one_of_its_kind(rows: int, lost: int, takes_its_place: int) -> None:
    kind = lost
    with started(two_kinds(1, 1)) as (schedule, work):
        item = Item(7, rows, on_score=failing_once(ZeroDivisionError("in the engine")))
        eventually(lambda: schedule._sharer.idle == 2, "both are idle")
        assert right(item, schedule.submit(item, asked(item, resident=True)))
        eventually(lambda: takes_its_place in schedule.executors, "it is replaced")
        assert [seat.kind for seat in schedule._seats] == [0, 1]
        assert schedule.executors[kind] == takes_its_place
        other = Item(10_000, rows)
        assert right(other, schedule.submit(other, asked(other, resident=True)))
    assert work.gone == [lost]
    assert schedule.figures().counts.lost_executors == 1


@pytest.mark.parametrize(("rows", "failing"), [(10, 0), (1000, 1)])
def test_what_one_kind_cannot_do_the_other_does(rows: int, failing: int) -> None:
    """As a GPU that has no memory left for a call: every executor of the kind fails it."""
    with started(two_kinds(1, 1)) as (schedule, work):

        def fail() -> None:
            if work.calls[-1][0] in (failing, *range(100 * failing + 100, 100 * failing + 200)):
                raise EngineFailure("no memory left")

        eventually(lambda: schedule._sharer.idle == 2, "both are idle")
        item = Item(7, rows, on_score=fail)
        assert right(item, schedule.submit(item, asked(item, resident=True)))
        assert schedule.figures().counts.lost_executors == 1
    assert item.dropped == 1


def test_one_that_hangs_is_not_waited_for() -> None:
    gate = threading.Event()
    stuck, short = Item(0, 10, on_score=lambda: _wait(gate)), Item(100, 10)
    try:
        with started(two_kinds(1, 1), hang_seconds=30.0) as (schedule, work):
            eventually(lambda: schedule._sharer.idle == 2, "both are idle")
            hanging = schedule.submit(stuck, asked(stuck, resident=True))
            eventually(lambda: len(work.calls) == 1, "it is being computed")
            assert right(short, schedule.submit(short, asked(short, resident=True)))  # by the other kind
            assert [executor for executor, _ in work.calls] == [0, 1]
            gate.set()
            assert right(stuck, hanging)
    finally:
        gate.set()


def _wait(gate: threading.Event) -> None:
    gate.wait(PATIENCE)
