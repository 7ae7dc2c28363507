"""The histories of one namespace: what the store has, what is kept of it here, and appends written through to both.

In: a user. Out: `HistoryNow`, the record (`stores/event_records.py`) and what versions decoded of it.

A local store is asked each time. Of a remote one records are kept here: in sync mode the store is asked whether the one
here is the newest (24 bytes go out, a record comes back only if it is not); in async mode it is kept current by what
the store tells of appends, and asked for only while the store tells nothing.

An append is acknowledged when the store has confirmed it or, with an outbox, when it is on this disk. What was not
delivered when a request came is put over whatever the store answers, or over what is here if it does not, so that the
user's next request here sees it in any case.
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
from rankd.features.stores.event_records import appended, is_history, mark_of
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
    """What is kept of a user; its record never changes. `flight` numbers the read that brought it, `listening` is the
    store's number then. Of a record that is `ahead` the store may lack events: one of the store's with as many events
    and the same newest would have its mark."""

    record: bytes | None
    mark: bytes
    flight: int = 0
    listening: int = 0
    ahead: bool = False
    decoded: dict[int, UserHistory] = field(default_factory=dict)
    size: int = 0


@dataclass(frozen=True, slots=True)
class _Read:
    """A read under way: its number, the store's number and how many appends had been heard when it began."""

    flight: int
    listening: int
    begun: int


@dataclass(slots=True)
class AskedHistory:
    """What a request asked: `landed` is done when the store has answered; None if nothing is waited for. `brought` is
    what was known of the user when it was asked, then when it was answered, however soon others take its place;
    `undelivered` are the appends that the outbox had when it was asked."""

    key: bytes
    landed: Future[bool] | None = None
    brought: _Held | None = None
    undelivered: bytes = b""


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
            heard, under_way = self._heard.setdefault(key, ([], []))
            reading = _Read(next(self._flights), listening, len(heard))
            under_way.append(reading.flight)
            self._asked += 1
        # Before the store is asked: what is delivered from here on may be too late for its answer.
        undelivered = b"".join(self._outbox.undelivered_of(key)) if self._outbox is not None else b""
        asked = AskedHistory(key, Future(), held, undelivered)

        def came(future: Future[HistoryRead]) -> None:
            good = False
            try:
                read = _readable(future)
                self._land(asked, reading, read)
                good = read is not None
            finally:
                assert asked.landed is not None  # noqa: S101 - made above
                asked.landed.set_result(good)

        mark = b"" if held is None else ANOTHER_MARK if held.ahead else held.mark
        self._store.history(key, mark).add_done_callback(came)
        return asked

    def now(self, asked: AskedHistory, token: int) -> HistoryNow:
        """The history as it is known now; `token` is the version's, for what it decoded before."""
        if self._store.local:
            return self._counted(self._read_local(asked.key, token))
        with self._lock:
            held, brought, landed = self._held.get(asked.key), asked.brought, asked.landed
        if held is None or (brought is not None and brought.flight > held.flight):
            held = brought  # what was here has left, and an older read may have taken its place
        record = held.record if held is not None else None
        if landed is None or (landed.done() and landed.result()):
            freshness = Freshness.FRESH
        else:
            record = appended(record, asked.undelivered, self.most) if asked.undelivered else record
            freshness = Freshness.DEFAULT if held is None and record is None else Freshness.STALE
        if held is None or record is not held.record:
            return self._counted(HistoryNow(mark_of(record), record, None, freshness))
        return self._counted(HistoryNow(held.mark, record, held.decoded.get(token), freshness))

    def keep_decoded(self, key: bytes, now: HistoryNow, token: int, history: UserHistory) -> None:
        """Keep what a version made of a record, unless another one has taken its place."""
        with self._lock:
            held = self._held.get(key)
            if self._store.local:
                held = held if held is not None and held.mark == now.mark else _Held(None, now.mark)
            elif held is None or held.record is not now.record:
                return
            held.decoded[token] = history
            self._keep(key, held)

    def forget_decoded(self, token: int) -> None:
        """A version is gone."""
        with self._lock:
            for held in self._held.values():
                if held.decoded.pop(token, None) is not None:
                    self._held_bytes -= held.size
                    held.size = _size(held)
                    self._held_bytes += held.size

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
        read = _readable(self._store.history(key, mark))
        if read is None:
            return HistoryNow(mark, None, decoded, Freshness.DEFAULT if decoded is None else Freshness.STALE)
        if not read.changed:
            with self._lock:
                if key in self._held:
                    self._held.move_to_end(key)
            return HistoryNow(mark, None, decoded, Freshness.FRESH)
        return HistoryNow(mark_of(read.record), read.record, None, Freshness.FRESH)

    def _land(self, asked: AskedHistory, reading: _Read, read: HistoryRead | None) -> None:
        """Keep what a read brought, with the appends put over it that it may have been too early for."""
        key = asked.key
        with self._lock:
            heard, under_way = self._heard[key]
            later = heard[reading.begun :]
            under_way.remove(reading.flight)
            if not under_way:
                del self._heard[key]
            if read is None:
                return
            held, compared = self._held.get(key), asked.brought
            if held is not None and held.flight > reading.flight:
                asked.brought = held  # a read that began later was quicker
                return
            self._sent += read.changed
            record = read.record if read.changed or compared is None else compared.record
            more = asked.undelivered + b"".join(later)
            whole = appended(record, more, self.most) if more else record
            if held is None or held.record != whole:
                held = _Held(whole, mark_of(whole))
            held.flight, held.listening, held.ahead = reading.flight, reading.listening, whole is not record
            self._keep(key, held)
            asked.brought = held

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
                    record = appended(None, records, self.most)
                    self._keep(key, _Held(record, mark_of(record), ahead=True))
                return
            record = appended(held.record, records, self.most)
            if record is not held.record:
                listening, ahead = (held.listening, held.ahead) if confirmed else (0, True)
                self._keep(key, _Held(record, mark_of(record), held.flight, listening, ahead))

    def _keep(self, key: bytes, held: _Held) -> None:
        """Under the lock: hold an entry, the least recently used ones leave for it."""
        before = self._held.pop(key, None)
        self._held_bytes -= before.size if before is not None else 0
        held.size = _size(held)
        self._held[key] = held
        self._held_bytes += held.size
        while self._held_bytes > self._budget and self._held:
            _, leaving = self._held.popitem(last=False)
            self._held_bytes -= leaving.size

    def _counted(self, now: HistoryNow) -> HistoryNow:
        with self._lock:
            self._freshness[now.freshness] += 1
        return now


def _size(held: _Held) -> int:
    arrays = sum(h.rows.nbytes + h.events.nbytes + h.times.nbytes + h.values.nbytes for h in held.decoded.values())
    return ENTRY_BYTES + len(held.record or b"") + arrays


def _readable(future: Future[HistoryRead]) -> HistoryRead | None:
    """What a store answered; None if it did not, or with what is no history."""
    if future.exception() is not None:
        return None
    read = future.result()
    return read if read.record is None or is_history(read.record) else None
