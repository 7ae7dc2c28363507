"""Histories against a plain model: who appended sees it, fresh is fresh, nothing counts twice, memory is bounded."""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from random import Random
from typing import cast

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rankd.errors import StoreFailure, Trouble
from rankd.features.feature_config import MIB, HistoriesConfig, Mode
from rankd.features.reading.history_table import ENTRY_BYTES, AskedHistory, Freshness, HistoryNow, HistoryTable
from rankd.features.reading.outbox import Outbox
from rankd.features.stores.memory_store import MemoryStore
from rankd.features.stores.store_keys import history_key
from rankd.types import UserHistory
from tests.features.reading.remote_store import Call, RemoteStore
from tests.features.stores.event_samples import identities, records

TINY, ROOMY = 2 * ENTRY_BYTES, 1 << 20
"""Budgets in bytes; TINY has room for one short history."""
TOKEN = 7


class MemoryOutbox:
    """An outbox without a disk and without a thread: the test delivers."""

    def __init__(self) -> None:
        self.pending: dict[int, tuple[bytes, bytes]] = {}
        self._last = 0

    @property
    def undelivered(self) -> int:
        return len(self.pending)

    def add(self, key: bytes, records: bytes, most: int) -> int:
        self._last += 1
        self.pending[self._last] = key, records
        return self._last

    def delivered(self, number: int) -> None:
        self.pending.pop(number, None)

    def undelivered_of(self, key: bytes) -> list[bytes]:
        return [records for owner, records in list(self.pending.values()) if owner == key]


class Subject:
    """Histories over a store that does what the test says; at most 1000 events of a user are kept."""

    def __init__(self, mode: Mode = Mode.SYNC, budget: int = ROOMY, outbox: bool = False) -> None:
        self.store, self.outbox = RemoteStore(), MemoryOutbox() if outbox else None
        config = HistoriesConfig(mode, budget / MIB)
        self.table = HistoryTable("m", self.store, config, cast(Outbox, self.outbox) if outbox else None)
        self.table.most = 1000

    def now(self, asked: AskedHistory, token: int = TOKEN) -> tuple[list[int], Freshness]:
        """The ids of the events, and how far they are trusted."""
        now = self.table.now(asked, token)
        return identities(now.record), now.freshness

    def ask(self, user: str = "u") -> tuple[list[int], Freshness]:
        """Ask and read at once."""
        return self.now(self.table.ask(user))

    def elsewhere(self, *events: int, user: str = "u") -> None:
        """Another server appends."""
        self.store.append_elsewhere(history_key("m", user), records(*events)).result()

    def deliver(self) -> None:
        """The outbox gives the store what it has."""
        assert self.outbox is not None
        for number, (key, added) in list(self.outbox.pending.items()):
            self.store.append_elsewhere(key, added).result()
            self.outbox.delivered(number)


def decoded(*events: int) -> UserHistory:
    """What a version makes of a record with these events, as far as these tests care."""
    times = np.asarray(events, np.int64)
    none = np.zeros(len(events), np.int32)
    return UserHistory(none, none, times, np.zeros((len(events), 1), np.float32))


@pytest.fixture(params=[Mode.SYNC, Mode.ASYNC])
def mode(request: pytest.FixtureRequest) -> Mode:
    found: Mode = request.param
    return found


@pytest.fixture(params=[0, TINY, ROOMY])
def budget(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


def test_events_of_this_server_and_of_others_are_seen(mode: Mode, budget: int) -> None:
    """Whatever is kept here: also without any memory for it."""
    subject = Subject(mode, budget)
    assert subject.ask() == ([], Freshness.FRESH)
    assert subject.table.append("u", records(1, 2))
    assert subject.ask() == ([1, 2], Freshness.FRESH)
    subject.elsewhere(3)
    subject.store.tell_all()
    assert subject.ask() == ([1, 2, 3], Freshness.FRESH)
    subject.table.append("u", records(3, 4))
    subject.store.tell_all()
    assert subject.ask() == ([1, 2, 3, 4], Freshness.FRESH)
    assert subject.ask("somebody else") == ([], Freshness.FRESH)
    figures = subject.table.figures()
    assert figures.kept_bytes <= figures.budget_bytes == budget
    assert subject.table.recent_users(5) == ["u"]


def test_in_sync_mode_the_store_is_asked_each_time_and_sends_what_changed() -> None:
    subject = Subject()
    subject.elsewhere(1)
    for _ in range(3):
        assert subject.ask() == ([1], Freshness.FRESH)
    subject.elsewhere(2)
    assert subject.ask() == ([1, 2], Freshness.FRESH)
    figures = subject.table.figures()
    assert (figures.asked, figures.sent, figures.kept) == (4, 2, 1)
    assert figures.freshness == {"fresh": 4, "stale": 0, "default": 0}


def test_in_async_mode_the_store_is_asked_while_it_tells_nothing() -> None:
    subject = Subject(Mode.ASYNC)
    subject.elsewhere(1)
    assert subject.ask() == ([1], Freshness.FRESH)
    assert subject.ask() == ([1], Freshness.FRESH)
    subject.elsewhere(2)
    subject.store.tell_all()
    assert subject.ask() == ([1, 2], Freshness.FRESH)
    assert subject.table.figures().asked == 1
    subject.store.mute()
    subject.elsewhere(3)
    assert subject.ask() == ([1, 2, 3], Freshness.FRESH)
    assert subject.ask() == ([1, 2, 3], Freshness.FRESH)
    assert subject.table.figures().asked == 3
    subject.elsewhere(4)
    subject.store.unmute()  # it may have missed something
    assert subject.ask() == ([1, 2, 3, 4], Freshness.FRESH)
    assert subject.ask() == ([1, 2, 3, 4], Freshness.FRESH)
    assert subject.table.figures().asked == 4


def test_without_an_answer_what_is_here_is_stale(mode: Mode) -> None:
    subject = Subject(mode)
    subject.elsewhere(1)
    subject.ask()
    subject.store.mute()
    subject.elsewhere(2)
    subject.store.away = Trouble.TIMEOUT
    assert subject.ask() == ([1], Freshness.STALE)
    assert subject.ask("somebody else") == ([], Freshness.DEFAULT)
    subject.store.away, subject.store.holds = None, {"history"}
    asked = subject.table.ask("u")
    assert subject.now(asked) == ([1], Freshness.STALE)  # its time to wait is over
    subject.store.release()
    assert subject.now(asked) == ([1, 2], Freshness.FRESH)


def test_an_answer_that_was_overtaken_changes_nothing() -> None:
    subject = Subject()
    subject.store.holds = {"history"}
    early = subject.table.ask("u")
    subject.store.waiting[0].reach()
    subject.elsewhere(1)
    late = subject.table.ask("u")
    subject.store.release(1)
    subject.store.release(0)
    assert subject.now(late) == subject.now(early) == ([1], Freshness.FRESH)


@pytest.mark.parametrize("heard_first", [True, False])
@pytest.mark.parametrize("contains", [True, False])
def test_an_append_that_is_heard_of_while_a_read_is_under_way_counts_once(heard_first: bool, contains: bool) -> None:
    subject = Subject(Mode.ASYNC)
    subject.elsewhere(1)
    subject.store.tell_all()
    subject.store.holds = {"history"}
    asked = subject.table.ask("u")
    if not contains:
        subject.store.waiting[0].reach()
    subject.elsewhere(2)
    if heard_first:
        subject.store.tell_all()
    subject.store.release()
    subject.store.tell_all()
    subject.store.holds = set()
    assert subject.now(asked) == ([1, 2], Freshness.FRESH)
    assert subject.ask() == ([1, 2], Freshness.FRESH)


def test_nothing_changed_is_said_of_what_was_here_when_it_was_asked() -> None:
    """Whatever became of it meanwhile: it left the memory, or had something put over it."""
    for budget in (TINY, ROOMY):
        subject = Subject(Mode.ASYNC, budget)
        subject.elsewhere(1, 2)
        subject.ask()
        subject.store.unmute()
        subject.store.holds = {"history"}
        asked = subject.table.ask("u")
        for number in range(5):
            other = subject.table.ask(f"other {number}")
            subject.store.release(1)
            assert subject.now(other) == ([], Freshness.FRESH)
        subject.store.release()
        assert subject.now(asked) == ([1, 2], Freshness.FRESH)
        subject.store.holds = set()
        assert subject.ask() == ([1, 2], Freshness.FRESH)


def test_a_history_that_leaves_between_the_question_and_its_use_is_used(mode: Mode) -> None:
    subject = Subject(mode, TINY)
    subject.elsewhere(1, user="u")
    subject.ask("u")  # in async mode the next one asks nobody
    asked = subject.table.ask("u")
    for number in range(5):
        subject.ask(f"other {number}")
    assert subject.table.figures().kept < 5
    assert subject.now(asked) == ([1], Freshness.FRESH)


def test_an_older_answer_does_not_take_the_place_of_one_that_left() -> None:
    subject = Subject(budget=TINY)
    subject.store.holds = {"history"}
    early = subject.table.ask("u")
    subject.store.waiting[0].reach()
    subject.elsewhere(1)
    late = subject.table.ask("u")
    subject.store.release(1)
    for number in range(5):
        subject.table.ask(f"other {number}")
        subject.store.release(1)
    subject.store.release()
    assert subject.now(early) == ([], Freshness.FRESH)
    assert subject.now(late) == ([1], Freshness.FRESH)


def test_without_an_outbox_an_append_that_fails_is_kept_nowhere(mode: Mode) -> None:
    subject = Subject(mode)
    subject.ask()
    subject.store.away = Trouble.DOWN
    with pytest.raises(StoreFailure):
        subject.table.append("u", records(1))
    assert subject.ask()[0] == []
    assert subject.table.recent_users(5) == []
    subject.store.away = None
    assert subject.ask() == ([], Freshness.FRESH)


def test_what_is_not_delivered_is_seen_by_every_request_here(mode: Mode, budget: int) -> None:
    """Also where there is no memory to keep it in, and before any answer came."""
    subject = Subject(mode, budget, outbox=True)
    subject.elsewhere(1)
    subject.store.mute()
    subject.store.away = Trouble.DOWN
    assert not subject.table.append("u", records(2))
    assert not subject.table.append("u", records(3))
    assert subject.ask() == ([2, 3], Freshness.STALE)
    assert subject.table.figures().undelivered == 2
    subject.store.holds = {"history"}
    slow = subject.table.ask("u")
    assert subject.now(slow) == ([2, 3], Freshness.STALE)
    subject.store.away, subject.store.holds = None, set()
    subject.store.release()
    assert subject.now(slow) == ([1, 2, 3], Freshness.FRESH)
    assert subject.ask() == ([1, 2, 3], Freshness.FRESH)
    subject.deliver()
    assert subject.ask() == ([1, 2, 3], Freshness.FRESH)
    assert subject.table.figures().undelivered == 0


def test_what_is_in_the_outbox_from_before_a_restart_is_seen(mode: Mode) -> None:
    subject = Subject(mode, outbox=True)
    assert subject.outbox is not None
    subject.outbox.add(history_key("m", "u"), records(1), 1000)
    subject.store.away = Trouble.DOWN
    assert subject.ask() == ([1], Freshness.STALE)
    subject.table.append("u", records(2))
    shown, freshness = subject.ask()
    assert (sorted(shown), freshness) == ([1, 2], Freshness.STALE)
    subject.store.away = None
    assert subject.ask() == ([1, 2], Freshness.FRESH)


def test_a_read_that_the_outbox_overtakes_shows_what_was_acknowledged(mode: Mode) -> None:
    """It began after the append and saw the store before the delivery, and its answer comes after that."""
    subject = Subject(mode, outbox=True)
    subject.store.mute()
    subject.store.away = Trouble.DOWN
    subject.table.append("u", records(1))
    subject.store.away, subject.store.holds = None, {"history"}
    asked = subject.table.ask("u")
    subject.store.waiting[0].reach()
    subject.deliver()
    subject.store.release()
    assert subject.now(asked) == ([1], Freshness.FRESH)


@pytest.mark.parametrize("known", ["nothing", "what was there", "what comes"])
def test_a_record_that_is_ahead_of_the_store_is_not_taken_for_the_stores(known: str) -> None:
    """Here are one event that is not delivered and one that is confirmed, there are that one and one of another server:
    as many, and the same newest."""
    subject = Subject(outbox=True)
    subject.store.mute()
    subject.elsewhere(1)
    if known == "what was there":
        subject.ask()
    subject.store.holds = {"history"} if known == "what comes" else set()
    asked = subject.table.ask("u") if known == "what comes" else None
    subject.store.away = Trouble.DOWN
    subject.table.append("u", records(2))
    subject.store.away, subject.store.holds = None, set()
    if asked is not None:
        subject.store.release()
        assert subject.now(asked) == ([1, 2], Freshness.FRESH)
    expected = [1, 2, 4]
    if known != "nothing":
        subject.elsewhere(3)
        expected = [1, 2, 3, 4]
    assert subject.table.append("u", records(4))
    for _ in range(2):
        shown, freshness = subject.ask()
        assert (sorted(shown), freshness) == (expected, Freshness.FRESH)
    subject.deliver()
    assert sorted(subject.ask()[0]) == expected
    sent = subject.table.figures().sent
    subject.ask()
    assert subject.table.figures().sent == sent


def test_a_value_that_is_no_history_is_no_answer(mode: Mode) -> None:
    for garbage in (b"short", b"\0" * 24, b"\1" + b"\0" * 99):
        subject = Subject(mode)
        subject.store.inner.put([(history_key("m", "u"), garbage)]).result()
        assert subject.ask() == ([], Freshness.DEFAULT)
        subject.store.inner.delete([history_key("m", "u")]).result()
        subject.elsewhere(1)
        assert subject.ask() == ([1], Freshness.FRESH)
        subject.store.inner.put([(history_key("m", "u"), garbage)]).result()
        subject.store.unmute()
        assert subject.ask() == ([1], Freshness.STALE)


def test_a_local_store_is_asked_each_time() -> None:
    store = MemoryStore()
    table = HistoryTable("m", store, HistoriesConfig())
    table.most = 1000

    def now() -> HistoryNow:
        asked = table.ask("u")
        assert asked.landed is None
        return table.now(asked, TOKEN)

    assert now() == HistoryNow(b"", None, None, Freshness.FRESH)
    assert table.append("u", records(1))
    first = now()
    assert identities(first.record) == [1]
    table.keep_decoded(history_key("m", "u"), first, TOKEN, decoded(1))
    again = now()
    assert again.decoded is not None
    assert again.record is None
    store.append(history_key("m", "u"), records(2), 1000).result()  # another process
    assert identities(now().record) == [1, 2]
    table.keep_decoded(history_key("m", "u"), now(), TOKEN, decoded(1, 2))
    assert now().decoded is not None
    table.forget_decoded(TOKEN)
    assert now().decoded is None
    assert identities(now().record) == [1, 2]
    store.put([(history_key("m", "u"), b"no history")]).result()
    assert now().freshness is Freshness.DEFAULT


def test_what_versions_decoded_is_kept_until_the_record_changes_or_they_go() -> None:
    subject = Subject()
    key = history_key("m", "u")
    subject.elsewhere(1)
    for token in (1, 2):
        now = subject.table.now(subject.table.ask("u"), token)
        assert now.decoded is None
        subject.table.keep_decoded(key, now, token, decoded(1))
    bytes_of_two = subject.table.figures().kept_bytes
    for token in (1, 2):
        found = subject.table.now(subject.table.ask("u"), token).decoded
        assert found is not None
        assert found.times.tolist() == [1]
    subject.table.forget_decoded(1)
    assert subject.table.figures().kept_bytes < bytes_of_two
    assert subject.table.now(subject.table.ask("u"), 1).decoded is None
    assert subject.table.now(subject.table.ask("u"), 2).decoded is not None
    before = subject.table.now(subject.table.ask("u"), 1)
    subject.elsewhere(2)
    assert subject.table.now(subject.table.ask("u"), 2).decoded is None
    subject.table.keep_decoded(key, before, 1, decoded(1))  # of the record before: too late
    assert subject.table.now(subject.table.ask("u"), 1).decoded is None


def test_the_least_recently_used_histories_leave_first(mode: Mode) -> None:
    subject = Subject(mode, budget=3 * ENTRY_BYTES)
    subject.store.unmute()
    for user in ("a", "b", "c", "a", "d"):
        subject.ask(user)
    asked = subject.table.figures().asked
    assert subject.table.figures().kept == 3
    subject.ask("a")
    assert subject.table.figures().asked == asked + (mode is Mode.SYNC)
    subject.ask("b")
    assert subject.table.figures().asked == asked + 1 + (mode is Mode.SYNC)


def test_only_this_namespace_is_heard_of() -> None:
    subject = Subject(Mode.ASYNC)
    subject.ask()
    subject.store.append_elsewhere(history_key("another", "u"), records(1)).result()
    subject.store.tell_all()
    assert subject.ask() == ([], Freshness.FRESH)
    assert subject.table.figures().asked == 1


@pytest.mark.parametrize("budget", [TINY, ROOMY])
@pytest.mark.parametrize("outbox", [True, False])
def test_read_your_writes_among_threads(mode: Mode, budget: int, outbox: bool) -> None:
    """Answers come on a thread of the store, in any order, some never; a subscription tells, breaks and comes back."""
    subject, numbers, quiet = Subject(mode, budget, outbox), count(1), threading.Event()
    subject.store.holds = {"history", "append"}
    acknowledged: dict[str, set[int]] = {"u": set(), "v": set()}

    def serve() -> None:
        random, store = Random(1), subject.store
        while not quiet.wait(0.0 if store.waiting else 0.0002):
            if store.waiting:
                call = store.take(random.randrange(len(store.waiting)))
                call.fail() if random.random() < 0.1 else call.answer()
            if store.pushes and random.random() < 0.7:
                store.tell()
            if random.random() < 0.02:
                store.mute() if store.listening() else store.unmute()
            if outbox and random.random() < 0.2:
                subject.deliver()

    def live(user: str) -> list[str]:
        wrong = []
        for _ in range(200):
            event = next(numbers)
            with suppress(StoreFailure):
                subject.table.append(user, records(event))
                acknowledged[user].add(event)
            expected = set(acknowledged[user])
            asked = subject.table.ask(user)
            if asked.landed is not None:
                asked.landed.result(20)
            shown, freshness = subject.now(asked)
            if freshness is Freshness.FRESH and not expected <= set(shown):
                wrong.append(f"{user} misses {expected - set(shown)}")
            if len(shown) != len(set(shown)):
                wrong.append(f"{user} has events twice")
        return wrong

    with ThreadPoolExecutor(5) as pool:
        serving = pool.submit(serve)
        living = [pool.submit(live, user) for user in "uuvv"]
        wrong = [one.result(60) for one in living]
        quiet.set()
        serving.result(20)
    assert wrong == [[]] * 4
    assert subject.table._heard == {}
    assert subject.table.figures().kept_bytes <= budget


class Question:
    """A request on its way, with what it must show."""

    def __init__(self, asked: AskedHistory, user: str, mine: set[int], known: set[int], pending: set[int]) -> None:
        self.asked, self.user = asked, user
        self.mine, self.known, self.pending = frozenset(mine), frozenset(known), frozenset(pending)


class HistoryMachine(RuleBasedStateMachine):
    """Everything that can happen to the histories of two users, in any order.

    `mine` are the acknowledged events of this server, `known` those of all, `tried` all that were ever sent.
    """

    USERS = st.sampled_from(["u", "v"])

    @initialize(
        mode=st.sampled_from(Mode), budget=st.sampled_from([0, TINY, 2 * TINY, ROOMY, ROOMY]), outbox=st.booleans()
    )
    def start(self, mode: Mode, budget: int, outbox: bool) -> None:
        self.subject, self.roomy = Subject(mode, budget, outbox), budget == ROOMY
        self.store, self.table = self.subject.store, self.subject.table
        self.store.holds = {"history", "append"}
        self.pool = ThreadPoolExecutor(4)
        self.next = 1
        self.mine, self.known, self.tried = (defaultdict[str, set[int]](set) for _ in range(3))
        self.questions: list[Question] = []
        self.appends: list[tuple[Call, Future[bool], str, set[int]]] = []
        self.delivering: list[int] = []

    def new(self, user: str, number: int) -> tuple[bytes, set[int]]:
        events = range(self.next, self.next + number)
        self.next += number
        self.tried[user] |= set(events)
        return records(*events), set(events)

    def pending(self, user: str) -> set[int]:
        """Acknowledged here and not delivered."""
        outbox = self.subject.outbox
        waiting = outbox.undelivered_of(history_key("m", user)) if outbox is not None else []
        return self.mine[user] & {one for added in waiting for one in identities(b"\0" * 24 + added)}

    def reads(self) -> list[Call]:
        return [call for call in self.store.waiting if call.kind == "history"]

    @rule(user=USERS)
    def ask(self, user: str) -> None:
        mine, known, pending = set(self.mine[user]), set(self.known[user]), self.pending(user)
        asked = self.table.ask(user)
        if asked.landed is None:  # in async mode the store is not asked: what it has told counts
            untold = {one for _, added in self.store.pushes for one in identities(b"\0" * 24 + added)}
            known -= untold
        self.questions.append(Question(asked, user, mine, known, pending))

    @precondition(lambda self: self.reads())
    @rule(data=st.data(), how=st.sampled_from(["answer", "answer", "reach", "fail"]))
    def read(self, data: st.DataObject, how: str) -> None:
        call = data.draw(st.sampled_from(self.reads()))
        if how != "reach":
            self.store.waiting.remove(call)
        getattr(call, how)()

    @precondition(lambda self: len(self.appends) < 3)
    @rule(user=USERS, count=st.integers(1, 2))
    def begin_append(self, user: str, count: int) -> None:
        added, events = self.new(user, count)
        before = len(self.store.waiting)
        done = self.pool.submit(self.table.append, user, added)
        self.store.wait_for(before + 1)
        self.appends.append((self.store.waiting[-1], done, user, events))

    @precondition(lambda self: self.appends)
    @rule(data=st.data(), how=st.sampled_from(["answer", "answer", "reach", "fail", "reach and fail"]))
    def end_append(self, data: st.DataObject, how: str) -> None:
        one = data.draw(st.sampled_from(self.appends))
        call, done, user, events = one
        if how.startswith("reach"):
            call.reach()
        if how == "reach":
            return
        self.store.waiting.remove(call)
        self.appends.remove(one)
        call.answer() if how == "answer" else call.fail()
        try:
            assert done.result(20) == (how == "answer")
        except StoreFailure:
            assert self.subject.outbox is None
        else:
            self.mine[user] |= events
            self.known[user] |= events

    @rule(user=USERS, count=st.integers(1, 2))
    def append_elsewhere(self, user: str, count: int) -> None:
        added, events = self.new(user, count)
        self.store.append_elsewhere(history_key("m", user), added).result()
        self.known[user] |= events

    @precondition(lambda self: self.store.pushes)
    @rule()
    def tell(self) -> None:
        self.store.tell()

    @rule()
    def mute(self) -> None:
        self.store.mute()

    @precondition(lambda self: not self.store.listening())
    @rule()
    def unmute(self) -> None:
        self.store.unmute()

    @precondition(lambda self: self.subject.outbox is not None and self.subject.outbox.pending)
    @rule()
    def deliver(self) -> None:
        """The store takes it; the outbox hears of that a step or more later."""
        assert self.subject.outbox is not None
        number, (key, added) = next(iter(self.subject.outbox.pending.items()))
        self.store.append_elsewhere(key, added).result()
        self.delivering.append(number)

    @precondition(lambda self: self.delivering)
    @rule()
    def delivered(self) -> None:
        assert self.subject.outbox is not None
        self.subject.outbox.delivered(self.delivering.pop(0))

    @rule(token=st.integers(1, 2))
    def forget(self, token: int) -> None:
        self.table.forget_decoded(token)

    @precondition(lambda self: self.questions)
    @rule(data=st.data(), token=st.integers(1, 2), keep=st.booleans())
    def use(self, data: st.DataObject, token: int, keep: bool) -> None:
        question = data.draw(st.sampled_from(self.questions))
        self.check(question, token, keep)

    def check(self, question: Question, token: int, keep: bool) -> None:
        now, user = self.table.now(question.asked, token), question.user
        shown = identities(now.record)
        assert len(shown) == len(set(shown))
        assert set(shown) <= self.tried[user]
        assert question.pending <= set(shown)
        if now.freshness is Freshness.FRESH:
            assert question.mine <= set(shown)
            assert question.known <= set(shown)
            if self.roomy:
                assert self.mine[user] <= set(shown)  # also what was appended since it was asked
        if now.decoded is not None:
            assert now.decoded.times.tolist() == shown
        elif keep:
            self.table.keep_decoded(history_key("m", user), now, token, decoded(*shown))

    @invariant()
    def memory_is_bounded(self) -> None:
        figures = self.table.figures()
        assert 0 <= figures.kept_bytes <= figures.budget_bytes
        assert figures.kept_bytes == sum(held.size for held in self.table._held.values())
        assert (figures.kept == 0) == (figures.kept_bytes == 0)

    def teardown(self) -> None:
        for call, done, _, _ in self.appends:
            self.store.waiting.remove(call)
            call.answer()
            done.result(20)
        self.store.release_all()
        self.pool.shutdown()
        assert self.table._heard == {}
        for question in self.questions:
            self.check(question, 1, keep=False)
        if self.subject.outbox is not None:
            self.subject.deliver()
        self.store.tell_all()
        for user in ("u", "v"):
            stored = identities(self.store.inner.history(history_key("m", user)).result().record)
            self.store.mute()  # the store is asked
            shown, freshness = self.subject.ask(user)
            assert (sorted(shown), freshness) == (sorted(stored), Freshness.FRESH)
        for token in (1, 2):
            self.table.forget_decoded(token)
        assert all(held.decoded == {} for held in self.table._held.values())
        assert self.table.figures().kept_bytes == sum(
            ENTRY_BYTES + len(held.record or b"") for held in self.table._held.values()
        )


TestHistoryMachine = HistoryMachine.TestCase
TestHistoryMachine.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
