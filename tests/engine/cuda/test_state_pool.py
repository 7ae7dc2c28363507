"""The pool of states in GPU memory: nobody finds a stale or foreign state, pages have one owner, the coldest leave."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.engine.cuda import state_pool
from rankd.engine.cuda.paged_states import PageType, StateShape, pages_of
from rankd.engine.cuda.state_pool import PlacedState, StatePool, pages_within
from rankd.errors import EngineFailure
from tests.engine.cuda.interpreted_device import InterpretedDevice

SHAPE = StateShape(2, 1, 1, 1, 16, 3, torch.float32, PageType.FP32)
MARKS = [b"a", b"b", b"c", b"d"]


def pool_of(users: int, keeps: bool = True) -> StatePool:
    return StatePool(InterpretedDevice(), SHAPE, users * SHAPE.pages_a_user, keeps)


def lengths_of(mark: bytes) -> tuple[int, int]:
    """A mark names its contents, lengths included: so many tokens, as the mark has letters."""
    return (10 * len(mark), 5)


def bring(pool: StatePool, *marks: bytes) -> list[PlacedState]:
    """A call that scores states; whether each was there."""
    held = pool.hold([(mark, lengths_of(mark)) for mark in marks])
    pool.release(held, True)
    return held


@dataclass
class Calls:
    """Calls that begin and end in any order, on pages that remember what was written to them."""

    pool: StatePool
    written: dict[int, tuple[bytes, int, int]] = field(default_factory=dict)
    reading: list[list[tuple[bytes, PlacedState]]] = field(default_factory=list)
    made: list[tuple[bytes, PlacedState]] = field(default_factory=list)

    def begin(self, marks: list[bytes]) -> None:
        """Score states of these marks."""
        held = self.pool.hold([(mark, lengths_of(mark)) for mark in marks])
        for mark, placed in zip(marks, held, strict=True):
            if not placed.there:
                self.write(mark, placed, (0, 0), lengths_of(mark))
        self.reading.append(list(zip(marks, held, strict=True)))
        self.check()

    def end(self) -> None:
        """The oldest call is over."""
        if self.reading:
            self.check()
            self.pool.release([placed for _, placed in self.reading.pop(0)], True)

    def grow(self, mark: bytes) -> None:
        """A state and a token more; it is named by the next `name`."""
        longer = mark + mark[:1]
        known, whole = lengths_of(mark), lengths_of(longer)
        (placed,) = self.pool.grow([(mark, known, whole)])
        if placed.there:
            self.read(mark, placed, known)
        else:
            self.write(mark, placed, (0, 0), known)
        self.write(longer, placed, known, whole)
        self.pool.settle([placed], [whole])
        self.made.append((longer, placed))
        self.check()

    def name(self) -> None:
        """The host says what was made last."""
        if self.made:
            mark, placed = self.made.pop()
            self.pool.name(placed, mark)

    def forget(self) -> None:
        """Or nobody does."""
        if self.made:
            self.pool.forget(self.made.pop()[1])

    def write(self, mark: bytes, placed: PlacedState, start: tuple[int, int], end: tuple[int, int]) -> None:
        for block, pages in enumerate(placed.pages):
            for token in range(start[block], end[block]):
                self.written[pages[token // SHAPE.page] * SHAPE.page + token % SHAPE.page] = (mark[:1], block, token)

    def read(self, mark: bytes, placed: PlacedState, lengths: tuple[int, int]) -> None:
        for block, pages in enumerate(placed.pages):
            for token in range(lengths[block]):
                place = pages[token // SHAPE.page] * SHAPE.page + token % SHAPE.page
                assert self.written[place] == (mark[:1], block, token)

    def check(self) -> None:
        """Who reads a state reads its own; every page is free or has one owner."""
        for call in self.reading:
            for mark, placed in call:
                self.read(mark, placed, lengths_of(mark))
        owners = {id(placed): placed for call in self.reading for _, placed in call}
        owners |= {id(placed): placed for placed in self.pool._listed.values()}
        pages = [page for placed in owners.values() for block in placed.pages for page in block]
        assert sorted(pages + self.pool._free) == list(range(self.pool.num_pages))


STEPS = st.one_of(
    st.tuples(st.just("begin"), st.lists(st.sampled_from([*MARKS, b"aa", b"bb", b"aaa"]), min_size=1, max_size=2)),
    st.tuples(st.just("grow"), st.sampled_from([b"a", b"b", b"aa"])),
    st.tuples(st.sampled_from(["end", "name", "forget"])),
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, max_size=30), keeps=st.booleans())
def test_nobody_reads_what_is_not_his_and_no_page_is_lost(steps: list[tuple[object, ...]], keeps: bool) -> None:
    calls = Calls(pool_of(6, keeps))
    for name, *given_to in steps:
        if name == "begin" and len(calls.reading) == 2:
            calls.end()
        getattr(calls, str(name))(*given_to)
    while calls.reading:
        calls.end()
    while calls.made:
        calls.forget()
    calls.check()
    if not keeps:
        assert calls.pool.counts().used_bytes == 0


def test_the_coldest_leaves_and_what_is_read_stays() -> None:
    pool = pool_of(1)  # 6 pages: three states of two pages
    bring(pool, b"a", b"b")
    bring(pool, b"c")
    bring(pool, b"a")
    bring(pool, b"d")
    assert [pool.has(mark) for mark in MARKS] == [True, False, True, True]
    held = pool.hold([(b"c", lengths_of(b"c"))])  # the coldest after this would be c
    bring(pool, b"b")
    assert [pool.has(mark) for mark in MARKS] == [False, True, True, True]
    pool.release(held, True)
    counts = pool.counts()
    assert (counts.found, counts.sent, counts.evicted, counts.states) == (2, 5, 2, 3)
    assert counts.used_bytes == counts.budget_bytes == 6 * SHAPE.page_bytes


def test_a_state_that_failed_to_come_is_not_found() -> None:
    pool = pool_of(1)
    held = pool.hold([(b"a", (10, 5))])
    pool.release(held, False)
    assert not pool.has(b"a")
    assert pool.counts().used_bytes == 0


def test_one_state_for_all_who_ask_for_it_in_a_call_and_for_no_others_without_a_mark() -> None:
    pool = pool_of(4)
    held = pool.hold([(b"a", (10, 5)), (b"a", (10, 5)), (b"", (10, 5)), (b"", (10, 5))])
    assert held[0] is held[1]
    assert len(set(map(id, held))) == 3
    pool.release(held, True)
    assert pool.counts().states == 1


def test_a_state_that_grows_takes_its_pages_along_unless_somebody_reads_it() -> None:
    pool = pool_of(4)
    (before,) = bring(pool, b"a")
    (grown,) = pool.grow([(b"a", (10, 5), (20, 5))])
    assert grown.there
    assert grown.pages[0][0] == before.pages[0][0]
    assert not pool.has(b"a")
    pool.settle([grown], [(20, 5)])
    pool.name(grown, b"aa")
    held = pool.hold([(b"aa", (20, 5))])
    assert held == [grown]
    (other,) = pool.grow([(b"aa", (20, 5), (30, 5))])
    assert not other.there  # it is being read: the host sends it
    assert not set(other.pages[0]) & set(grown.pages[0])
    assert pool.has(b"aa")


def test_a_call_waits_for_pages_and_says_so_if_there_are_never_any(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(1)
    bring(pool, b"c")
    held = pool.hold([(b"b", (32, 32))])
    monkeypatch.setattr(state_pool, "WAIT_SECONDS", 0.01)
    with pytest.raises(EngineFailure, match="all 6 pages"):
        pool.hold([(b"a", (48, 48))])
    assert pool.has(b"c")  # it would not have been enough: nobody had to leave for that
    pool.release(held, False)
    monkeypatch.setattr(state_pool, "WAIT_SECONDS", 10.0)
    held = pool.hold([(b"a", (48, 48))])
    threading.Timer(0.05, lambda: pool.release(held, True)).start()
    held = pool.hold([(b"b", (48, 48))])
    monkeypatch.setattr(state_pool, "WAIT_SECONDS", 0.01)
    with pytest.raises(EngineFailure, match=r"all 6 pages of states on the GPU were in use .* engine\.gpu_state_mib"):
        pool.grow([(b"", (0, 0), (1, 1))])


def test_a_pool_is_as_large_as_wanted_as_far_as_half_of_what_is_free_goes() -> None:
    page, user = SHAPE.page_bytes, SHAPE.pages_a_user
    assert pages_within(SHAPE, 100 * page, 1000 * page, 1) == 100
    assert pages_within(SHAPE, 100 * page, 60 * page, 1) == 30
    assert pages_within(SHAPE, 0, 1000 * page, 3) == 3 * user  # nothing is kept, but calls need some
    assert pages_within(SHAPE, 100 * page, 0, 3) == user
    assert pages_of(48, SHAPE.page) * SHAPE.blocks == user
