"""The book of the schedule under a made-up clock: whatever happens in whatever order, every request ends exactly once,
and every candidate of an answered one was scored exactly once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rankd.errors import DeadlineExceeded, Overloaded
from rankd.schedule.admission import MARGIN_STEP, Limits, Margin
from rankd.schedule.ledger import MOST_LOSSES, Job, Ledger, Work
from rankd.schedule.policy import Priority
from rankd.schedule.served import Asked, Part
from rankd.schedule.waiting import NEVER
from tests.schedule.made_up import ROOMY, rules_of


@dataclass(eq=False)
class Subject:
    """What a request has gone through."""

    rows: int
    scored: np.ndarray = field(init=False)
    ends: list[str] = field(default_factory=list)
    dropped: int = 0

    def __post_init__(self) -> None:
        self.scored = np.zeros(self.rows, np.int64)


def test_a_request_from_its_acceptance_to_its_end() -> None:
    ledger: Ledger[str] = Ledger(rules_of(), ROOMY)
    job = ledger.accept("a", Asked(128), 0.0)
    assert ledger.next(2, 0.0) is None  # it has not come yet
    ledger.comes(job)
    first = ledger.next(2, 0.0)
    assert first is not None
    assert (first.bucket, first.unprepared, first.parts) == (0, [job], [])
    assert ledger.next(1, 0.0) is None  # it is being prepared
    ledger.prepared(job)
    assert ledger.leave(first.jobs) == []
    works = [ledger.next(2, 1.0), ledger.next(1, 1.0)]
    assert [(work.bucket, work.parts) for work in works if work] == [
        (64, [Part("a", 0, 64)]),
        (64, [Part("a", 64, 64)]),
    ]
    assert works[0] is not None
    assert works[1] is not None
    assert ledger.done(works[1]) == []
    assert ledger.leave([job]) == []
    assert ledger.done(works[0]) == [job]
    assert ledger.empty
    assert ledger.leave([job]) == [job]  # nobody works on it: what it holds can be given back
    assert not ledger.droppable(job)  # once


def test_what_has_to_wait_leaves_its_call_and_comes_again() -> None:
    ledger: Ledger[str] = Ledger(rules_of(), ROOMY)
    one, two = (ledger.accept(name, Asked(10, resident=True), 0.0) for name in "ab")
    ledger.comes(one)
    ledger.comes(two)
    work = ledger.next(1, 0.0)
    assert work is not None
    assert work.jobs == [one, two]
    ledger.waits(work, one)
    ledger.leave([one])
    assert (work.jobs, work.parts, work.unprepared) == ([two], [Part("b", 0, 10)], [two])
    assert ledger.next(1, 0.0) is None
    ledger.comes(one)
    again = ledger.next(1, 0.0)
    assert again is not None
    assert again.parts == [Part("a", 0, 10)]


def test_what_a_lost_executor_had_is_run_once_more_and_by_itself() -> None:
    ledger: Ledger[str] = Ledger(rules_of(), ROOMY)
    jobs = [ledger.accept(name, Asked(10, resident=True), 0.0) for name in "ab"]
    for job in jobs:
        ledger.comes(job)
        ledger.waiting.prepared[job.slot] = True
    together = ledger.next(1, 0.0)
    assert together is not None
    assert together.jobs == jobs
    assert ledger.lost(together) == []
    again = ledger.next(1, 0.0)
    assert again is not None
    assert again.jobs == jobs[:1]
    assert ledger.lost(again) == jobs[:1]
    assert jobs[0].over
    last = ledger.next(1, 0.0)
    assert last is not None
    assert ledger.done(last) == jobs[1:]


def test_early_refusals_say_why() -> None:
    ledger: Ledger[str] = Ledger(rules_of(num_executors=1), Limits(candidates=300, work_ms=20.0, margin=0.0))
    with pytest.raises(DeadlineExceeded, match=r"takes 9\.\d ms even if it is alone"):
        ledger.accept("no", Asked(64 * 3, resident=True, deadline=0.005), 0.0)
    ledger.accept("a", Asked(200, resident=True, deadline=0.0116), 0.0)
    with pytest.raises(Overloaded, match=r"would be answered in 1\d ms, and its time is over in 9 ms") as refused:
        ledger.accept("b", Asked(90, resident=True, deadline=0.0091), 0.0)
    assert 0 < refused.value.retry_after_s < 0.02
    with pytest.raises(Overloaded, match="with this one some of them would be late") as refused:
        ledger.accept("b", Asked(16, resident=True, deadline=0.0016), 0.0)
    assert 0 < refused.value.retry_after_s < 0.02
    with pytest.raises(Overloaded, match=r"200 candidates, 1\d ms of work, are waiting; allowed are 300"):
        ledger.accept("c", Asked(150, resident=True), 0.0)
    ledger.accept("d", Asked(100, resident=True), 0.0)
    ledger.limits = Limits(candidates=10**6, work_ms=10.0)
    with pytest.raises(Overloaded, match=r"allowed .*10 ms") as full:
        ledger.accept("e", Asked(1, resident=True), 0.0)
    assert full.value.retry_after_s > 0


def test_the_margin_follows_what_became_of_those_that_were_close() -> None:
    ledger: Ledger[str] = Ledger(rules_of(num_executors=1), Limits(candidates=10**6, work_ms=1e6, margin=0.1))

    def finish(deadline: float) -> float:
        before = ledger.margin.value
        ledger.comes(ledger.accept("a", Asked(16, resident=True, deadline=deadline), 0.0))
        work = ledger.next(1, 0.0)
        assert work is not None
        assert ledger.done(work) == work.jobs
        return ledger.margin.value - before

    assert finish(deadline=1.0) == 0.0  # it would have been in time anyway
    assert finish(deadline=0.002) < 0.0
    ledger.comes(ledger.accept("b", Asked(16, resident=True, deadline=0.002), 0.0))
    before = ledger.margin.value
    assert len(ledger.late(1.0)) == 1
    assert ledger.margin.value > before


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.45))
@settings(max_examples=20)
def test_the_margin_settles_where_few_are_late(seed: int, enough: float) -> None:
    """Those are late whose time is wrong by more than the margin, which is never by more than `enough`."""
    margin, late, random = Margin(0.25), 0, np.random.default_rng(seed)
    for number, wrong in enumerate(random.uniform(-0.5, enough, 30_000)):
        if wrong > margin.value:
            margin.missed()
            late += number >= 10_000
        else:
            margin.kept()
    assert 0.002 < late / 20_000 < 0.008
    assert enough - 0.2 < margin.value <= enough + MARGIN_STEP


class Life(RuleBasedStateMachine):
    """Everything that can happen to requests, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ledger: Ledger[Subject] = Ledger(rules_of(num_executors=3), Limits(candidates=1500, work_ms=120.0))
        self.jobs: list[Job[Subject]] = []
        self.unready: list[Job[Subject]] = []
        self.working: list[Work[Subject]] = []

    @rule(
        rows=st.integers(1, 400),
        resident=st.booleans(),
        patience_ms=st.none() | st.floats(1, 400),
        priority=st.sampled_from(Priority),
        ready=st.booleans(),
    )
    def asks(self, rows: int, resident: bool, patience_ms: float | None, priority: Priority, ready: bool) -> None:
        deadline = None if patience_ms is None else self.now + patience_ms / 1e3
        waiting = self.ledger.waiting
        before = waiting.count, waiting.total_rows(), waiting.total_ms() / 3
        try:
            job = self.ledger.accept(Subject(rows), Asked(rows, resident, deadline, priority), self.now)
        except (Overloaded, DeadlineExceeded) as error:
            self.refused(error, before[:2])
            return
        assert not before[0] or before[1] + rows <= 1500
        assert before[2] <= 120.0
        self.jobs.append(job)
        if ready:
            self.ledger.comes(job)
        else:
            self.unready.append(job)

    def refused(self, error: Exception, before: tuple[int, int]) -> None:
        waiting = self.ledger.waiting
        assert (waiting.count, waiting.total_rows()) == before
        assert isinstance(error, DeadlineExceeded) or getattr(error, "retry_after_s", 0.0) > 0

    @precondition(lambda self: self.unready)
    @rule(data=st.data())
    def comes(self, data: st.DataObject) -> None:
        self.ledger.comes(self.unready.pop(data.draw(st.integers(0, len(self.unready) - 1))))

    @precondition(lambda self: len(self.working) < 3)
    @rule()
    def works(self) -> None:
        self.ends(self.ledger.late(self.now), "late")
        waiting = self.ledger.waiting
        turns = waiting.turn[: waiting.size]
        first = float(turns.min()) if turns.size else NEVER
        work = self.ledger.next(3 - len(self.working), self.now)
        assert (work is None) == (first == NEVER)
        if work is None:
            return
        place = min(float(waiting.place[job.slot]) for job in work.jobs)
        assert place == first  # nobody is passed by who comes after him in the order
        assert place <= max(job.accepted for job in work.jobs) + 1.1 + 1e-9  # fairness and batch bounds: no starvation
        for part, job in zip(work.parts, work.jobs, strict=False):
            assert part.item is job.item
            assert 0 < part.count <= work.bucket
        self.working.append(work)

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def prepares(self, data: st.DataObject) -> None:
        work = data.draw(st.sampled_from(self.working))
        if work.unprepared:
            self.ledger.prepared(work.unprepared.pop(0))

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def waits(self, data: st.DataObject) -> None:
        work = data.draw(st.sampled_from(self.working))
        if work.unprepared:
            job = work.unprepared[0]
            self.ledger.waits(work, job)
            self.drop(self.ledger.leave([job]))
            self.unready.append(job)

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def finishes(self, data: st.DataObject) -> None:
        work = self.working.pop(data.draw(st.integers(0, len(self.working) - 1)))
        for job in work.unprepared:
            self.ledger.prepared(job)
        for part, job in zip(work.parts, work.jobs, strict=False):
            if not job.over:
                part.item.scored[part.first : part.first + part.count] += 1
        self.ends(self.ledger.done(work) if work.parts else [], "scored")
        self.drop(self.ledger.leave(work.jobs))

    @precondition(lambda self: self.working)
    @rule(data=st.data(), hangs=st.booleans())
    def is_lost(self, data: st.DataObject, hangs: bool) -> None:
        """An executor raises; or hangs, and never comes back."""
        work = self.working.pop(data.draw(st.integers(0, len(self.working) - 1)))
        self.ends(self.ledger.lost(work), "failed")
        if not hangs:
            self.drop(self.ledger.leave(work.jobs))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), how=st.sampled_from(["failed", "cancelled"]))
    def ends_early(self, data: st.DataObject, how: str) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        if self.ledger.end(job):
            job.item.ends.append(how)
        self.drop([job] if self.ledger.droppable(job) else [])

    @rule(seconds=st.floats(0, 0.5))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.ends(self.ledger.late(self.now), "late")

    def ends(self, jobs: list[Job[Subject]], how: str) -> None:
        for job in jobs:
            job.item.ends.append(how)
        self.drop([job for job in jobs if self.ledger.droppable(job)])

    def drop(self, jobs: list[Job[Subject]]) -> None:
        for job in jobs:
            job.item.dropped += 1
            assert job.over

    @invariant()
    def everybody_is_accounted_for(self) -> None:
        open_jobs = [job for job in self.jobs if not job.item.ends]
        waiting = self.ledger.waiting
        assert waiting.count == len(open_jobs)
        in_order = sorted(open_jobs, key=lambda job: float(waiting.place[job.slot]))
        assert waiting.places.tolist() == [float(waiting.place[job.slot]) for job in in_order]
        assert sorted(waiting.order.tolist()) == sorted(job.slot for job in open_jobs)
        assert waiting.runnable == int((waiting.turn < NEVER).sum())
        for job in self.jobs:
            subject = job.item
            assert len(subject.ends) <= 1
            assert subject.dropped <= 1
            assert subject.scored.max() <= 1
            if subject.ends == ["scored"]:
                assert subject.scored.all()
            elif not subject.ends:
                assert not subject.dropped
                assert job.losses < MOST_LOSSES
                deadline = job.asked.deadline
                assert deadline is None or deadline > self.now  # none is silently missed
                out = sum(part.count for work in self.working for part in work.parts if part.item is subject)
                left = int(self.ledger.waiting.rows[job.slot])
                assert left + out + int(subject.scored.sum()) == subject.rows

    def teardown(self) -> None:
        """Whatever is left can be brought to its end."""
        for job in self.unready:
            self.ledger.comes(job)
        for _ in range(10_000):
            if not self.working:
                self.works()
            if not self.working:
                break
            work = self.working.pop()
            for job in work.unprepared:
                self.ledger.prepared(job)
            for part, job in zip(work.parts, work.jobs, strict=False):
                if not job.over:
                    part.item.scored[part.first : part.first + part.count] += 1
            self.ends(self.ledger.done(work) if work.parts else [], "scored")
            self.drop(self.ledger.leave(work.jobs))
        assert self.ledger.empty
        assert all(len(job.item.ends) == 1 for job in self.jobs)
        self.everybody_is_accounted_for()


Life.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestLife = Life.TestCase
