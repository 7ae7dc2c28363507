"""The histories of one namespace: what the store has, what is kept of it here, and appends written through to both.

In: a user. Out: `HistoryNow`, the record (`stores/event_records.py`) and what versions decoded of it.

A local store is asked each time. Of a remote one records are kept here: in sync mode the store is asked whether the one
here is the newest (24 bytes go out, a record comes back only if it is not); in async mode it is kept current by what
the store tells of appends, and asked for only while the store tells nothing.

An append is acknowledged when the store has confirmed it or, with an outbox, when it is on this disk. What is not
delivered yet is put over whatever the store answers, so that the user's next request here sees it in any case.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from itertools import count

from rankd.features.feature_config import MIB, HistoriesConfig, Mode
from rankd.features.reading.outbox import Outbox
from rankd.features.stores.event_records import appended, mark_of
from rankd.features.stores.feature_store import FeatureStore, HistoryRead, StoreFailure
from rankd.features.stores.store_keys import history_key, history_prefix
from rankd.observe.feature_metrics import HistoryFigures
from rankd.types import UserHistory

ANOTHER_MARK = b"\0"
"""A mark that no record has: the answer brings the whole record."""
ENTRY_BYTES = 400
"""What an entry takes beside its record and its arrays, roughly."""


class Freshness(Enum):
    """How far a history can be trusted to be the newest."""

    FRESH = "fresh"
    STALE = "stale"  # the store did not answer: what was here
    DEFAULT = "default"  # the store did not answer and nothing was here: the artifact's own


@dataclass(slots=True)
class _Held:
    """What is kept of a user. `flight` numbers the read that brought it, `listening` is the store's number then."""

    record: bytes | None
    mark: bytes
    flight: int = 0
    listening: int = 0
    decoded: dict[int, UserHistory] = field(default_factory=dict)
    size: int = 0


@dataclass(slots=True)
class AskedHistory:
    """What a request asked: `landed` is done when the store has answered; None if nothing is waited for. `brought` is
    what was known of the user when it was asked, then when it was answered, however soon others take its place."""

    key: bytes
    landed: Future[bool] | None = None
    brought: _Held | None = None


@dataclass(frozen=True, slots=True)
class HistoryNow:
    """A history as it is now. `decoded` is what a version made of it before; else the version decodes `record`."""

    mark: bytes
    record: bytes | None
    decoded: UserHistory | None
    freshness: Freshness


class HistoryTable:
    """Histories of one namespace. Thread-safe. `most` is how many events of a user the store keeps."""

    def __init__(
        self, namespace: str, store: FeatureStore, config: HistoriesConfig, outbox: Outbox | None = None
    ) -> None:
        self.namespace, self._prefix = namespace, history_prefix(namespace)
        self._store, self._config, self._outbox = store, config, outbox
        self.most = 1
        self._held: OrderedDict[bytes, _Held] = OrderedDict()
        self._held_bytes = 0
        self._budget = int(config.budget_mib * MIB)
        self._flights = count(1)
        self._heard: dict[bytes, tuple[list[bytes], list[int]]] = {}  # appends heard of while reads are under way
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()  # guards the five above and the figures
        self._freshness = dict.fromkeys(Freshness, 0)
        self._asked = self._sent = 0
        if not store.local:
            store.listen(self._hear)

    def ask(self, user_id: str) -> AskedHistory:
        """Begin to find a history; a local store is asked later, by `now`."""
        key = history_key(self.namespace, user_id)
        if self._store.local:
            return AskedHistory(key)
        with self._lock:
            listening = self._store.listening()
            held = self._held.get(key)
            trusted = held is not None and listening != 0 and held.listening == listening
            if trusted and self._config.mode is Mode.ASYNC:
                self._held.move_to_end(key)
                return AskedHistory(key, brought=held)
            flight, mark = next(self._flights), held.mark if held is not None else b""
            heard, under_way = self._heard.setdefault(key, ([], []))
            under_way.append(flight)
            begun = len(heard)
            self._asked += 1
        asked = AskedHistory(key, Future(), held)

        def came(future: Future[HistoryRead]) -> None:
            good = False
            try:
                read = future.result() if future.exception() is None else None
                asked.brought = self._land(asked, flight, listening, begun, read) or asked.brought
                good = read is not None
            finally:
                assert asked.landed is not None  # noqa: S101 - made above
                asked.landed.set_result(good)

        self._store.history(key, mark).add_done_callback(came)
        return asked

    def now(self, asked: AskedHistory, token: int) -> HistoryNow:
        """The history as it is known now; `token` is the version's, for what it decoded before."""
        if self._store.local:
            return self._counted(self._read_local(asked.key, token))
        with self._lock:
            held = self._held.get(asked.key, asked.brought)
            landed = asked.landed
            if landed is None or (landed.done() and landed.result()):
                freshness = Freshness.FRESH
            else:
                freshness = Freshness.STALE if held is not None else Freshness.DEFAULT
        if held is None:
            return self._counted(HistoryNow(b"", None, None, freshness))
        return self._counted(HistoryNow(held.mark, held.record, held.decoded.get(token), freshness))

    def keep_decoded(self, key: bytes, mark: bytes, token: int, history: UserHistory) -> None:
        """Keep what a version made of the record with this mark, unless it is another one by now."""
        with self._lock:
            held = self._held.get(key)
            if held is None and self._store.local:
                held = _Held(None, mark)
            elif held is None or (held.mark != mark and not self._store.local):
                return
            if held.mark != mark:
                held = _Held(None, mark)
            held.decoded[token] = history
            self._keep(key, held)

    def forget_decoded(self, token: int) -> None:
        """A version is gone."""
        with self._lock:
            for held in self._held.values():
                held.decoded.pop(token, None)

    def append(self, user_id: str, records: bytes) -> bool:
        """Add event records to a user, in the store and here; returns whether the store has confirmed them.

        Without confirmation they are in the outbox, and delivered when the store takes them.

        Raises:
            StoreFailure: they are neither in the store nor on this disk; nothing is kept anywhere.
        """
        key = history_key(self.namespace, user_id)
        number = self._outbox.add(key, records, self.most) if self._outbox is not None else 0
        confirmed = True
        try:
            self._store.append(key, records, self.most).result()
        except StoreFailure:
            if self._outbox is None:
                raise
            confirmed = False
        else:
            if self._outbox is not None:
                self._outbox.delivered(number)
        self._put_over(key, records, confirmed)
        with self._lock:
            self._recent[user_id] = None
            self._recent.move_to_end(user_id)
            if len(self._recent) > 1000:
                self._recent.popitem(last=False)
        return confirmed

    def recent_users(self, limit: int) -> list[str]:
        """Users with events appended through this server, the newest first."""
        with self._lock:
            return list(reversed(self._recent))[:limit]

    def figures(self) -> HistoryFigures:
        """A snapshot."""
        with self._lock:
            return HistoryFigures(
                freshness={one.value: number for one, number in self._freshness.items()},
                asked=self._asked,
                sent=self._sent,
                kept=len(self._held),
                kept_bytes=self._held_bytes,
                budget_bytes=self._budget,
                undelivered=self._outbox.undelivered if self._outbox is not None else 0,
            )

    def _read_local(self, key: bytes, token: int) -> HistoryNow:
        with self._lock:
            held = self._held.get(key)
            decoded = held.decoded.get(token) if held is not None else None
            mark = held.mark if held is not None and decoded is not None else ANOTHER_MARK
        try:
            read = self._store.history(key, mark).result()
        except StoreFailure:
            return HistoryNow(mark, None, decoded, Freshness.DEFAULT if decoded is None else Freshness.STALE)
        if not read.changed:
            with self._lock:
                if key in self._held:
                    self._held.move_to_end(key)
            return HistoryNow(mark, None, decoded, Freshness.FRESH)
        return HistoryNow(mark_of(read.record), read.record, None, Freshness.FRESH)

    def _land(
        self, asked: AskedHistory, flight: int, listening: int, begun: int, read: HistoryRead | None
    ) -> _Held | None:
        """Keep what a read brought, with the appends put over it that it may have been too early for."""
        key = asked.key
        with self._lock:
            heard, under_way = self._heard[key]
            later = heard[begun:]
            under_way.remove(flight)
            if not under_way:
                del self._heard[key]
            if read is None:
                return None
            held = self._held.get(key)
            if held is not None and held.flight > flight:
                return held  # a read that began later was quicker
            before = held if held is not None else asked.brought  # it may have left since it was compared
            record = read.record if read.changed or before is None else before.record
            self._sent += read.changed
            undelivered = self._outbox.undelivered_of(key) if self._outbox is not None else []
            for more in (*later, *undelivered):
                record = appended(record, more, self.most)
            mark = mark_of(record)
            if held is None or held.mark != mark:
                held = _Held(record, mark)
            held.flight, held.listening = flight, listening
            self._keep(key, held)
            return held

    def _hear(self, key: bytes, records: bytes) -> None:
        if key.startswith(self._prefix):
            self._put_over(key, records, confirmed=True)

    def _put_over(self, key: bytes, records: bytes, confirmed: bool) -> None:
        """Add records to what is kept of a user, and to the reads that are under way."""
        if self._store.local:
            return
        with self._lock:
            if key in self._heard:
                self._heard[key][0].append(records)
            held = self._held.get(key)
            if held is None:
                if not confirmed:  # all there is until the store answers; it is asked for in any case
                    self._keep(key, _Held(record := appended(None, records, self.most), mark_of(record)))
                return
            record = appended(held.record, records, self.most)
            if record is not held.record:
                listening = held.listening if confirmed else 0
                self._keep(key, _Held(record, mark_of(record), held.flight, listening))

    def _keep(self, key: bytes, held: _Held) -> None:
        """Under the lock: hold an entry, the least recently used ones leave for it."""
        before = self._held.pop(key, None)
        self._held_bytes -= before.size if before is not None else 0
        arrays = sum(h.rows.nbytes + h.events.nbytes + h.times.nbytes + h.values.nbytes for h in held.decoded.values())
        held.size = ENTRY_BYTES + len(held.record or b"") + arrays
        self._held[key] = held
        self._held_bytes += held.size
        while self._held_bytes > self._budget and self._held:
            _, leaving = self._held.popitem(last=False)
            self._held_bytes -= leaving.size

    def _counted(self, now: HistoryNow) -> HistoryNow:
        with self._lock:
            self._freshness[now.freshness] += 1
        return now
