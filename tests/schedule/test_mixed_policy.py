"""What an idle executor does where others are of another kind, case by case, and what holds in any case."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.schedule import policy
from rankd.schedule.costs import CostModel, Warmed
from rankd.schedule.kinds import Standing
from rankd.schedule.mixed_policy import SOON_MS, decide
from rankd.schedule.policy import Call, Rules
from rankd.schedule.waiting import NEVER, Waiting
from tests.schedule.made_up import rules_of, two_kinds, wide_rules

QUICK, WIDE = 0, 1
KINDS = two_kinds(quick=1, wide=1).kinds


def waiting_for(kinds: tuple[Rules, ...] = KINDS, *rows: int, resident: bool = True) -> Waiting:
    """Requests that can run, one a millisecond, in slots 0, 1, ..."""
    waiting = Waiting(kinds=len(kinds))
    for number, count in enumerate(rows):
        slot = waiting.add(number / 1e3, NEVER, NEVER, kinds[0].work_ms(count, 0.0), count, resident)
        waiting.prepared[slot] = resident
        waiting.let_run(slot)
        for tail, rules in zip(waiting.tails, kinds, strict=True):
            bucket = rules.cutter.first(count, rules.cutter.buckets[-1])
            tail[slot] = bucket if resident and count <= bucket else 0
    return waiting


def busy(ms: float) -> Standing:
    """One executor, at work for so long from 100 s on."""
    return Standing(0, (100.0 + ms / 1e3,))


def next_call(waiting: Waiting, kind: int, other: Standing, now: float = 100.0) -> Call | None:
    standings = [Standing(1), other] if kind == QUICK else [other, Standing(1)]
    return decide(waiting, 1, now, kind, KINDS, standings)[0]


def test_a_request_goes_to_who_is_done_with_it_first() -> None:
    short, long = waiting_for(KINDS, 10), waiting_for(KINDS, 1000)
    assert next_call(short, QUICK, Standing(1)) == Call((0,), 16)
    assert next_call(short, WIDE, Standing(1)) is None  # 4 ms, and the other one takes 1
    assert next_call(long, WIDE, busy(50.0)) == Call((0,), 1024)
    assert next_call(long, QUICK, busy(5.0)) is None  # 45 ms, and the other one is done in 11


def test_who_is_busy_is_waited_for_as_long_as_that_is_quicker() -> None:
    short = waiting_for(KINDS, 10)
    assert next_call(short, WIDE, busy(2.0)) is None
    assert next_call(short, WIDE, busy(4.0)) == Call((0,), 32)
    assert next_call(waiting_for(KINDS, 300), QUICK, busy(50.0)) == Call((0,), 64)


def test_what_stands_before_a_request_counts() -> None:
    """A short list each takes the quick one about 1.1 ms; from the fourth on the wide one is no slower."""
    waiting = waiting_for(KINDS, 10, 10, 10, 10, 10, 10)
    assert next_call(waiting, WIDE, busy(0.5)) == Call((3, 4), 32)  # 5 would be a third: calls are for 1, 2, 4 users
    assert next_call(waiting_for(KINDS, 10, 10, 10), WIDE, busy(0.5)) is None


def test_an_executor_passes_what_is_for_others_and_takes_what_is_for_it() -> None:
    waiting = waiting_for(KINDS, 1000, 1000, 10)
    assert next_call(waiting, QUICK, busy(3.0)) == Call((2,), 16)
    assert next_call(waiting, WIDE, busy(3.0)) == Call((0, 1), 1024)


def test_a_kind_that_is_quicker_with_everything_leaves_what_matters_least() -> None:
    """The other one takes half as long again for a call of 16, and 15 times as long for one of 64."""
    base = rules_of(num_executors=1)
    scale = {16: 1.5, 64: 15.0, 256: 15.0}
    costs = CostModel(Warmed({(b, u): ms * scale[b] for (b, u), ms in base.costs.warmed.score_ms.items()}))
    kinds = (base, replace(base, costs=costs, most_users=lambda bucket: 1))
    waiting = waiting_for(kinds, 10, 60, 60)
    both = [Standing(1), Standing(1)]
    assert decide(waiting, 1, 0.0, 0, kinds, both)[0] == Call((1,), 64)
    assert decide(waiting, 1, 0.0, 1, kinds, both)[0] == Call((0,), 16)


def test_nobody_is_passed_by_who_stands_far_behind() -> None:
    waiting = waiting_for(KINDS, 10, 1000)
    assert next_call(waiting, WIDE, busy(2.9)) == Call((1,), 1024)  # the short list is for the other one
    waiting.place[1] = waiting.turn[1] = waiting._places[1] = 0.2
    assert next_call(waiting, WIDE, busy(2.9)) is None
    assert next_call(waiting, WIDE, busy(3.5)) == Call((0,), 32)


def test_many_idle_executors_do_what_one_elsewhere_would_take_longer_for() -> None:
    kinds = two_kinds(quick=4, wide=1).kinds
    waiting, standings = waiting_for(kinds, 256), [Standing(4), busy(30.0)]
    assert decide(waiting, 4, 100.0, QUICK, kinds, standings)[0] == Call((0,), 64)
    assert decide(waiting, 1, 100.0, QUICK, kinds, [Standing(1), busy(1.0)])[0] is None


def test_a_call_is_no_longer_than_the_others_deadlines_allow() -> None:
    kinds = (rules_of(num_executors=1, largest=256), wide_rules(1))
    waiting = waiting_for(kinds, 250, 10)
    waiting.latest[1] = 100.005
    assert decide(waiting, 1, 100.0, QUICK, kinds, [Standing(1), busy(60.0)])[0] == Call((0,), 64)


def test_a_request_that_is_alone_is_shared_by_executors_of_both_kinds() -> None:
    kinds = (rules_of(num_executors=1, largest=256), rules_of(num_executors=1, largest=256, scale=1.5))
    waiting = waiting_for(kinds, 320)
    both = [Standing(1), Standing(1)]
    first, _ = decide(waiting, 1, 0.0, 0, kinds, both)
    assert first == Call((0,), 256)  # 11 ms, and the other one's 64 are done in 5
    second, _ = decide(waiting, 1, 0.0, 1, kinds, both)
    assert second == Call((0,), 64)
    whole = tuple(replace(rules, spread=False) for rules in kinds)
    assert decide(waiting, 1, 0.0, 1, whole, both)[0] is None


def test_a_history_is_encoded_where_that_is_quicker() -> None:
    """5.2 ms here, 2.2 ms there; then others score."""
    waiting = waiting_for(KINDS, 30, resident=False)
    assert next_call(waiting, WIDE, Standing(1)) == Call((0,), 32)
    assert next_call(waiting, QUICK, Standing(1)) is None
    assert next_call(waiting, QUICK, busy(30.0)) == Call((0,), 0)


def test_when_to_ask_again() -> None:
    short = waiting_for(KINDS, 10)
    assert decide(short, 1, 100.0, WIDE, KINDS, [busy(2.0), Standing(1)])[1] == pytest.approx(100.0025)
    assert decide(short, 1, 100.0, WIDE, KINDS, [Standing(1), Standing(1)])[1] == pytest.approx(100.0 + SOON_MS / 1e3)
    assert decide(waiting_for(), 1, 100.0, WIDE, KINDS, [Standing(1), Standing(1)]) == (None, NEVER)


def test_a_call_that_takes_longer_than_was_predicted_is_not_waited_for_without_end() -> None:
    """It is late, and is reckoned to take as long again as it is late: after 3 ms the others are quicker."""
    waiting = waiting_for(KINDS, 10)
    assert next_call(waiting, WIDE, busy(-1.0)) is None
    assert next_call(waiting, WIDE, busy(-4.0)) == Call((0,), 32)


def test_what_a_kind_has_failed_goes_to_another_as_long_as_there_is_one() -> None:
    short, long = waiting_for(KINDS, 10), waiting_for(KINDS, 1000)
    short.failed_on[0], long.failed_on[0] = QUICK + 1, WIDE + 1
    assert next_call(short, QUICK, Standing(1)) is None
    assert next_call(short, QUICK, busy(1000.0)) is None
    assert next_call(short, WIDE, Standing(1)) == Call((0,), 32)
    assert next_call(long, WIDE, Standing(1)) is None  # not even a part of it
    assert next_call(long, QUICK, Standing(1)) == Call((0,), 64)
    assert next_call(short, QUICK, Standing(0)) == Call((0,), 16)  # there is nobody else
    short.remove(0)
    assert short.failed_on[0] == 0


def test_a_kind_without_executors_gets_nothing() -> None:
    assert next_call(waiting_for(KINDS, 10), WIDE, Standing(0)) == Call((0,), 32)
    assert next_call(waiting_for(KINDS, 1000), QUICK, Standing(0)) == Call((0,), 64)


SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=50)


@given(SIZES, st.booleans(), st.integers(1, 3), st.integers(1, 3))
def test_if_all_are_idle_somebody_works(rows: list[int], resident: bool, quick: int, wide: int) -> None:
    kinds = two_kinds(quick, wide).kinds
    waiting, standings = waiting_for(kinds, *rows, resident=resident), [Standing(quick), Standing(wide)]
    calls = [decide(waiting, standings[kind].idle, 9.0, kind, kinds, standings)[0] for kind in (QUICK, WIDE)]
    assert calls != [None, None]


@given(SIZES, st.integers(0, 1), st.floats(0, 1e3))
def test_nobody_waits_without_end_for_one_that_hangs(rows: list[int], kind: int, longest_ms: float) -> None:
    waiting = waiting_for(KINDS, *rows)
    work_ms = sum(rules.work_ms(count, 0.0) for count in rows for rules in KINDS)
    assert next_call(waiting, kind, busy(longest_ms), now=100.0 + longest_ms / 1e3 + work_ms / 1e3) is not None


@given(SIZES, st.booleans(), st.integers(1, 4), st.integers(0, 3))
def test_one_kind_decides_as_if_there_were_no_others(rows: list[int], resident: bool, idle: int, more: int) -> None:
    rules = rules_of(num_executors=idle + more)
    waiting = waiting_for((rules,), *rows, resident=resident)
    call, again = decide(waiting, idle, 9.0, 0, (rules,), [Standing(idle, (9.5,) * more)])
    assert (call, again) == (policy.decide(waiting, idle, 9.0, rules), math.inf)


@given(SIZES, st.integers(0, 1), st.floats(0, 100))
def test_a_call_is_one_that_its_kind_can_make(rows: list[int], kind: int, ms: float) -> None:
    kinds = (rules_of(num_executors=1), wide_rules(1))
    call = next_call(waiting_for(kinds, *rows), kind, busy(ms))
    if call is not None:
        assert call.bucket in kinds[kind].cutter.buckets
        assert len(call.slots) <= kinds[kind].most_users(call.bucket)
        assert all(rows[slot] <= call.bucket for slot in call.slots[1:])
        assert list(call.slots) == sorted(call.slots)
