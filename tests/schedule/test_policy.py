"""What an idle executor does next, case by case; and that a decision over a thousand requests stays small work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.schedule.policy import Call, Priority, Rules, decide, place
from rankd.schedule.waiting import NEVER, Waiting
from tests.schedule.made_up import rules_of


def put(
    waiting: Waiting,
    rules: Rules,
    rows: int,
    at: float = 0.0,
    prepared: bool = True,
    resident: bool = False,
    latest: float = NEVER,
    turn: bool = True,
) -> int:
    """A request that can run, as the ledger would have it."""
    work = rules.work_ms(rows, 0.0)
    slot = waiting.add(at, latest, latest, work, rows, resident)
    waiting.prepared[slot] = prepared
    if turn:
        waiting.let_run(slot)
    bucket = rules.cutter.first(rows, rules.cutter.buckets[-1])
    waiting.tail[slot] = bucket if rows <= bucket and (prepared or resident) else 0
    return slot


def test_nothing_to_do() -> None:
    rules, waiting = rules_of(), Waiting()
    assert decide(waiting, 1, 0.0, rules) is None
    slot = put(waiting, rules, 10, turn=False)
    assert decide(waiting, 1, 0.0, rules) is None
    waiting.remove(slot)
    assert decide(waiting, 1, 0.0, rules) is None


def test_the_first_in_the_order_comes_first() -> None:
    rules, waiting = rules_of(), Waiting()
    put(waiting, rules, 100, at=2.0)
    first = put(waiting, rules, 100, at=1.0)
    assert decide(waiting, 1, 5.0, rules) == Call((first,), 64)


def test_a_long_request_goes_in_pieces_of_the_quantum() -> None:
    rules, waiting = rules_of(num_executors=1), Waiting()
    slot = put(waiting, rules, 250)
    assert decide(waiting, 1, 0.0, rules) == Call((slot,), 64)
    assert decide(waiting, 1, 0.0, rules_of(num_executors=1, largest=256)) == Call((slot,), 256)


def test_pieces_are_spread_where_executors_are_idle_and_nobody_waits() -> None:
    rules, waiting = rules_of(num_executors=2, largest=256), Waiting()
    slot = put(waiting, rules, 128)
    assert decide(waiting, 2, 0.0, rules) == Call((slot,), 64)
    assert decide(waiting, 1, 0.0, rules) == Call((slot,), 64)  # as cheap as any cut
    other = put(waiting, rules, 250, at=-1.0)
    assert decide(waiting, 2, 0.0, rules) == Call((other,), 256)  # everybody has something to do
    waiting.remove(other)
    tiny = put(waiting, rules, 5, at=-1.0)
    assert decide(waiting, 4, 0.0, rules) == Call((tiny,), 16)


def test_small_requests_of_several_users_share_a_call_in_their_order() -> None:
    rules, waiting = rules_of(), Waiting()
    slots = [put(waiting, rules, 10 + number, at=float(number)) for number in range(6)]
    put(waiting, rules, 40, at=0.5)
    assert decide(waiting, 1, 9.0, rules) == Call(tuple(slots[:4]), 16)
    for slot in slots[3:]:
        waiting.hold(slot)
    assert decide(waiting, 1, 9.0, rules) == Call(tuple(slots[:2]), 16)  # a call for three was not warmed
    alone = rules_of(most_users=lambda bucket: 1)
    assert decide(waiting, 1, 9.0, alone) == Call((slots[0],), 16)


def test_a_history_to_encode_is_a_call_by_itself_where_others_could_use_it() -> None:
    rules, waiting = rules_of(), Waiting()
    slot = put(waiting, rules, 10, prepared=False)
    assert decide(waiting, 2, 0.0, rules) == Call((slot,), 0)
    assert decide(waiting, 1, 0.0, rules) == Call((slot,), 16)  # nobody is there to help
    waiting.resident[slot] = True
    assert decide(waiting, 2, 0.0, rules) == Call((slot,), 16)
    long = put(waiting, rules, 300, at=-1.0, prepared=False)
    assert decide(waiting, 1, 0.0, rules) == Call((long,), 0)


def test_a_history_is_encoded_on_all_threads_while_nobody_else_needs_them() -> None:
    rules, waiting = replace(rules_of(num_executors=2), encode_wide=True), Waiting()
    slot = put(waiting, rules, 10, prepared=False)
    assert decide(waiting, 2, 0.0, rules) == Call((slot,), 0, wide=True)
    assert decide(waiting, 2, 0.0, replace(rules, num_executors=3)) == Call((slot,), 0)  # the third one is at work
    assert decide(waiting, 1, 0.0, rules) == Call((slot,), 16)
    put(waiting, rules, 10, at=1.0)
    assert decide(waiting, 2, 0.0, rules) == Call((slot,), 0)  # somebody else waits


def test_a_call_is_no_longer_than_the_others_deadlines_allow() -> None:
    rules, waiting = rules_of(largest=256, num_executors=1), Waiting()
    long = put(waiting, rules, 250)
    put(waiting, rules, 10, at=1.0, latest=0.005)
    assert decide(waiting, 1, 0.0, rules) == Call((long,), 64)  # 3 ms, and then it is the other one's turn
    put(waiting, rules, 10, at=1.0, latest=0.002)
    assert decide(waiting, 1, 0.0, rules) == Call((long,), 16)
    waiting.latest[:3] = [NEVER, NEVER, 0.002]
    assert decide(waiting, 2, 0.0, rules) == Call((long,), 256)  # another executor is there for it


def test_what_cannot_be_in_time_is_found() -> None:
    rules, waiting = rules_of(), Waiting()
    put(waiting, rules, 10, latest=1.0)
    late = put(waiting, rules, 10, latest=0.4)
    worked_on = put(waiting, rules, 10, latest=0.4, turn=False)
    waiting.deadline[[late, worked_on]] = 0.9
    assert waiting.passed(0.5) == [late]
    assert waiting.passed(0.9) == [late, worked_on]


@given(st.floats(0, 1e4), st.floats(0, 1e3), st.sampled_from(Priority), st.floats(0, 2e4))
def test_a_place_is_within_its_bounds(arrival: float, work_ms: float, priority: Priority, latest: float) -> None:
    rules = rules_of(fairness_ms=100.0, batch_ms=1000.0)
    found = place(arrival, work_ms, priority, latest, rules)
    most = 0.1 + (1.0 if priority is Priority.BATCH else 0.0)
    assert arrival <= found <= arrival + most + 1e-9
    assert found <= max(latest, arrival)


def test_short_ones_pass_long_ones_and_interactive_ones_pass_batch_ones() -> None:
    rules = rules_of(stretch=4.0, fairness_ms=100.0, batch_ms=1000.0)
    long, short = (place(at, ms, Priority.INTERACTIVE, NEVER, rules) for at, ms in ((0.0, 20.0), (0.05, 2.0)))
    assert short < long
    assert place(0.2, 2.0, Priority.INTERACTIVE, NEVER, rules) > long
    assert place(0.0, 2.0, Priority.BATCH, NEVER, rules) == pytest.approx(1.008)
    assert place(0.0, 20.0, Priority.INTERACTIVE, 0.03, rules) == 0.03  # a deadline moves it forward


def test_slots_are_used_again_and_the_columns_grow() -> None:
    waiting = Waiting(capacity=2)
    slots = [waiting.add(float(n), NEVER, NEVER, 1.0, 10, False) for n in range(5)]
    assert slots == [0, 1, 2, 3, 4]
    assert (waiting.count, waiting.total_rows(), waiting.total_ms()) == (5, 50, 5.0)
    waiting.remove(1)
    assert (waiting.count, waiting.total_rows(), waiting.total_ms()) == (4, 40, 4.0)
    assert waiting.add(9.0, NEVER, NEVER, 1.0, 10, False) == 1
