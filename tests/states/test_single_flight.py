"""Threads: one computes, the others wait; deadlines count while waiting; nobody reads what is being written."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rankd.engine.backend import StateType
from rankd.errors import DeadlineExceeded
from rankd.features.reading.stored_events import empty_history, join
from rankd.states.cache import StateCache
from rankd.states.lending import Origin
from rankd.states.state_config import Policy, StateConfig, Storage
from rankd.states.storage import StateLayout
from rankd.types import Array, UserHistory
from tests.features.sample_schema import make_history
from tests.states.plain_model import SPECS, PlainExecutor, plain_schema, score_of, tokens_of, truth

SCHEMA = plain_schema(window_step=4)


def cache_for(users: int, policy: Policy = Policy.LRU) -> StateCache:
    layout = StateLayout(SPECS, StateType.FP32, Storage.AUTO)
    size = layout.size_bytes(SCHEMA.history_buckets[-1])
    return StateCache(layout, SCHEMA.history_buckets, True, StateConfig(policy=policy), None, users * size)


class SlowExecutor(PlainExecutor):
    """Encodes when it is allowed to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        self.begun.set()
        assert self.go.wait(20)
        return super().encode(history, into)


def test_a_state_is_computed_once_however_many_ask() -> None:
    cache, executor, history = cache_for(4), SlowExecutor(), make_history([5, 6, 7])

    def ask(_: int) -> Origin:
        with cache.held("u", history, lambda: tokens_of(history, SCHEMA), executor) as held:
            np.testing.assert_array_equal(score_of(held.state), truth(history, SCHEMA))
            return held.origin

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, number) for number in range(6)]
        assert executor.begun.wait(20)
        while cache.counts().waited < 5:
            time.sleep(0.001)
        executor.go.set()
        origins = [one.result() for one in asked]
    assert executor.encoded == 1
    assert sorted(origin.value for origin in origins) == ["cached"] * 5 + ["encoded"]


def test_whoever_waits_has_a_deadline_and_a_failure_is_not_shared() -> None:
    cache, slow, history = cache_for(4), SlowExecutor(), make_history([5, 6, 7])

    def ask() -> None:
        with cache.held("u", history, lambda: tokens_of(history, SCHEMA), slow):
            pass

    slow.fail = RuntimeError("the engine failed")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask)
        assert slow.begun.wait(20)
        late = cache.held("u", history, dict, PlainExecutor(), deadline=time.perf_counter() + 0.01)
        with pytest.raises(DeadlineExceeded, match="another request computed"), late:
            pass
        slow.go.set()
        with pytest.raises(RuntimeError, match="the engine failed"):
            first.result()
    with cache.held("u", history, lambda: tokens_of(history, SCHEMA), PlainExecutor()) as held:
        np.testing.assert_array_equal(score_of(held.state), truth(history, SCHEMA))


def test_when_everything_is_held_a_state_is_computed_and_not_kept() -> None:
    cache, executor = cache_for(1), PlainExecutor()
    first, second = make_history([5] * 8), make_history([6] * 8)
    with cache.held("a", first, lambda: tokens_of(first, SCHEMA), executor) as a:
        with cache.held("b", second, lambda: tokens_of(second, SCHEMA), executor) as b:
            np.testing.assert_array_equal(score_of(b.state), truth(second, SCHEMA))
        np.testing.assert_array_equal(score_of(a.state), truth(first, SCHEMA))
    assert (cache.counts().unkept, cache.counts().users) == (1, 1)


def test_many_threads_many_users_small_memory() -> None:
    """Every answer is of the history that was asked with, while users grow and states leave for each other."""
    cache, random = cache_for(3, Policy.SEGMENTED_LRU), np.random.default_rng(0)
    histories: dict[str, list[UserHistory]] = {}
    for user in "abcdefg":
        known = empty_history(SCHEMA)
        histories[user] = []
        for step in range(12):
            known = join(known, grown(random, step)).last(SCHEMA.stored_history)
            histories[user].append(known)
    truths = {user: [truth(one, SCHEMA) for one in many] for user, many in histories.items()}

    def visit(seed: int) -> None:
        mine, executor = np.random.default_rng(seed), PlainExecutor()
        for step in range(240):
            user, age = "abcdefg"[int(mine.integers(7))], min(step // 20, 11)
            history = histories[user][age]
            with cache.held(user, history, lambda h=history: tokens_of(h, SCHEMA), executor) as held:  # type: ignore[misc]
                np.testing.assert_array_equal(score_of(held.state), truths[user][age])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(visit, seed) for seed in range(4)]:
            done.result()
    counts = cache.counts()
    assert sum(counts.origins.values()) == 4 * 240
    assert counts.used_bytes <= counts.budget_bytes
    assert counts.origins["extended"] > 0
    assert counts.evicted > 0


def grown(random: np.random.Generator, step: int) -> UserHistory:
    """A few events of one day."""
    size = int(random.integers(1, 4))
    rows = random.integers(1, 31, size).astype(np.int32)
    times = np.full(size, step * 86_400, np.int64)
    return UserHistory(rows, random.integers(0, 2, size).astype(np.int32), times, np.ones((size, 1), np.float32))
