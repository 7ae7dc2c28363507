"""A thread that hangs while it computes a state, is given up, and comes back: nobody gets what it made."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from rankd.engine.backend import StateType
from rankd.states.cache import StateCache
from rankd.states.lending import Origin, StateBusy, Tokens
from rankd.states.state_config import Policy, StateConfig, Storage
from rankd.states.storage import StateLayout
from rankd.types import UserHistory
from tests.states.plain_model import SPECS, PlainExecutor, plain_schema, score_of, tokens_of, truth

SCHEMA = plain_schema(4)
PATIENCE = 20.0


def cache_for(states: int) -> StateCache:
    layout, rooms = StateLayout(SPECS, StateType.FP32, Storage.AUTO), SCHEMA.history_buckets
    budget = states * layout.size_bytes(rooms[-1])
    return StateCache(layout, rooms, True, StateConfig(policy=Policy.LRU), None, budget)


def history_of(*rows: int) -> UserHistory:
    count = len(rows)
    times = np.arange(count, dtype=np.int64) * 86_400
    return UserHistory(np.asarray(rows, np.int32), np.zeros(count, np.int32), times, np.ones((count, 1), np.float32))


def is_right(cache: StateCache, user: str, history: UserHistory) -> bool:
    with cache.held(user, history, lambda: tokens_of(history, SCHEMA), PlainExecutor()) as held:
        return bool(np.array_equal(score_of(held.state), truth(history, SCHEMA)))


class Stalled:
    """A thread that computes a user's state and stops on the way, until `go`."""

    def __init__(self, cache: StateCache, user: str, history: UserHistory) -> None:
        self.executor, self.begun, self.gate = PlainExecutor(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, args=(cache, user, history))
        self._thread.start()
        assert self.begun.wait(PATIENCE)

    def go(self) -> None:
        self.gate.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def _work(self, cache: StateCache, user: str, history: UserHistory) -> None:
        def tokens() -> Tokens:
            self.begun.set()
            assert self.gate.wait(PATIENCE)
            return tokens_of(history, SCHEMA)

        with cache.held(user, history, tokens, self.executor):
            pass


def test_a_state_is_never_another_users_after_a_thread_came_back() -> None:
    cache, mine, others = cache_for(1), history_of(5, 6, 7, 5), history_of(9, 9, 9)
    stalled = Stalled(cache, "u", mine)
    cache.abandon("u", stalled.executor)
    assert is_right(cache, "u", mine)
    stalled.go()
    for user, history in (("x", others), ("u", mine), ("x", others), ("u", mine)):
        assert is_right(cache, user, history)
    assert cache.counts().used_bytes <= cache.counts().budget_bytes


def test_what_was_kept_comes_back_when_the_thread_does() -> None:
    cache, before, after = cache_for(2), history_of(5, 6), history_of(5, 6, 7)
    assert is_right(cache, "u", before)
    stalled = Stalled(cache, "u", after)
    cache.abandon("u", stalled.executor)
    assert cache.counts().used_bytes > 0  # it may still write there
    stalled.go()
    for user in ("x", "y", "z", "u"):
        assert is_right(cache, user, after)
    assert cache.counts().unkept == 0


@pytest.mark.parametrize("whose", ["the one that hangs", "another one"])
def test_only_the_one_that_hangs_is_abandoned(whose: str) -> None:
    cache, history, called = cache_for(2), history_of(5, 6), list[int]()
    stalled = Stalled(cache, "u", history)
    then: Callable[[], None] = lambda: called.append(1)  # noqa: E731 - a callback
    assert cache.when_free("u", then)
    cache.abandon("u", stalled.executor if whose == "the one that hangs" else PlainExecutor())
    assert called == ([1] if whose == "the one that hangs" else [])
    if whose == "another one":
        held = cache.held("u", history, lambda: tokens_of(history, SCHEMA), PlainExecutor(), wait=False)
        with pytest.raises(StateBusy), held:
            pass
    stalled.go()
    assert called == [1]
    assert not cache.when_free("u", then)
    with cache.held("u", history, lambda: tokens_of(history, SCHEMA), PlainExecutor()) as again:
        assert again.origin is (Origin.ENCODED if whose == "the one that hangs" else Origin.CACHED)
