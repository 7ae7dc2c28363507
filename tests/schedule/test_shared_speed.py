"""Executors that share a device: what they get done at once decides what is begun, spread and shared, and what is
predicted and learnt. Executors that share none are treated as ever."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.errors import Overloaded
from rankd.observe.schedule_metrics import ScheduleCollector
from rankd.schedule.admission import Limits
from rankd.schedule.core_sharing import Cores, Sharer
from rankd.schedule.costs import CostModel, Warmed
from rankd.schedule.cutting import Cutter
from rankd.schedule.kinds import Mix, Standing
from rankd.schedule.ledger import Ledger
from rankd.schedule.mixed_policy import decide as decide_mixed
from rankd.schedule.policy import Call, Rules, decide
from rankd.schedule.scheduler import Scheduler
from rankd.schedule.seats import Seat, standings
from rankd.schedule.served import Asked, Part
from rankd.schedule.shared_speed import WORTH, Speed
from rankd.schedule.waiting import NEVER, Waiting
from rankd.types import Float32Array
from tests.schedule.made_up import ROOMY, rules_of, two_kinds, wide_rules
from tests.schedule.test_policy import put
from tests.schedule.test_scheduler import PATIENCE, Item, Work, asked, right

CURVE = (1.0, 1.5, 1.6, 1.6)
FLAT = (1.0, 1.0, 1.0, 1.0)
CURVES = st.lists(st.floats(0, 1), min_size=0, max_size=5).map(
    lambda steps: tuple(1.0 + sum(steps[:n]) for n in range(len(steps) + 1))
)


def shared(curve: tuple[float, ...] = CURVE, num_executors: int = 4, largest: int = 256) -> Rules:
    return rules_of(num_executors=num_executors, largest=largest, speed=curve)


def test_the_worked_example() -> None:
    speed = Speed(CURVE)
    assert [speed.of(n) for n in (0, 1, 2, 3, 4, 9)] == [0.0, 1.0, 1.5, 1.6, 1.6, 1.6]
    assert [speed.contention(n) for n in (0, 1, 2, 3, 4)] == pytest.approx([1, 1, 4 / 3, 1.875, 2.5])
    assert speed.between(1, 2) == pytest.approx(7 / 6)
    assert speed.most(4) == 3
    assert speed.most(2) == 2
    assert [speed.room(4 - busy, busy) for busy in range(5)] == [3, 2, 1, 0, 0]
    assert Speed(FLAT).most(4) == 1
    assert Speed((1.0,)).room(1, 0) == 1


@given(st.integers(1, 50), st.integers(0, 50))
def test_independent_executors_get_as_much_done_as_they_are(number: int, busy: int) -> None:
    speed = Speed()
    assert (speed.of(number), speed.contention(number), speed.between(number, busy)) == (number, 1.0, 1.0)
    assert (speed.most(number), speed.room(number, busy)) == (number, number)


@given(CURVES, st.integers(0, 8), st.integers(0, 8))
def test_one_can_always_begin_and_what_is_left_idle_is_not_worth_it(
    curve: tuple[float, ...], idle: int, busy: int
) -> None:
    speed = Speed(curve)
    most = speed.most(len(curve))
    assert speed.room(1, 0) == 1
    assert speed.of(most) * WORTH >= curve[-1]
    assert most == 1 or speed.of(most - 1) * WORTH <= curve[-1]
    assert 0 <= speed.room(idle, busy) <= idle
    assert speed.contention(busy) >= 1.0


# What is begun at once.


def test_no_more_calls_are_begun_than_get_more_done() -> None:
    rules, waiting = shared(), Waiting()
    slots = [put(waiting, rules, 256, at=float(number)) for number in range(4)]
    first = Call((slots[0],), 256)
    assert [decide(waiting, 4 - busy, 9.0, rules, busy) for busy in range(4)] == [first, first, first, None]
    flat = shared(FLAT)
    assert [decide(waiting, 4 - busy, 9.0, flat, busy) for busy in range(2)] == [first, None]
    independent = rules_of(num_executors=4, largest=256)
    assert [decide(waiting, 4 - busy, 9.0, independent, busy) for busy in range(4)] == [first] * 4


def test_who_waits_for_room_shares_a_call_then() -> None:
    rules, waiting = shared(FLAT), Waiting()
    slots = [put(waiting, rules, 10, at=float(number)) for number in range(4)]
    assert decide(waiting, 3, 9.0, rules, busy=1) is None
    assert decide(waiting, 4, 9.0, rules, busy=0) == Call(tuple(slots), 16)


def test_the_last_one_that_may_begin_keeps_the_others_deadlines() -> None:
    """A call of 256 takes 11 ms beside nobody; others are idle, but may not begin before it is over."""
    rules, waiting = shared(FLAT), Waiting()
    long = put(waiting, rules, 250)
    put(waiting, rules, 10, at=1.0, latest=0.005)
    assert decide(waiting, 4, 0.0, rules) == Call((long,), 64)
    beside = shared((1.0, 1.1))  # 3 ms beside another one are 3 x 2 / 1.1
    assert decide(waiting, 1, 0.0, beside, busy=1) == Call((long,), 16)
    assert decide(waiting, 1, 0.0, beside, busy=0) == Call((long,), 64)


# What is spread.


def cutting(curve: tuple[float, ...] | None, num_executors: int = 2) -> Rules:
    """128 candidates take 6 ms in one call, and 3.1 ms in each of two."""
    costs = CostModel(Warmed({(16, 1): 1.0, (64, 1): 3.1, (128, 1): 6.0}, speed=curve))
    cutter = Cutter((16, 64, 128), costs.score, 1024)
    return replace(rules_of(num_executors=num_executors, largest=128), costs=costs, cutter=cutter)


@pytest.mark.parametrize(
    ("curve", "bucket"),
    [(None, 64), ((1.0, 2.0), 64), ((1.0, 1.4), 64), ((1.0, 1.2), 128), ((1.0, 1.0), 128)],
)
def test_a_list_is_spread_where_its_halves_end_sooner_side_by_side(
    curve: tuple[float, ...] | None, bucket: int
) -> None:
    """Two halves take 3.1 x 2 / speed, and have to end within 4.8 ms."""
    rules, waiting = cutting(curve), Waiting()
    slot = put(waiting, rules, 128)
    assert decide(waiting, 2, 0.0, rules) == Call((slot,), bucket)


@pytest.mark.parametrize(
    ("curve", "bucket"),
    [(None, 64), ((1.0, 2.0, 3.0), 64), ((1.0, 1.9, 2.8), 64), ((1.0, 1.9, 2.0), 128), ((1.0, 1.2, 1.25), 128)],
)
def test_nothing_is_spread_at_the_cost_of_who_is_at_work(curve: tuple[float, ...] | None, bucket: int) -> None:
    """Beside one that is at work a second half brings what three get done more than two."""
    rules, waiting = cutting(curve, 3), Waiting()
    slot = put(waiting, rules, 128)
    assert decide(waiting, 2, 0.0, rules, busy=1) == Call((slot,), bucket)


@given(CURVES, st.integers(0, 5), st.integers(1, 5))
def test_who_begins_beside_others_takes_nothing_from_them(curve: tuple[float, ...], busy: int, calls: int) -> None:
    speed = Speed(curve)
    assert speed.beside(busy, calls) >= 1.0
    assert speed.beside(busy, 1) == pytest.approx(speed.contention(busy + 1))
    assert speed.beside(0, calls) == pytest.approx(speed.contention(calls))
    assert Speed().beside(busy, calls) == 1.0


def test_no_more_pieces_slow_each_other_down_than_there_are() -> None:
    """40 candidates are three pieces of 16, though four executors are idle: three at once take 3 / 1.4 ms and not
    4 / 1.4, and one call of 64 takes 3 ms."""
    rules, waiting = shared((1.0, 1.2, 1.4, 1.5)), Waiting()
    slot = put(waiting, rules, 40)
    assert decide(waiting, 4, 0.0, rules) == Call((slot,), 16)


# How soon, and how much.


def test_how_soon_a_request_can_be_done() -> None:
    whole = rules_of(num_executors=4, largest=256)
    for rows in (5, 128, 1000):
        alone = whole.work_ms(rows, 0.0)
        assert shared(FLAT).shortest_ms(rows, 0.0) == pytest.approx(alone)
        four = whole.work_ms(-(-rows // 4), 0.0)
        assert whole.shortest_ms(rows, 0.2) == pytest.approx(0.2 + four)
        assert shared((1.0, 2.0, 3.0, 4.0)).shortest_ms(rows, 0.0) == pytest.approx(min(four, alone))
    pieces = [whole.work_ms(-(-1000 // n), 0.0) * n / CURVE[n - 1] for n in (1, 2, 3)]
    assert shared().shortest_ms(1000, 0.3) == pytest.approx(0.3 + min(pieces))


@given(CURVES, st.integers(0, 1024))
def test_on_a_shared_device_nothing_is_quicker_than_on_as_many_that_are_independent(
    curve: tuple[float, ...], rows: int
) -> None:
    rules, best = shared(curve, len(curve)), rules_of(num_executors=len(curve), largest=256)
    assert rules.shortest_ms(rows, 0.0) <= rules.work_ms(rows, 0.0) + 1e-9
    assert rules.shortest_ms(rows, 0.0) >= min(best.work_ms(-(-rows // n), 0.0) for n in range(1, len(curve) + 1)) * (
        1 - 1e-9
    )
    assert 1.0 <= rules.speed <= len(curve) + 1e-9
    assert best.speed == len(curve)


def admitted(rules: Rules | Mix, limits: Limits = ROOMY, timeout_ms: float = 100.0) -> int:
    """How many requests of 256 are let in that come at once with the same deadline."""
    ledger = Ledger[int](rules, limits)
    for number in range(1000):
        try:
            ledger.comes(ledger.accept(number, Asked(256, True, timeout_ms / 1e3), 0.0))
        except Overloaded:
            return number
    raise AssertionError("nobody is refused")


def test_as_many_are_let_in_as_can_be_done_on_one_device() -> None:
    one, four = rules_of(num_executors=1, largest=256), rules_of(num_executors=4, largest=256)
    alone = admitted(one)
    assert admitted(shared(FLAT)) == alone
    assert admitted(four) > 3 * alone
    assert 1.3 * alone < admitted(shared()) < 1.9 * alone


def test_the_limit_of_what_waits_is_in_time_until_it_is_done() -> None:
    tight = Limits(10**9, 100.0)
    of = [admitted(rules, tight, 1e9) for rules in (rules_of(1, 256), shared(FLAT), shared(), rules_of(4, 256))]
    assert of[0] == of[1]
    assert of[2] == pytest.approx(1.6 * of[0], abs=2)
    assert of[3] == pytest.approx(4.0 * of[0], abs=4)


def test_kinds_count_for_what_they_get_done() -> None:
    gpu, cpu = shared(num_executors=4), wide_rules(2)
    mix = Mix([gpu, cpu])
    assert mix.speed == pytest.approx(1.6 + 2.0)
    assert mix.num_executors == 6
    works = gpu.work_ms(100, 0.0), cpu.work_ms(100, 0.0)
    assert mix.left_ms(100) / mix.speed == pytest.approx(1 / (1.6 / works[0] + 2 / works[1]))
    assert two_kinds(2, 1).speed == 3.0


def test_several_schedules_of_one_device_have_its_speed() -> None:
    cores, made = Cores(), []
    with cores.lock:
        for rules in (shared(), shared(FLAT)):
            made.append(Sharer(Waiting(), 4, threading.Condition(cores.lock), 4, speed=rules.speed))
            cores.join(made[-1])
            made[-1].waiting.let_run(made[-1].waiting.add(0.0, NEVER, NEVER, 8.0, 100, True))
        cores.take("a seat", made[0])
        cores.take("another one", made[1])
        cores.take("one of another kind", made[1], 1)
        assert (cores.busy(), cores.busy(1), cores.busy(2)) == (2, 1, 0)
        cores.give_back("a seat")
        cores.give_back("a seat")
        assert cores.busy() == 1
    assert (cores.count, cores.speed) == (4, 1.6)
    assert cores.waiting_ms() == pytest.approx(16.0 / 1.6)


# Who shares a call.


@pytest.mark.parametrize(
    ("two_ms", "speed", "users"),
    [(1.2, 1.5, 2), (1.5, 1.5, 1), (1.33, 1.5, 2), (1.34, 1.5, 1), (1.2, 1.9, 1), (1.9, 1.0, 2)],
)
def test_users_share_a_call_where_that_beats_calls_side_by_side(two_ms: float, speed: float, users: int) -> None:
    """Two calls of 1 ms at once take 2 / speed."""
    rules, waiting = shared((1.0, speed), 2), Waiting()
    costs = CostModel(Warmed({(16, 1): 1.0, (16, 2): two_ms, (64, 1): 3.0, (256, 1): 11.0}, speed=(1.0, speed)))
    rules = replace(rules, costs=costs, most_users=lambda bucket: 2)
    slots = [put(waiting, rules, 10, at=float(number)) for number in range(2)]
    assert decide(waiting, 2, 9.0, rules) == Call(tuple(slots[:users]), 16)
    assert decide(waiting, 1, 9.0, rules) == Call(tuple(slots), 16)  # nobody else is there
    independent = replace(rules, costs=CostModel(replace(costs.warmed, speed=None)))
    assert decide(waiting, 2, 9.0, independent) == Call(tuple(slots), 16)


def test_four_users_may_go_in_two_calls() -> None:
    """Four in one take 1.6 ms; two calls of 1.2 at once, of which two get 1.9 times as much done, 1.26."""
    rules, waiting = shared((1.0, 1.9)), Waiting()
    slots = [put(waiting, rules, 10, at=float(number)) for number in range(4)]
    assert decide(waiting, 2, 9.0, rules) == Call(tuple(slots[:2]), 16)
    assert decide(waiting, 1, 9.0, rules, busy=0) == Call(tuple(slots), 16)


# What is learnt.


def test_what_a_call_takes_alone_is_learnt_whatever_the_load() -> None:
    warmed = Warmed({(16, 1): 1.0, (64, 1): 6.0}, encode_ms={64: 12.0}, speed=(1.0, 1.2))
    costs, mixed_in = CostModel(warmed), CostModel(warmed)
    for number in range(400):
        busy = 1 + (number // 40) % 2  # the load comes and goes
        contention = costs.speed.contention(busy)
        costs.saw_score(64, 1, 64, 0.1, 6.0 * contention, contention)
        costs.saw_prepare(False, None, 12.2 * contention, contention)
        costs.saw_prepare(True, None, 0.2, contention)  # no work of the device
        mixed_in.saw_score(64, 1, 64, 0.1, 6.0 * contention)
    assert costs.score(64) == pytest.approx(6.0)
    assert costs.prepare(False) == pytest.approx(12.2)
    assert costs.prepare(True) == pytest.approx(0.2)
    assert costs.errors().slowdown == pytest.approx(1.0)
    assert costs.errors().score < 1e-6
    assert mixed_in.score(64) > 7.0


def test_what_a_call_is_predicted_to_take_is_beside_those_that_are_under_way() -> None:
    ledger = Ledger[int](shared(), ROOMY)
    for number in range(3):
        ledger.comes(ledger.accept(number, Asked(256, True), 0.0))
    works = [ledger.next(4 - busy, 0.0, busy=busy) for busy in range(3)]
    alone = 11.0 + 0.2
    assert [work.predicted_ms for work in works if work] == pytest.approx([alone, alone * 4 / 3, alone * 1.875])


# Several kinds.


def test_a_kind_begins_no_more_calls_than_get_more_done() -> None:
    kinds = (shared(FLAT, 2), wide_rules(1))
    waiting = Waiting(kinds=2)
    for number in range(3):
        slot = waiting.add(number / 1e3, NEVER, NEVER, 11.0, 250, True)
        waiting.prepared[slot] = True
        waiting.let_run(slot)
    gone = Standing(0, (200.0,))
    assert decide_mixed(waiting, 2, 100.0, 0, kinds, [Standing(2), gone])[0] == Call((0,), 256)
    assert decide_mixed(waiting, 1, 100.0, 0, kinds, [Standing(1, (100.01,)), gone]) == (None, NEVER)
    assert decide_mixed(waiting, 2, 100.0, 0, kinds, [Standing(2, (), 1), gone]) == (None, NEVER)  # another schedule's


def test_a_request_is_planned_with_the_time_that_it_takes_beside_others() -> None:
    """256 candidates take about 11 ms on an executor of the device alone, and 22 beside another one there; those of the
    other kind take 16."""
    fast = (1.0, 1.03)
    costs = CostModel(Warmed({(256, 1): 16.0}))
    other = replace(wide_rules(1), costs=costs, cutter=Cutter((256,), costs.score, 1024), spread=False)
    waiting = Waiting(kinds=2)
    slot = waiting.add(0.0, NEVER, NEVER, 11.0, 256, True)
    waiting.prepared[slot] = True
    waiting.let_run(slot)
    both = [Standing(1, (100.05,)), Standing(1)]
    shares, apart = (replace(rules_of(2, 256, speed=curve), spread=False) for curve in (fast, None))
    assert decide_mixed(waiting, 1, 100.0, 1, (shares, other), both)[0] == Call((slot,), 256)
    assert decide_mixed(waiting, 1, 100.0, 1, (apart, other), both)[0] is None


def test_those_of_other_schedules_are_reckoned_with() -> None:
    cores, seats = Cores(), [Seat[object, int](number, number, number // 2) for number in range(3)]
    with cores.lock:
        sharer = Sharer(Waiting(), 3, threading.Condition(cores.lock), 3, kinds=2)
        for seat in ("of another schedule", seats[0]):
            cores.take(seat, sharer)
    ledger = Ledger[object](shared(), ROOMY)
    ledger.comes(ledger.accept(0, Asked(256, True), 0.0))
    seats[0].work, seats[0].since = ledger.next(3, 0.0), 5.0
    found = standings(seats, 2, cores)
    assert (found[0].idle, found[0].busy, found[0].elsewhere) == (1, 2, 1)
    assert (found[1].idle, found[1].busy) == (1, 0)


# All of it, on threads.


class Together(Work):
    """Counts the calls that score at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._lock = threading.Lock()

    def score(self, parts: Sequence[Part[Item]], bucket: int, executor: int) -> list[Float32Array]:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            return super().score(parts, bucket, executor)
        finally:
            with self._lock:
                self.now -= 1


def shown(schedule: Scheduler[Item, list[float], int]) -> dict[str, float]:
    """Gauges of how many executors there are, and what they get done."""
    collector = ScheduleCollector()
    collector.show({("model", "1"): schedule.figures()})
    samples = [sample for metric in collector.collect() for sample in metric.samples]
    names = ("rankd_executors", "rankd_executors_at_once", "rankd_executor_speed")
    return {sample.name: sample.value for sample in samples if sample.name in names}


@pytest.mark.parametrize(("curve", "most"), [(FLAT, 1), ((1.0, 1.5, 1.5, 1.5), 2), (CURVE, 3)])
def test_everybody_is_answered_with_as_many_calls_at_once_as_are_worth_it(curve: tuple[float, ...], most: int) -> None:
    work, numbers = Together(), count(100)
    schedule = Scheduler[Item, list[float], int](range(4), work, shared(curve, 4, 64), ROOMY, [lambda: next(numbers)])
    schedule.start()
    try:
        items = [Item(10_000 * number, (1, 16, 40, 300)[number % 4]) for number in range(120)]
        futures = [schedule.submit(item, asked(item, resident=number % 3 > 0)) for number, item in enumerate(items)]
        assert all(right(item, future) for item, future in zip(items, futures, strict=True))
        (kind,) = schedule.figures().kinds
        assert (kind.num_executors, kind.at_once, kind.speed) == (4, most, curve[most - 1])
        assert shown(schedule) == {
            "rankd_executors": 4,
            "rankd_executors_at_once": most,
            "rankd_executor_speed": kind.speed,
        }
    finally:
        schedule.close()
    assert 1 <= work.most <= most
    assert [item.dropped for item in items] == [1] * len(items)


def test_calls_under_load_are_booked_as_what_they_take_alone() -> None:
    """Two calls at once take 7 ms each of made-up time, where they get 1.03 times as much done as one."""
    booked: list[float] = []
    clock, both = [0.0], threading.Barrier(2)

    def on_prepare() -> None:
        both.wait(PATIENCE)

    def on_score() -> None:
        both.wait(PATIENCE)
        clock[0] = 0.007
        both.wait(PATIENCE)

    rules = rules_of(num_executors=2, speed=(1.0, 1.03))

    def saw_score(bucket: int, users: int, rows: int, rows_ms: float, score_ms: float, contention: float) -> None:
        booked.append(score_ms / contention)

    rules.costs.saw_score = saw_score  # type: ignore[method-assign, assignment]
    schedule = Scheduler[Item, list[float], int](range(2), Work(), rules, ROOMY, [lambda: 9], clock=lambda: clock[0])
    items = [Item(start, 64, on_prepare, on_score) for start in (0, 100)]
    schedule.start()
    try:
        futures = [schedule.submit(item, asked(item, resident=True)) for item in items]
        assert all(right(item, future) for item, future in zip(items, futures, strict=True))
    finally:
        schedule.close()
    assert min(booked) == pytest.approx(7.0 * 1.03 / 2)
    assert max(booked) < 5.0  # at its end the other one may have been gone
