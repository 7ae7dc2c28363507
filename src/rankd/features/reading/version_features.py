"""The features of one model version: what its model shares (`shared_features.py`), in this version's own rows and
codes.

In: a user and candidate rows. `begin` asks the store for what is not here; when that has come, or its time is over,
`history`, `user` and `fill_items` give what assembly packs. An answer never fails for a row: what did not come is
stale, or what the artifact knows, and `degraded` names it:

    items_stale, items_default, user_stale, user_default    rows older than their TTL; rows that did not come
    history_stale, history_default                          not known to be the newest; the artifact's alone
    store_<trouble>                                         why (see `stores.feature_store.Trouble`)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from rankd.errors import ConfigError, InvalidRequest
from rankd.features.catalogue import Catalogue
from rankd.features.feature_config import FeatureConfig
from rankd.features.reading.history_table import AskedHistory, Freshness
from rankd.features.reading.row_table import AskedRows, Loaded, RowTable
from rankd.features.reading.shared_features import HISTORIES, ITEMS, USERS, FeatureService, SharedFeatures
from rankd.features.reading.stored_events import merged_history, model_history
from rankd.features.requests import raw_events
from rankd.features.rows.hash_index import HashIndex
from rankd.features.rows.row_decoding import RowDecoder
from rankd.features.schema import UNKNOWN_ROW, FeatureSchema
from rankd.features.stores.event_records import MAX_VALUES, pack_events
from rankd.features.stores.feature_store import Trouble
from rankd.features.stores.store_keys import hash_id, hash_ids
from rankd.features.tables import UserFeatures, no_user_features
from rankd.gate import Gate
from rankd.types import Array, Event, Float32Array, Int32Array, RowCounts, UserHistory

log = logging.getLogger("rankd")
_tokens = count(1)


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of an append: events stored for the user now, ids of items that the version does not know (they are
    kept as the unknown item), and whether the store has confirmed it (else the outbox has it)."""

    stored: int
    unknown: tuple[str, ...]
    confirmed: bool


@dataclass(slots=True)
class Fetch:
    """What was asked for a request, and what was found so far. `until` is the moment (seconds of `perf_counter`) up to
    which it waits."""

    user_id: str
    candidates: Int32Array
    until: float | None
    items: AskedRows | None = None
    users: AskedRows | None = None
    history: AskedHistory | None = None
    counts: dict[str, RowCounts] = field(default_factory=dict)
    parts: dict[int, RowCounts] = field(default_factory=dict)
    """Of the items, by the first candidate of each part."""

    @property
    def row_futures(self) -> list[Future[None]]:
        """What rows wait for."""
        return [flight.landed for asked in (self.items, self.users) if asked is not None for flight in asked.flights]

    @property
    def history_futures(self) -> list[Future[bool]]:
        """What the history waits for."""
        return [self.history.landed] if self.history is not None and self.history.landed is not None else []


class VersionFeatures:
    """The features of one model version. Thread-safe.

    Raises:
        ConfigError: the model's events have more values than a store keeps.
    """

    def __init__(self, schema: FeatureSchema, catalogue: Catalogue, shared: SharedFeatures) -> None:
        if len(schema.event_values) > MAX_VALUES:
            raise ConfigError(
                f"events of this model have {len(schema.event_values)} values; a store keeps {MAX_VALUES}"
            )
        self.schema, self.catalogue, self.shared = schema, catalogue, shared
        self.items = catalogue.items
        self._token = next(_tokens)
        self._item_keys = catalogue.keys()
        self._rows_of_keys = HashIndex(
            self._item_keys[UNKNOWN_ROW + 1 :], np.arange(UNKNOWN_ROW + 1, self._item_keys.shape[0], dtype=np.int32)
        )
        self._users = {user: position for position, user in enumerate(catalogue.ids.users)}
        self._decoders: dict[tuple[str, int], RowDecoder] = {}
        self._unsuitable: set[int] = set()  # marks of schemas
        self._lock = threading.Lock()
        shared.histories.most = max(shared.histories.most, schema.stored_history)
        for table in (shared.items, shared.users):  # a schema that does not suit is found now, not at a request
            if table.loaded is not None:
                self._decoder(table, table.loaded)

    @property
    def local(self) -> bool:
        """Whether nothing is ever waited for, so that asking can be left to the executor's own thread."""
        return self.shared.store.local

    def rows_of(self, item_ids: Sequence[str]) -> Int32Array:
        """(C,) int32 rows; UNKNOWN_ROW for an id that the model has never heard of.

        By hash: of a million items 512 are found in .1 ms, in the dict of `Catalogue.rows_of` in .6.
        """
        rows = np.empty(len(item_ids), np.int32)
        self._rows_of_keys.find(hash_ids(item_ids), rows, UNKNOWN_ROW)
        return rows

    def begin(self, user_id: str, item_ids: Sequence[str], with_history: bool, until: float | None) -> Fetch:
        """Ask for everything that a request needs: rows of its candidates, of its user, and the history."""
        candidates = self.rows_of(item_ids)
        fetch, shared = Fetch(user_id, candidates, until), self.shared
        if self.schema.item_numeric or self.schema.item_categorical:
            fetch.items = shared.items.ask(self._item_keys[candidates], item_ids)
        if self.schema.user_numeric or self.schema.user_categorical:
            fetch.users = shared.users.ask(np.asarray([hash_id(user_id)], np.uint64), (user_id,))
        if with_history:  # last: it wakes the store's thread, and from then two threads want the interpreter
            fetch.history = shared.histories.ask(user_id)
        return fetch

    def when_ready(self, fetch: Fetch, rows_too: bool, then: Callable[[], None]) -> None:
        """Call `then` once when the history (and, `rows_too`, all rows) came, or at `fetch.until`."""
        futures: list[Future[Any]] = [*fetch.history_futures, *(fetch.row_futures if rows_too else ())]
        Gate(futures, fetch.until, self.shared.alarm, then)

    def when_rows(self, fetch: Fetch) -> Callable[[Callable[[], None]], None] | None:
        """None if the rows are there, or are waited for no longer; else what calls when that is so."""
        futures = [future for future in fetch.row_futures if not future.done()]
        if not futures or (fetch.until is not None and fetch.until <= time.perf_counter()):
            return None

        def when(then: Callable[[], None]) -> None:
            Gate(futures, fetch.until, self.shared.alarm, then)

        return when

    def history(self, fetch: Fetch) -> UserHistory | None:
        """The user's history as it is known now, oldest first; None for a user never seen."""
        asked = fetch.history
        assert asked is not None  # noqa: S101 - `begin` was told that it is wanted
        now = self.shared.histories.now(asked, self._token)
        fetch.counts[HISTORIES] = RowCounts(
            fresh=int(now.freshness is Freshness.FRESH),
            stale=int(now.freshness is Freshness.STALE),
            default=int(now.freshness is Freshness.DEFAULT),
        )
        if now.decoded is not None:
            return now.decoded
        if now.record is None:
            return self._packed_history(fetch.user_id)
        history = merged_history(
            self._packed_history(fetch.user_id),
            model_history(now.record, self.schema, self._rows_of_keys),
            self.schema.stored_history,
        )
        self.shared.histories.keep_decoded(asked.key, now, self._token, history)
        return history

    def user(self, fetch: Fetch) -> UserFeatures:
        """The features of the user: the store's where it has them, else the artifact's."""
        known = self.user_features(fetch.user_id)
        asked = fetch.users
        if asked is None:
            return known
        numeric, categories = known.numeric[None].copy(), known.categories[None].copy()
        fetch.counts[USERS] = self._read(self.shared.users, asked, numeric, categories, fetch.until)
        return UserFeatures(categories[0], numeric[0])

    def fill_items(self, fetch: Fetch, into: Mapping[str, Array], first: int = 0, count: int | None = None) -> None:
        """Write the store's rows of the candidates first..first + count - 1 (all of them) over the artifact's in the
        inputs of `score`: the first columns of `candidate_numeric` (1, C, F), and `candidate_categories` (1, C, G)."""
        if fetch.items is not None:
            count = fetch.candidates.shape[0] if count is None else count
            numeric = into.get("candidate_numeric", np.empty((1, count, 0), np.float32))
            categories = into.get("candidate_categories", np.empty((1, count, 0), np.int32))
            asked = fetch.items.part(first, count)
            counts = self._read(self.shared.items, asked, numeric[0, :count], categories[0, :count], fetch.until)
            with self._lock:  # parts of a request are filled by several executors
                fetch.parts[first] = counts  # a part that is filled again counts once
                fetch.counts[ITEMS] = sum(fetch.parts.values(), RowCounts())

    def degraded(self, fetch: Fetch) -> tuple[str, ...]:
        """What an answer had to do without, in the words of this file's docstring."""
        names = []
        for table, word in ((ITEMS, "items"), (USERS, "user"), (HISTORIES, "history")):
            counts = fetch.counts.get(table)
            if counts is not None:
                names += [f"{word}_stale"] if counts.stale else []
                names += [f"{word}_default"] if counts.default else []
        absent = any(counts.absent for counts in fetch.counts.values())
        trouble = self.shared.store.health().trouble if names or absent else None
        if trouble is not None and (names or trouble is Trouble.EVICTING):
            names.append(f"store_{trouble.value}")
        return tuple(names)

    def stored_history(self, user_id: str) -> UserHistory | None:
        """The history of a user, asked for and waited for here; for pages and tools, not for requests."""
        fetch = Fetch(user_id, np.zeros(0, np.int32), None, history=self.shared.histories.ask(user_id))
        wait(fetch.history_futures)
        return self.history(fetch)

    def append(self, user_id: str, events: Sequence[Event]) -> Appended:
        """Add events to a user, who need not exist. When this returns the user's next request here sees them, and so
        does one in any other process that asks the store (see `history_table.py`).

        Raises:
            InvalidRequest: an empty id or list, or an unknown event type or value name.
            StoreFailure: the events are not stored; the message says why.
        """
        if not user_id or not events:
            raise InvalidRequest("an append needs a user_id and at least one event")
        raw = raw_events(events, self.schema)
        confirmed = self.shared.histories.append(user_id, pack_events(raw))
        rows = self.rows_of([event.item_id for event in events])
        unknown = (event.item_id for event, row in zip(events, rows, strict=True) if row == UNKNOWN_ROW)
        stored = self.stored_history(user_id)
        return Appended(len(stored or ()), tuple(dict.fromkeys(unknown)), confirmed)

    def user_features(self, user_id: str) -> UserFeatures:
        """The artifact's features of a user."""
        position = self._users.get(user_id)
        if position is None:
            return no_user_features(self.schema)
        return UserFeatures(self.catalogue.users.categories[position], self.catalogue.users.numeric[position])

    def user_ids(self, limit: int) -> list[str]:
        """Some users with a history, those with newly appended events first."""
        recent = self.shared.histories.recent_users(limit)
        rest = (user for user in self.catalogue.ids.users if user not in recent)
        return recent + [user for user, _ in zip(rest, range(limit - len(recent)), strict=False)]

    def close(self) -> None:
        """Nothing is asked after this."""
        self.shared.histories.forget_decoded(self._token)

    def _packed_history(self, user_id: str) -> UserHistory | None:
        position = self._users.get(user_id)
        if position is None:
            return None
        return self.catalogue.users.history_of(position).last(self.schema.stored_history)

    def _read(
        self, table: RowTable, asked: AskedRows, numeric: Float32Array, categories: Int32Array, until: float | None
    ) -> RowCounts:
        """As `RowTable.read_into`; of a table that was loaded since with columns of another kind than the model's
        nothing is read."""
        mark = asked.loaded.schema.mark
        if mark not in self._unsuitable:
            try:
                decoder = self._decoder(table, asked.loaded)
            except ConfigError as error:
                log.error("the artifact's own values are used: %s", error)
                self._unsuitable.add(mark)
            else:
                return table.read_into(asked, decoder, numeric, categories, until)
        wrong = int(np.count_nonzero(asked.keys))
        return RowCounts(default=wrong, wrong_schema=wrong)

    def _decoder(self, table: RowTable, loaded: Loaded) -> RowDecoder:
        key = (table.table, loaded.schema.mark)
        decoder = self._decoders.get(key)
        if decoder is None:
            schema, items = self.schema, table.table == ITEMS
            numeric = schema.item_numeric if items else schema.user_numeric
            categorical = schema.item_categorical if items else schema.user_categorical
            side = "item" if items else "user"
            words = {column.name: self.catalogue.vocabulary(side, column.name) for column in categorical}
            with self._lock:
                decoder = self._decoders[key] = RowDecoder(loaded.schema, numeric, categorical, words)
        return decoder


def features_in_memory(schema: FeatureSchema, catalogue: Catalogue) -> VersionFeatures:
    """An artifact's features and what is appended to them, in this process alone."""
    return VersionFeatures(schema, catalogue, FeatureService(FeatureConfig()).of(""))
