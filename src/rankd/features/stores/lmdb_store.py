"""The store on this machine's disk: one LMDB folder, read through a memory map by any number of processes.

In: keys and values (`store_keys.py`). Out: Futures that are done. Readers never wait, writers take turns. A write is on
the disk when it is acknowledged, and every process sees it from then on. Processes that are killed leave it whole.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

import lmdb

from rankd.features.stores.done_futures import answered, refused
from rankd.features.stores.event_records import HEADER_BYTES, MARK_BYTES, appended, counts_of, is_history
from rankd.features.stores.feature_store import Heard, HistoryRead, Pair, StoreFailure, StoreHealth, Trouble
from rankd.features.stores.lmdb_environments import borrow_environment, return_environment
from rankd.features.stores.store_config import GIB

KEYS_A_BATCH = 1000
T = TypeVar("T")


class LmdbStore:
    """Rows and histories in a folder. Thread-safe; several stores may share the folder, in one process or in many.

    `map_bytes` bounds the folder. A store that was opened before a fork refuses to work in the child.

    Raises:
        ConfigError: the folder cannot be used.
    """

    local = True

    def __init__(self, folder: Path, map_bytes: int) -> None:
        self._folder, self._map_bytes = folder, map_bytes
        self._environment = borrow_environment(folder, map_bytes)
        self._process = os.getpid()
        self._idle = threading.Condition()  # guards what follows
        self._closed = False
        self._running = 0
        self._failures: Counter[str] = Counter()
        self._read_keys = self._read_bytes = self._written_bytes = 0

    def get(self, keys: Sequence[bytes]) -> Future[list[bytes | None]]:
        """The values of some keys in their order, all of one moment."""

        def read(environment: lmdb.Environment) -> list[bytes | None]:
            with environment.begin() as transaction:
                return list(map(transaction.get, keys))  # `Cursor.getmulti` takes 1.5 times as long on 512 keys

        future = self._answer(read)
        if future.exception() is None:
            self._count_read(future.result())
        return future

    def put(self, pairs: Sequence[Pair]) -> Future[None]:
        """Write values over what is there, all or none."""

        def write(environment: lmdb.Environment) -> None:
            with environment.begin(write=True) as transaction:
                transaction.cursor().putmulti(pairs)
            self._count_written(sum(len(value) for _, value in pairs))

        return self._answer(write)

    def delete(self, keys: Sequence[bytes]) -> Future[None]:
        """Remove keys, all or none."""

        def remove(environment: lmdb.Environment) -> None:
            with environment.begin(write=True) as transaction:
                for key in keys:
                    transaction.delete(key)

        return self._answer(remove)

    def exchange(self, key: bytes, expected: bytes | None, value: bytes) -> Future[bool]:
        """Write a value if the one there is `expected`."""

        def compare(environment: lmdb.Environment) -> bool:
            with environment.begin(write=True) as transaction:
                if transaction.get(key) != expected:
                    return False
                transaction.put(key, value)
            self._count_written(len(value))
            return True

        return self._answer(compare)

    def history(self, key: bytes, mark: bytes = b"") -> Future[HistoryRead]:
        """A history record, unless its first bytes are `mark`: then nothing but they is read."""

        def compare(environment: lmdb.Environment) -> HistoryRead:
            with environment.begin(buffers=True) as transaction:
                record = transaction.get(key)
                if record is None:
                    return HistoryRead(changed=mark != b"")
                if record[:MARK_BYTES] == mark:
                    return HistoryRead(changed=False)
                return HistoryRead(changed=True, record=bytes(record))

        future = self._answer(compare)
        if future.exception() is None:
            self._count_read([future.result().record])
        return future

    def append(self, key: bytes, records: bytes, most: int) -> Future[bytes]:
        """Add event records to a history; on the disk when it is done."""

        (future,) = self.append_many([(key, records)], most)
        return future

    def append_many(self, appends: Sequence[Pair], most: int) -> list[Future[bytes]]:
        """Add event records to several histories in one transaction; a value that is no history spoils its own
        alone."""

        def change(environment: lmdb.Environment) -> list[Future[bytes]]:
            with environment.begin(write=True) as transaction:
                return [self._append(transaction, key, records, most) for key, records in appends]

        done = self._answer(change)
        failure = done.exception()
        if isinstance(failure, StoreFailure):
            return [refused(failure) for _ in appends]
        return done.result()

    def _append(self, transaction: lmdb.Transaction, key: bytes, records: bytes, most: int) -> Future[bytes]:
        old = transaction.get(key)
        if old is not None and not is_history(old):
            with self._idle:
                self._failures[Trouble.BROKEN.value] += 1
            return refused(StoreFailure(f"the value at {key!r} is not a history record", Trouble.BROKEN))
        before = None if old is None else bytes(old)
        new = appended(before, records, most)
        if new != before and counts_of(new) != (0, 0):
            transaction.put(key, new)
            self._count_written(len(new))
        return answered(new[:HEADER_BYTES])

    def keys(self, prefix: bytes) -> Iterator[list[bytes]]:
        """All keys that begin with a prefix, in order; each batch is of its own moment, so that no reader stays."""
        start = prefix
        while True:
            batch = self._answer(partial(_keys_from, start=start, prefix=prefix)).result()
            if batch:
                yield batch
            if len(batch) < KEYS_A_BATCH:
                return
            start = batch[-1] + b"\0"

    def listen(self, heard: Heard) -> None:
        """Nothing is told: a local store is asked each time."""

    def listening(self) -> int:
        """Always 0."""
        return 0

    def health(self) -> StoreHealth:
        """A snapshot; up unless closed."""
        with self._idle:
            return StoreHealth(
                up=not self._closed,
                trouble=Trouble.DOWN if self._closed else None,
                failures=dict(self._failures),
                read_keys=self._read_keys,
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
            )

    def close(self) -> None:
        """Wait for what is running; the last store of the folder closes it."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: self._running == 0)
        if self._process == os.getpid():
            return_environment(self._folder)

    def _answer(self, work: Callable[[lmdb.Environment], T]) -> Future[T]:
        try:
            self._enter()
            try:
                return answered(work(self._environment))
            finally:
                self._leave()
        except StoreFailure as error:
            failure = error
        except (lmdb.Error, OSError) as error:
            failure = self._failure(error)
        with self._idle:
            self._failures[failure.trouble.value] += 1
        return refused(failure)

    def _enter(self) -> None:
        if self._process != os.getpid():
            raise StoreFailure("the store was opened before a fork; open one in each process", Trouble.DOWN)
        with self._idle:
            if self._closed:
                raise StoreFailure("the store is closed", Trouble.DOWN)
            self._running += 1

    def _leave(self) -> None:
        with self._idle:
            self._running -= 1
            if self._closed:
                self._idle.notify_all()

    def _failure(self, error: lmdb.Error | OSError) -> StoreFailure:
        if isinstance(error, lmdb.MapFullError):
            limit = self._environment.info()["map_size"] / GIB
            return StoreFailure(
                f"{self._folder} has reached its limit of {limit:.3g} GiB; set map_gib higher in the configuration of "
                "every process that uses it and restart them, or delete tables",
                Trouble.FULL,
            )
        number = error.errno if isinstance(error, OSError) else error.code
        if number in (errno.ENOSPC, errno.EDQUOT):
            return StoreFailure(f"the disk under {self._folder} is full ({error}); make room on it", Trouble.FULL)
        if isinstance(error, lmdb.MapResizedError):
            return StoreFailure(
                f"another process opened {self._folder} with a larger map_gib and filled it beyond ours; set the same "
                "map_gib in all processes and restart this one",
                Trouble.BROKEN,
            )
        return StoreFailure(f"{self._folder}: {error}", Trouble.BROKEN)

    def _count_read(self, values: Sequence[bytes | None]) -> None:
        with self._idle:
            self._read_keys += len(values)
            self._read_bytes += sum(map(len, filter(None, values)))

    def _count_written(self, num_bytes: int) -> None:
        with self._idle:
            self._written_bytes += num_bytes


def _keys_from(environment: lmdb.Environment, start: bytes, prefix: bytes) -> list[bytes]:
    """Up to KEYS_A_BATCH keys from `start` on that begin with `prefix`."""
    batch: list[bytes] = []
    with environment.begin() as transaction, transaction.cursor() as cursor:
        found = cursor.set_range(start) if start else cursor.first()
        while found and len(batch) < KEYS_A_BATCH and cursor.key().startswith(prefix):
            batch.append(cursor.key())
            found = cursor.next()
    return batch
