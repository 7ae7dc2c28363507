"""Stored events (`stores/event_records.py`) in a model version's own rows, and joined with the artifact's history.

What is not of this version is passed over: an event type or a value it does not have; an item it does not know becomes
the unknown item. The same normalisation as in training is applied to the raw values.
"""

from __future__ import annotations

import numpy as np

from rankd.features.rows.hash_index import HashIndex
from rankd.features.schema import UNKNOWN_ROW, FeatureSchema
from rankd.features.stores.event_records import counts_of, hash_name, unpack_events
from rankd.features.tables import normalise
from rankd.types import Array, UserHistory


def empty_history(schema: FeatureSchema) -> UserHistory:
    """No events."""
    none = np.zeros(0, np.int32)
    return UserHistory(none, none, np.zeros(0, np.int64), np.zeros((0, len(schema.event_values)), np.float32))


def join(older: UserHistory, newer: UserHistory) -> UserHistory:
    """One history after the other, copied."""
    return UserHistory(
        np.concatenate([older.rows, newer.rows]),
        np.concatenate([older.events, newer.events]),
        np.concatenate([older.times, newer.times]),
        np.concatenate([older.values, newer.values]),
        older.dropped + newer.dropped,
    )


def model_history(record: bytes, schema: FeatureSchema, rows_of_keys: HashIndex) -> UserHistory:
    """A history record as a UserHistory, in the order of the events' times."""
    events = unpack_events(record)
    types = np.full(events.shape[0], -1, np.int32)
    for number, name in enumerate(schema.event_types):
        types[events["event"] == hash_name(name)] = number
    known = types >= 0
    if not known.all():
        events, types = events[known], types[known]
    order = np.argsort(events["time"], kind="stable")
    events, types = events[order], types[order]
    rows = np.empty(events.shape[0], np.int32)
    rows_of_keys.find(np.ascontiguousarray(events["item"]), rows, UNKNOWN_ROW)
    return UserHistory(rows, types, np.ascontiguousarray(events["time"]), _values(events, schema), counts_of(record)[0])


def merged_history(packed: UserHistory | None, stored: UserHistory, most: int) -> UserHistory:
    """The artifact's history and the stored events as one, in the order of their times; the newest `most` stay.

    The log that the artifact was built from may hold events that were stored too: one with the same item, type and
    second as one of the artifact's is the same event.
    """
    if packed is None or len(packed) == 0:
        return stored.last(most)
    new = _not_in(stored, packed)
    if not new.all():
        stored = UserHistory(
            stored.rows[new], stored.events[new], stored.times[new], stored.values[new], stored.dropped
        )
    if len(stored) == 0:
        return packed.last(most)
    merged = join(packed, stored)
    if stored.times[0] < packed.times[-1]:
        order = np.argsort(merged.times, kind="stable")
        arranged = merged.rows[order], merged.events[order], merged.times[order], merged.values[order]
        merged = UserHistory(*arranged, merged.dropped)
    return merged.last(most)


def _not_in(stored: UserHistory, packed: UserHistory) -> Array:
    """(n,) bool: which stored events the artifact's history does not have."""
    new = np.ones(len(stored), bool)
    doubtful = int(np.searchsorted(stored.times, packed.times[-1], side="right"))
    if doubtful:
        known = set(zip(packed.rows.tolist(), packed.events.tolist(), packed.times.tolist(), strict=True))
        head = zip(
            stored.rows[:doubtful].tolist(),
            stored.events[:doubtful].tolist(),
            stored.times[:doubtful].tolist(),
            strict=True,
        )
        new[:doubtful] = [event not in known for event in head]
    return new


def _values(events: Array, schema: FeatureSchema) -> Array:
    """(n, E) float32: raw values by name, normalised; missing ones become the mean."""
    packed = np.zeros((events.shape[0], len(schema.event_values)), np.float32)
    names, numbers = events["values"]["name"], events["values"]["value"]
    for column, value in enumerate(schema.event_values):
        raw = np.full(events.shape[0], np.nan, np.float32)
        for place in range(names.shape[1]):
            np.copyto(raw, numbers[:, place], where=names[:, place] == hash_name(value.name))
        packed[:, column] = normalise(value, raw)
    return packed
