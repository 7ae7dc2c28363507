"""What one writes first: rows in an OrderedDict, the least recently used one leaves, each key is looked up on its own.

It stands in the place of `features.cache.row_cache.RowCache` in a server of its own (`dict_server.py`), so that the
contestants differ in nothing else. Rows are kept as bytes and decoded together by the same kernels as in RowCache.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rankd.features.cache.row_cache import CacheCounts
from rankd.features.rows.row_decoding import RowDecoder, RowStatus
from rankd.features.rows.row_schema import WORD_BYTES
from rankd.types import Array, Float32Array, Int32Array

ROW_CACHE_EXTRA_BYTES = 24 + 1 / 16
"""Of a slot of RowCache, beside the row: the same budget holds as many rows in both."""
_NODE_BYTES = 56 + 24
"""Of an OrderedDict's own linked list, and of its entry in a dict's table, an eighth of which is empty on average."""

_MISSING, _FRESH, _SKIPPED = (int(status) for status in (RowStatus.MISSING, RowStatus.FRESH, RowStatus.SKIPPED))


class Entry(NamedTuple):
    """A row (None: the store has none), when it came and until when it is fresh, in ms."""

    row: bytes | None
    written: int
    until: int


class DictCache:
    """Rows of `row_words` words: as many as RowCache holds in `budget_bytes`, whatever they take here. Thread-safe."""

    def __init__(self, row_words: int, budget_bytes: int) -> None:
        self.row_words = row_words
        self.slots = int(budget_bytes / (row_words * WORD_BYTES + ROW_CACHE_EXTRA_BYTES))
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._insertions = self._evictions = 0
        self._lock = threading.Lock()
        one = Entry(bytes(row_words * WORD_BYTES), 2**40, 2**40)
        self._entry_bytes = sys.getsizeof(one) + sum(map(sys.getsizeof, (2**63, *one))) + _NODE_BYTES

    @property
    def memory_bytes(self) -> int:
        """What the entries take, as Python says, without what the allocator wastes."""
        return len(self._entries) * self._entry_bytes

    @property
    def used_slots(self) -> int:
        """Entries there are."""
        return len(self._entries)

    def probe(self, keys: Array, now_ms: int, status: Array) -> None:
        """The RowStatus of keys (n,) uint64 into status (n,) uint8; those that are here are the last ones to leave."""
        found = []
        with self._lock:
            get, move_to_end = self._entries.get, self._entries.move_to_end
            for key in keys.tolist():
                entry = get(key)
                if entry is None:
                    found.append(_MISSING if key else _SKIPPED)
                else:
                    move_to_end(key)
                    found.append(_FRESH if entry.until > now_ms and entry.row is not None else _other(entry, now_ms))
        status[:] = found

    def read(
        self,
        keys: Array,
        now_ms: int,
        decoder: RowDecoder,
        numeric: Float32Array,
        categories: Int32Array,
        status: Array,
    ) -> int:
        """Decode the rows of keys (n,) uint64 that are here, as RowCache does; returns the age in ms of the oldest."""
        found, places, rows, oldest = [], [], [], now_ms
        with self._lock:
            get = self._entries.get
            for number, key in enumerate(keys.tolist()):
                entry = get(key)
                if entry is None:
                    found.append(_MISSING if key else _SKIPPED)
                    continue
                found.append(_FRESH if entry.until > now_ms and entry.row is not None else _other(entry, now_ms))
                if entry.row is not None:
                    places.append(number)
                    rows.append(entry.row)
                    if entry.written < oldest:
                        oldest = entry.written
        status[:] = found
        if places:
            at = np.asarray(places, np.int64)
            words = np.frombuffer(b"".join(rows), np.uint32).reshape(len(rows), self.row_words)
            decoded = decoder.decode(words, numeric, categories, at)
            status[at[~decoded]] = RowStatus.WRONG_SCHEMA
        return now_ms - oldest

    def insert(self, keys: Array, rows: Array, present: Array, now_ms: int, ttl_ms: int, absent_ttl_ms: int) -> None:
        """Keep rows (m, row_words) uint32 under keys (m,) uint64, fresh for `ttl_ms`; see RowCache."""
        with self._lock:
            entries = self._entries
            for key, row, there in zip(keys.tolist(), rows, present.tolist(), strict=True):
                if not key:
                    continue
                entries[key] = (
                    Entry(row.tobytes(), now_ms, now_ms + ttl_ms)
                    if there
                    else Entry(None, now_ms, now_ms + absent_ttl_ms)
                )
                entries.move_to_end(key)
                self._insertions += 1
            while len(entries) > self.slots:
                entries.popitem(last=False)
                self._evictions += 1

    def expire(self) -> None:
        """Make everything that is here stale."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                self._entries[key] = entry._replace(until=0)

    def counts(self) -> CacheCounts:
        """A snapshot; look-ups are not counted."""
        nothing: Mapping[RowStatus, int] = dict.fromkeys(RowStatus, 0)
        return CacheCounts(nothing, nothing, self._insertions, self._evictions, self.used_slots, self.memory_bytes)


def _other(entry: Entry, now_ms: int) -> int:
    """The RowStatus of what is not simply there and fresh."""
    fresh = entry.until > now_ms
    if entry.row is None:
        return RowStatus.ABSENT if fresh else RowStatus.ABSENT_STALE
    return RowStatus.FRESH if fresh else RowStatus.STALE
