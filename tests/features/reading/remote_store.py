"""A remote store that does what a test says: it answers when told to, in any order, or fails; and it counts.

    store.holds = {"history"}       calls of these kinds wait in `store.waiting`, oldest first, until the test lets
    store.waiting[0].reach()        the store do what was asked, and
    store.waiting[0].answer()       tells the asker (`fail()`: tells it nothing but a StoreFailure)
    store.away = Trouble.TIMEOUT    calls that are not held fail at once; None: they are answered at once

Appends, whoever makes them, wait in `store.pushes` until `tell()` passes one on, as a subscription of Redis does;
`mute()` breaks the subscription, so that what is appended meanwhile is never told.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from rankd.features.stores.event_records import ID_BYTES, RECORD_BYTES, is_history
from rankd.features.stores.feature_store import Heard, HistoryRead, Pair, StoreFailure, StoreHealth, Trouble
from rankd.features.stores.memory_store import MemoryStore
from tests.features.stores.event_samples import identities

PATIENCE_S = 60.0


class Call:
    """A question on its way: `reach` lets the store do it, `answer` or `fail` ends it; each once, in this order."""

    def __init__(self, kind: str, keys: Sequence[bytes], work: Callable[[], Future[Any]]) -> None:
        self.kind, self.keys, self.future = kind, tuple(keys), Future[Any]()
        self._work = work
        self._outcome: Future[Any] | None = None

    def reach(self) -> None:
        """The store does what was asked; nobody knows yet."""
        if self._outcome is None:
            self._outcome = self._work()

    def answer(self) -> None:
        """The asker is told what the store did, which it does now if it has not."""
        self.reach()
        assert self._outcome is not None
        failure = self._outcome.exception()
        if failure is not None:
            self.future.set_exception(failure)
        else:
            self.future.set_result(self._outcome.result())

    def fail(self, trouble: Trouble = Trouble.TIMEOUT) -> None:
        """The asker is told that there is no answer, whatever the store did."""
        self.future.set_exception(StoreFailure("the test says so", trouble))


class RemoteStore:
    """A MemoryStore that stands far away. `inner` is what it holds, for a test to look at and to write behind it."""

    local = False

    def __init__(self) -> None:
        self.inner = MemoryStore()
        self.holds: set[str] = set()
        self.away: Trouble | None = None
        self.trouble: Trouble | None = None  # what its health says while it is not away
        self.waiting: list[Call] = []
        self.calls: Counter[str] = Counter()
        self.read: Counter[bytes] = Counter()
        self.pushes: deque[tuple[bytes, bytes]] = deque()
        self.recoveries = 0
        self._subscription = self._subscriptions = 1
        self._listeners: list[Heard] = []
        self._changed = threading.Condition()  # guards `waiting` and the counts
        self._order = threading.RLock()  # what is pushed is in the order in which it was appended

    def release(self, which: int = 0) -> Call:
        """Take a call out of `waiting` and answer it."""
        call = self.take(which)
        call.answer()
        return call

    def release_all(self) -> None:
        """Answer everything that waits, and hold nothing from here on."""
        self.holds = set()
        while self.waiting:
            self.release()

    def take(self, which: int = 0) -> Call:
        """Take a call out of `waiting`; the test ends it."""
        with self._changed:
            return self.waiting.pop(which)

    def wait_for(self, count: int) -> None:
        """Return when so many calls wait."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.waiting) >= count, PATIENCE_S), f"{count} calls to wait"

    def come_back(self) -> None:
        """Answer again after being away."""
        self.away = None
        self.recoveries += 1

    def tell(self) -> None:
        """Pass the oldest push on."""
        key, records = self.pushes.popleft()
        for heard in self._listeners:
            heard(key, records)

    def tell_all(self) -> None:
        """Pass all pushes on."""
        while self.pushes:
            self.tell()

    def mute(self) -> None:
        """The subscription breaks: what was not told is lost, and so is what is appended until `unmute`."""
        with self._order:
            self.pushes.clear()
            self._subscription = 0

    def unmute(self) -> None:
        """Another subscription, with another number."""
        with self._order:
            self._subscriptions += 1
            self._subscription = self._subscriptions

    def get(self, keys: Sequence[bytes]) -> Future[list[bytes | None]]:
        """The values of some keys."""
        return self._ask("get", keys, lambda: self.inner.get(keys))

    def put(self, pairs: Sequence[Pair]) -> Future[None]:
        """Write values."""
        return self._ask("put", [key for key, _ in pairs], lambda: self.inner.put(pairs))

    def delete(self, keys: Sequence[bytes]) -> Future[None]:
        """Remove keys."""
        return self._ask("delete", keys, lambda: self.inner.delete(keys))

    def exchange(self, key: bytes, expected: bytes | None, value: bytes) -> Future[bool]:
        """Compare and write."""
        return self._ask("exchange", [key], lambda: self.inner.exchange(key, expected, value))

    def history(self, key: bytes, mark: bytes = b"") -> Future[HistoryRead]:
        """A history, unless it is the one with the mark."""
        return self._ask("history", [key], lambda: self.inner.history(key, mark))

    def append(self, key: bytes, records: bytes, most: int) -> Future[bytes]:
        """Append, and have it told."""
        return self._ask("append", [key], lambda: self.append_elsewhere(key, records, most))

    def append_many(self, appends: Sequence[Pair], most: int) -> list[Future[bytes]]:
        """One after the other."""
        return [self.append(key, records, most) for key, records in appends]

    def append_elsewhere(self, key: bytes, records: bytes, most: int = 1000) -> Future[bytes]:
        """Another server appends."""
        with self._order:
            before = self.inner.history(key).result().record
            known = set(identities(before)) if before is None or is_history(before) else set()
            done = self.inner.append(key, records, most)
            events = [records[start : start + RECORD_BYTES] for start in range(0, len(records), RECORD_BYTES)]
            added = b"".join(event for event in events if int.from_bytes(event[-ID_BYTES:], "little") not in known)
            if done.exception() is None and added and self._subscription:
                self.pushes.append((key, added))
        return done

    def keys(self, prefix: bytes) -> Iterator[list[bytes]]:
        """All keys with a prefix."""
        return self.inner.keys(prefix)

    def listen(self, heard: Heard) -> None:
        """Another listener."""
        self._listeners.append(heard)

    def listening(self) -> int:
        """The number of the subscription."""
        return self._subscription

    def health(self) -> StoreHealth:
        """Up unless it is away."""
        self.calls["health"] += 1
        return StoreHealth(up=self.away is None, trouble=self.away or self.trouble, recoveries=self.recoveries)

    def close(self) -> None:
        """Whoever still waits is told that there is no answer."""
        while self.waiting:
            self.take().fail(Trouble.DOWN)

    def _ask(self, kind: str, keys: Sequence[bytes], work: Callable[[], Future[Any]]) -> Future[Any]:
        call = Call(kind, keys, work)
        with self._changed:
            self.calls[kind] += 1
            self.read.update(keys if kind == "get" else ())
            if kind in self.holds:
                self.waiting.append(call)
                self._changed.notify_all()
                return call.future
        if self.away is not None:
            call.fail(self.away)
        else:
            call.answer()
        return call.future
