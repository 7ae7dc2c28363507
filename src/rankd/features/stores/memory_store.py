"""The store inside this process: a dictionary under a lock. Nothing outlives the process, nobody else sees it.

In: keys and values (`store_keys.py`). Out: Futures that are done. It is also what the other stores are tested against.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from rankd.features.stores.done_futures import answered, refused
from rankd.features.stores.event_records import HEADER_BYTES, appended, counts_of, is_history, mark_of
from rankd.features.stores.feature_store import Heard, HistoryRead, Pair, StoreFailure, StoreHealth, Trouble
from rankd.features.stores.store_keys import history_prefix

MAX_HISTORIES = 1_000_000
KEYS_A_BATCH = 1000
_HISTORIES = history_prefix("").removesuffix(b":")  # what the histories of every namespace begin with


class MemoryStore:
    """Rows and histories in this process. Thread-safe.

    Of the histories the `max_histories` that changed last stay; who has not come back for longest is forgotten first.
    """

    local = True

    def __init__(self, max_histories: int = MAX_HISTORIES) -> None:
        self._max_histories = max_histories
        self._values: dict[bytes, bytes] = {}
        self._order: OrderedDict[bytes, None] = OrderedDict()  # keys of histories, the one that changed last behind
        self._lock = threading.Lock()  # guards everything above and below
        self._failures: Counter[str] = Counter()
        self._read_keys = self._read_bytes = self._written_bytes = 0

    def get(self, keys: Sequence[bytes]) -> Future[list[bytes | None]]:
        """The values of some keys in their order."""
        with self._lock:
            values = [self._values.get(key) for key in keys]
            self._count_read(values)
        return answered(values)

    def put(self, pairs: Sequence[Pair]) -> Future[None]:
        """Write values over what is there, all at once."""
        with self._lock:
            for key, value in pairs:
                self._write(key, value)
        return answered(None)

    def delete(self, keys: Sequence[bytes]) -> Future[None]:
        """Remove keys, all at once."""
        with self._lock:
            for key in keys:
                self._values.pop(key, None)
                self._order.pop(key, None)
        return answered(None)

    def exchange(self, key: bytes, expected: bytes | None, value: bytes) -> Future[bool]:
        """Write a value if the one there is `expected`."""
        with self._lock:
            if self._values.get(key) != expected:
                return answered(False)
            self._write(key, value)
        return answered(True)

    def history(self, key: bytes, mark: bytes = b"") -> Future[HistoryRead]:
        """A history record, unless its first bytes are `mark`."""
        with self._lock:
            record = self._values.get(key)
            changed = mark_of(record) != mark
            self._count_read([record] if changed else [None])
        return answered(HistoryRead(changed, record if changed else None))

    def append(self, key: bytes, records: bytes, most: int) -> Future[bytes]:
        """Add event records to a history."""
        with self._lock:
            old = self._values.get(key)
            if old is not None and not is_history(old):
                self._failures[Trouble.BROKEN.value] += 1
                return refused(StoreFailure(f"the value at {key!r} is not a history record", Trouble.BROKEN))
            new = appended(old, records, most)
            if new != old and counts_of(new) != (0, 0):
                self._write(key, new)
        return answered(new[:HEADER_BYTES])

    def append_many(self, appends: Sequence[Pair], most: int) -> list[Future[bytes]]:
        """Add event records to several histories."""
        return [self.append(key, records, most) for key, records in appends]

    def keys(self, prefix: bytes) -> Iterator[list[bytes]]:
        """All keys that begin with a prefix, as they are when the first batch is asked for."""
        with self._lock:
            found = [key for key in self._values if key.startswith(prefix)]
        for start in range(0, len(found), KEYS_A_BATCH):
            yield found[start : start + KEYS_A_BATCH]

    def listen(self, heard: Heard) -> None:
        """Nothing is told: a local store is asked each time."""

    def listening(self) -> int:
        """Always 0."""
        return 0

    def health(self) -> StoreHealth:
        """A snapshot; always up."""
        with self._lock:
            return StoreHealth(
                up=True,
                failures=dict(self._failures),
                read_keys=self._read_keys,
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
            )

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
            self._order.clear()

    def _write(self, key: bytes, value: bytes) -> None:
        self._values[key] = value
        self._written_bytes += len(value)
        if not key.startswith(_HISTORIES):
            return
        self._order[key] = None
        self._order.move_to_end(key)
        if len(self._order) > self._max_histories:
            oldest, _ = self._order.popitem(last=False)
            del self._values[oldest]

    def _count_read(self, values: Sequence[bytes | None]) -> None:
        self._read_keys += len(values)
        self._read_bytes += sum(map(len, filter(None, values)))
