"""The memory store: read your writes, order by time, bounds."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd import Ranker
from rankd.features.store import MemoryStore
from rankd.types import UserHistory


def one(row: int, time: int, width: int) -> UserHistory:
    return UserHistory(
        np.asarray([row], np.int32),
        np.zeros(1, np.int32),
        np.asarray([time], np.int64),
        np.zeros((1, width), np.float32),
    )


def make_store(ranker: Ranker, **limits: int) -> MemoryStore:
    return MemoryStore(ranker.schema, ranker.catalogue, **limits)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=12))
def test_appended_events_are_stored_in_time_order(demo_ranker: Ranker, times: list[int]) -> None:
    store, width = make_store(demo_ranker), len(demo_ranker.schema.event_values)
    for number, time in enumerate(times):
        assert store.append("somebody new", one(2 + number, time, width)) == number + 1
    history = store.history("somebody new")
    assert history is not None
    expected = sorted(range(len(times)), key=lambda number: times[number])
    assert history.rows.tolist() == [2 + number for number in expected]
    assert history.times.tolist() == sorted(times)


def test_an_append_changes_one_user_and_no_answer_given_before(demo_ranker: Ranker) -> None:
    store = make_store(demo_ranker)
    user, other = demo_ranker.catalogue.ids.users[:2]
    before, other_before = store.history(user), store.history(other)
    assert before is not None
    assert other_before is not None
    size = len(before)
    store.append(user, one(2, 2**40 - 1, len(demo_ranker.schema.event_values)))
    after = store.history(user)
    assert after is not None
    assert (len(before), len(after)) == (size, min(size + 1, demo_ranker.schema.stored_history))
    assert after.rows[-1] == 2
    assert store.history(other) is not None
    assert len(other_before) == len(store.history(other) or [])


def test_history_and_changed_users_are_bounded(demo_ranker: Ranker) -> None:
    store, width = make_store(demo_ranker, max_changed_users=2), len(demo_ranker.schema.event_values)
    for number in range(demo_ranker.schema.stored_history + 5):
        store.append("first", one(2, number, width))
    kept = store.history("first")
    assert kept is not None
    assert len(kept) == demo_ranker.schema.stored_history
    assert kept.times[0] == 5
    store.append("second", one(2, 0, width))
    store.append("third", one(2, 0, width))
    assert store.history("first") is None
    assert store.user_ids(2) == ["third", "second"]


def test_concurrent_appends_lose_nothing(demo_ranker: Ranker) -> None:
    store, width = make_store(demo_ranker), len(demo_ranker.schema.event_values)
    threads = [
        threading.Thread(target=lambda: [store.append("shared", one(2, 7, width)) for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history = store.history("shared")
    assert history is not None
    assert len(history) == 200


def test_an_unknown_user_has_no_history(demo_ranker: Ranker) -> None:
    store = make_store(demo_ranker)
    assert store.history("nobody") is None
    assert not store.user_features("nobody").categories.any()
