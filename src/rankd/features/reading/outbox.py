"""Events on their way to a store, on this disk: with it an append is acknowledged whether or not the store answers.

    pending    written and synced here, not confirmed by the store; delivered again and again, in their order
    delivered  confirmed; kept for a while and given again to a store that was away meanwhile, for it may have come back
               with less than it had confirmed (Redis without `appendfsync always`). Appends carry ids: none counts
               twice.

An LMDB of its own: a number (u64, big-endian) -> moment of delivery f64 (0: pending), most u32, key length u16, key,
records.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankd.errors import ConfigError
from rankd.features.stores.feature_store import FeatureStore, StoreFailure, Trouble

log = logging.getLogger("rankd")
MAP_BYTES = 4 << 30
MORE_BYTES = 64 << 20
"""To note a delivery and to forget takes pages too: what a full outbox is given for that, each time it has to be."""
AT_ONCE = 1000
"""Appends that are noted or forgotten in one step; a step copies their pages."""
WAKE_SECONDS = 0.1
OWN_TRY_SECONDS = 1.0
"""Whoever adds an append delivers it; only one older than this is left to the outbox."""
FORGET_EVERY_SECONDS = 5.0
_NUMBER = struct.Struct(">Q")
_HEAD = struct.Struct("<dIH")
Entry = tuple[float, int, bytes, bytes]  # delivered at (0: pending), most, key, records


class Outbox:
    """Events for one store. `start()` begins to deliver, `close()` ends it; what is pending is on disk.

    Raises:
        ConfigError: the folder cannot be used, or another process does.
    """

    def __init__(
        self, folder: Path, store: FeatureStore, keep_seconds: float, clock: Callable[[], float] = time.time
    ) -> None:
        import fcntl

        import lmdb

        self._store, self._keep, self._clock = store, keep_seconds, clock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._own = (folder / "owner").open("a")
            fcntl.flock(self._own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lmdb = lmdb.open(str(folder), map_size=MAP_BYTES, max_dbs=0)
        except BlockingIOError as error:
            self._own.close()
            raise ConfigError(
                f"{folder}: another server uses this outbox; give each server a folder of its own"
            ) from error
        except (OSError, lmdb.Error) as error:
            raise ConfigError(f"{folder}: the outbox cannot be used: {error}") from error
        self._full: type[Exception] = lmdb.MapFullError
        self._errors: tuple[type[Exception], ...] = (lmdb.Error, OSError)
        self._writing = threading.Lock()  # held while the disk is written; taken before the other
        self._lock = threading.Lock()  # guards what is in memory; requests take it
        self._wake = threading.Event()
        self._closed = False
        self._pending: dict[int, tuple[float, int, bytes, bytes]] = {}  # added at, most, key, records
        self._of_key: defaultdict[bytes, list[int]] = defaultdict(list)
        self._confirmed: list[tuple[int, Entry]] = []  # to be written as delivered, many at once
        self._last = 0
        self._said: Trouble | None = None
        self._writable = True
        self._forgotten_at = clock()
        self._recoveries = store.health().recoveries
        self._read_back()
        self._thread = threading.Thread(target=self._work, name="rankd-outbox", daemon=True)

    @property
    def undelivered(self) -> int:
        """Appends that the store has not confirmed."""
        return len(self._pending)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def close(self) -> None:
        """Deliver nothing more."""
        self._closed = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._write_confirmed()
        self._lmdb.close()
        self._own.close()

    def add(self, key: bytes, records: bytes, most: int) -> int:
        """Write an append and sync it; returns its number.

        Raises:
            StoreFailure: the disk is full, or cannot be written; nothing is kept.
        """
        with self._writing:
            number = self._last + 1
            try:
                with self._lmdb.begin(write=True) as change:
                    change.put(_NUMBER.pack(number), _packed((0.0, most, key, records)))
            except self._errors as error:
                raise StoreFailure(
                    f"the outbox takes no more events ({self.undelivered} are not delivered): {error}", Trouble.FULL
                ) from error
            self._last = number
            with self._lock:
                self._pending[number] = (self._clock(), most, key, records)
                self._of_key[key].append(number)
            return number

    def delivered(self, number: int) -> None:
        """The store has confirmed an append."""
        with self._lock:
            found = self._pending.pop(number, None)
            if found is None:
                return
            _, most, key, records = found
            self._of_key[key].remove(number)
            if not self._of_key[key]:
                del self._of_key[key]
            self._confirmed.append((number, (self._clock(), most, key, records)))

    def undelivered_of(self, key: bytes) -> list[bytes]:
        """The records of a user that the store has not confirmed, oldest first."""
        with self._lock:
            return [self._pending[number][3] for number in self._of_key.get(key, ())]

    def _work(self) -> None:
        while not self._closed:
            self._wake.wait(WAKE_SECONDS)
            self._write_confirmed()
            health = self._store.health()
            if not health.up:
                continue
            again = health.recoveries != self._recoveries
            if self._deliver(again) and (not again or self._deliver_again()):
                self._recoveries = health.recoveries
            if self._clock() - self._forgotten_at > FORGET_EVERY_SECONDS:
                self._forget_old()

    def _deliver(self, all_of_them: bool) -> bool:
        """Give the store what it has not confirmed; whether it took everything that was due and that it can take."""
        with self._lock:
            due_since = self._clock() - (0.0 if all_of_them else OWN_TRY_SECONDS)
            due = [(number, entry) for number, entry in self._pending.items() if entry[0] <= due_since]
        all_taken = True
        for number, (_, most, key, records) in due:
            if self._closed:
                return False
            trouble = self._give(most, key, records)
            if trouble is None:
                self.delivered(number)
            elif trouble is Trouble.BROKEN:  # what that key holds: the others need not wait
                all_taken = False
            else:
                return False
        self._said = None if all_taken else self._said
        return True

    def _deliver_again(self) -> bool:
        """Everything that is kept: the store was away."""
        self._write_confirmed()
        kept = [entry for _, entry in self._entries() if entry[0]]
        if kept:
            log.info("the store was away: %d delivered appends are given again", len(kept))
        for _, most, key, records in kept:
            if self._closed or self._give(most, key, records) not in (None, Trouble.BROKEN):
                return False
        return True

    def _give(self, most: int, key: bytes, records: bytes) -> Trouble | None:
        """Why the store did not take an append; None if it did."""
        try:
            self._store.append(key, records, most).result()
        except StoreFailure as error:
            if error.trouble is not self._said:
                log.warning("%d appends wait for the store: %s", self.undelivered, error)
            self._said = error.trouble
            return error.trouble
        return None

    def _write_confirmed(self) -> None:
        """Lost if the process dies before: then they are delivered once more, and do not count twice."""
        noted: list[tuple[int, Entry]] = []

        def note(change: Any) -> None:
            for number, entry in noted:
                change.put(_NUMBER.pack(number), _packed(entry))

        while True:
            with self._lock:
                del self._confirmed[: len(noted)]
                noted = self._confirmed[:AT_ONCE]
            if not noted or not self._write(note):
                return

    def _forget_old(self) -> None:
        """Deliveries are nearly in the order of their numbers: stop at the first that is kept."""
        now = self._forgotten_at = self._clock()
        old: list[bytes] = []

        def forget(change: Any) -> None:
            del old[:]
            for number, value in change.cursor():
                moment = _unpacked(value)[0]
                if moment >= now - self._keep or len(old) == AT_ONCE:
                    break
                old.extend([number] if moment else [])
            for number in old:
                change.delete(number)

        while self._write(forget) and len(old) == AT_ONCE:
            pass

    def _write(self, change_with: Callable[[Any], None]) -> bool:
        """Change what is on the disk; False if it cannot be written: then it is tried again later."""
        with self._writing:
            try:
                try:
                    with self._lmdb.begin(write=True) as change:
                        change_with(change)
                except self._full:
                    self._lmdb.set_mapsize(self._lmdb.info()["map_size"] + MORE_BYTES)
                    with self._lmdb.begin(write=True) as change:
                        change_with(change)
            except self._errors as error:
                if self._writable:
                    log.warning("the outbox cannot be written: %s", error)
                self._writable = False
                return False
            self._writable = True
        return True

    def _read_back(self) -> None:
        for number, (moment, most, key, records) in self._entries():
            self._last = number
            if not moment:
                self._pending[number] = (0.0, most, key, records)
                self._of_key[key].append(number)

    def _entries(self) -> list[tuple[int, Entry]]:
        with self._lmdb.begin() as reading:
            return [(_NUMBER.unpack(number)[0], _unpacked(value)) for number, value in reading.cursor()]


def _packed(entry: Entry) -> bytes:
    moment, most, key, records = entry
    return _HEAD.pack(moment, most, len(key)) + key + records


def _unpacked(value: Any) -> Entry:
    moment, most, size = _HEAD.unpack_from(value)
    start = _HEAD.size + size
    return moment, most, bytes(value[_HEAD.size : start]), bytes(value[start:])
