"""Stored events in a version's own rows, and joined with the artifact's."""

from __future__ import annotations

import numpy as np

from rankd.features.reading.stored_events import merged_history, model_history
from rankd.features.rows.hash_index import HashIndex
from rankd.features.schema import UNKNOWN_ROW
from rankd.features.stores.event_records import RawEvent, appended, pack_events
from rankd.features.stores.store_keys import hash_id
from rankd.features.tables import normalise
from rankd.types import UserHistory
from tests.features.sample_schema import make_schema

SCHEMA = make_schema()
ROWS = HashIndex(np.asarray([hash_id("a"), hash_id("b")], np.uint64), np.asarray([2, 3], np.int32))


def record_of(*events: RawEvent, most: int = 100) -> bytes:
    return appended(None, pack_events(events), most)


def packed(*events: tuple[int, int, int]) -> UserHistory:
    """(row, event, time) each, with the value 0."""
    rows, types, times = zip(*events, strict=True)
    return UserHistory(
        np.asarray(rows, np.int32),
        np.asarray(types, np.int32),
        np.asarray(times, np.int64),
        np.zeros((len(rows), 1), np.float32),
    )


def test_events_come_in_the_order_of_their_times_with_raw_values_normalised() -> None:
    record = record_of(
        RawEvent("b", "view", 20, {"seconds": 3.0}),
        RawEvent("a", "like", 10, {}),
        RawEvent("never heard of", "view", 15, {"seconds": 1.0, "of another version": 7.0}),
    )
    history = model_history(record, SCHEMA, ROWS)
    assert history.rows.tolist() == [2, UNKNOWN_ROW, 3]
    assert [SCHEMA.event_types[event] for event in history.events] == ["like", "view", "view"]
    assert history.times.tolist() == [10, 15, 20]
    raw = np.asarray([np.nan, 1.0, 3.0], np.float32)
    np.testing.assert_array_equal(history.values[:, 0], normalise(SCHEMA.event_values[0], raw))


def test_event_types_of_other_versions_are_passed_over() -> None:
    record = record_of(RawEvent("a", "bought", 1, {}), RawEvent("a", "view", 2, {}))
    assert model_history(record, SCHEMA, ROWS).times.tolist() == [2]


def test_dropped_events_stay_counted() -> None:
    record = record_of(*(RawEvent("a", "view", time, {}) for time in range(5)), most=3)
    history = model_history(record, SCHEMA, ROWS)
    assert (history.times.tolist(), history.dropped) == ([2, 3, 4], 2)


def test_the_artifacts_history_and_the_stored_events_become_one() -> None:
    stored = model_history(record_of(RawEvent("a", "view", 30, {}), RawEvent("b", "like", 5, {})), SCHEMA, ROWS)
    merged = merged_history(packed((2, 1, 10), (3, 1, 20)), stored, 100)
    assert merged.times.tolist() == [5, 10, 20, 30]
    assert merged.rows.tolist() == [3, 2, 3, 2]
    assert merged_history(None, stored, 1).times.tolist() == [30]
    newest = merged_history(packed((2, 1, 10), (3, 1, 20)), stored, 2)
    assert (newest.times.tolist(), newest.dropped) == ([20, 30], 2)


def test_an_event_that_the_log_has_too_counts_once() -> None:
    """The artifact was built from a log that holds what was stored meanwhile."""
    stored = model_history(
        record_of(RawEvent("a", "view", 10, {}), RawEvent("a", "view", 11, {}), RawEvent("a", "like", 10, {})),
        SCHEMA,
        ROWS,
    )
    merged = merged_history(packed((2, 1, 10), (3, 1, 20)), stored, 100)
    assert merged.times.tolist() == [10, 10, 11, 20]
    assert sorted(merged.events.tolist()) == [0, 1, 1, 1]
    assert merged_history(packed((2, 1, 10), (2, 0, 10), (2, 1, 11)), stored, 100).times.tolist() == [10, 10, 11]
