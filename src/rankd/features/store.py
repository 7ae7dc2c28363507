"""Where histories and features of users come from at serving time.

`FeatureStore` is the protocol; `MemoryStore` is the first one, filled from an artifact's tables or from Parquet.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Protocol

import numpy as np

from rankd.features.catalogue import Catalogue
from rankd.features.schema import FeatureSchema
from rankd.features.tables import ItemTable, UserFeatures, no_user_features
from rankd.types import UserHistory


class FeatureStore(Protocol):
    """What the request path asks for. Every answer is a snapshot: later appends do not change it."""

    def history(self, user_id: str) -> UserHistory | None:
        """The stored events of a user, oldest first; None for a user never seen."""
        ...

    def user_features(self, user_id: str) -> UserFeatures:
        """The features of a user; all missing for a user never seen."""
        ...

    def items(self) -> ItemTable:
        """The item table."""
        ...

    def append(self, user_id: str, events: UserHistory) -> int:
        """Add events to a user, who need not exist; returns how many are stored for the user now.

        When this returns, every later `history` shows them.
        """
        ...

    def user_ids(self, limit: int) -> list[str]:
        """Some users with a history, those with appended events first."""
        ...


class MemoryStore:
    """Histories in memory: the artifact's packed arrays, and a dict of the users that changed since.

    Reads take no lock: an append swaps in a new immutable history. It keeps the newest `stored_history` events a user
    and the newest `max_changed_users` changed or new users; the least recently changed of them falls back to its
    packed history.
    """

    def __init__(self, schema: FeatureSchema, catalogue: Catalogue, max_changed_users: int = 1_000_000) -> None:
        self._schema, self._users, self._items = schema, catalogue.users, catalogue.items
        self._user_ids = catalogue.ids.users
        self._index = {user: position for position, user in enumerate(self._user_ids)}
        self._changed: OrderedDict[str, UserHistory] = OrderedDict()
        self._max_changed = max_changed_users
        self._lock = threading.Lock()

    def history(self, user_id: str) -> UserHistory | None:
        """The stored events of a user, oldest first; None for a user never seen."""
        changed = self._changed.get(user_id)
        if changed is not None:
            return changed
        position = self._index.get(user_id)
        return None if position is None else self._users.history_of(position).last(self._schema.stored_history)

    def user_features(self, user_id: str) -> UserFeatures:
        """The features of a user; all missing for a user never seen."""
        position = self._index.get(user_id)
        if position is None:
            return no_user_features(self._schema)
        return UserFeatures(self._users.categories[position], self._users.numeric[position])

    def items(self) -> ItemTable:
        """The item table."""
        return self._items

    def append(self, user_id: str, events: UserHistory) -> int:
        """Add events to a user, in time order whatever order they come in; returns how many are stored now."""
        with self._lock:
            before = self.history(user_id)
            merged = events if before is None else join(before, events)
            order = np.argsort(merged.times, kind="stable")
            if not np.array_equal(order, np.arange(len(merged))):
                arranged = merged.rows[order], merged.events[order], merged.times[order], merged.values[order]
                merged = UserHistory(*arranged, merged.dropped)
            merged = merged.last(self._schema.stored_history)
            self._changed[user_id] = merged
            self._changed.move_to_end(user_id)
            if len(self._changed) > self._max_changed:
                self._changed.popitem(last=False)
        return len(merged)

    def user_ids(self, limit: int) -> list[str]:
        """Some users with a history, those with appended events first."""
        with self._lock:
            recent = list(reversed(self._changed))[:limit]
        rest = (user for user in self._user_ids if user not in self._changed)
        return recent + [user for user, _ in zip(rest, range(limit - len(recent)), strict=False)]


def join(older: UserHistory, newer: UserHistory) -> UserHistory:
    """One history after the other, copied."""
    return UserHistory(
        np.concatenate([older.rows, newer.rows]),
        np.concatenate([older.events, newer.events]),
        np.concatenate([older.times, newer.times]),
        np.concatenate([older.values, newer.values]),
        older.dropped,
    )


def empty_history(schema: FeatureSchema) -> UserHistory:
    """No events."""
    none = np.zeros(0, np.int32)
    return UserHistory(none, none, np.zeros(0, np.int64), np.zeros((0, len(schema.event_values)), np.float32))
