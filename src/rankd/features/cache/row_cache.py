"""Rows next to the model: a cache whose look-ups, decoding and insertions take a whole request at a time.

In: 64-bit keys (`store_keys.hash_id`) and packed rows (`rows/row_schema.py`). Out: the RowStatus of each key, and rows
decoded straight from the cache's memory into the arrays of a request. Next: `cache_kernels.py`, which holds the loops.

All memory is one piece, taken when the cache is made, that never grows. Worked example, rows of 64 words and a budget
of 1 MiB: a bucket of 16 slots takes 16 x 256 bytes of rows, 128 of keys, 256 of marks and 1 of age, so 234 buckets fit,
3744 slots in 1024 KiB.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rankd.errors import ConfigError
from rankd.features.rows.row_decoding import RowDecoder, RowStatus
from rankd.features.rows.row_schema import WORD_BYTES
from rankd.types import Array, Float32Array, Int32Array, Int64Array

WAYS = 16
"""Slots of a bucket: their keys are two cache lines, compared at once. 8 find 0.3 % fewer keys."""
AGING = 4 * WAYS
"""Evictions of a bucket after which its uses are halved; see `cache_kernels.MOST_USES`."""
PROBED, READ, INSERTED, EVICTED, USED = range(5)
"""Lines of the counters; the last three have one number."""
_BUCKET_BYTES = WAYS * (8 + 2 * 8) + 1  # keys, marks, age
_LONGEST_MS = 2**59


class Slots(NamedTuple):
    """The arrays of a cache of N buckets, as the kernels read and write them.

    keys: (N, WAYS) uint64, 0 where a slot is free
    marks: (N, WAYS, 2) int64, see `cache_kernels.py`
    values: (N x WAYS, words) uint32, the rows
    ages: (N,) uint8, evictions since the uses of a bucket were halved
    counters: (5, 7) int64, by RowStatus
    """

    keys: Array
    marks: Int64Array
    values: Array
    ages: Array
    counters: Int64Array


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """A snapshot: keys by what was found of them, rows inserted and evicted since the start, and what is here now."""

    probed: Mapping[RowStatus, int]
    read: Mapping[RowStatus, int]
    insertions: int
    evictions: int
    used_slots: int
    memory_bytes: int


class RowCache:
    """Rows of `row_words` words under a byte budget. Thread-safe; times are ms of one clock of the caller's.

    A key's row leaves when its bucket is full and it is the least used there (`cache_kernels.py`). A request probes its
    keys, then reads them; only the probe is counted as a use. The first cache of a process compiles its loops (seconds;
    kept on disk for the next process).

    Raises:
        ConfigError: the budget does not hold one bucket.
    """

    def __init__(self, row_words: int, budget_bytes: int) -> None:
        # Imported here: it brings numba, which takes half a second.
        from rankd.features.cache import cache_kernels

        bucket = _BUCKET_BYTES + WAYS * WORD_BYTES * row_words
        buckets = budget_bytes // mmap.PAGESIZE * mmap.PAGESIZE // bucket
        if buckets < 1:
            least = -(-bucket // mmap.PAGESIZE) * mmap.PAGESIZE
            raise ConfigError(
                f"a row cache of {budget_bytes} bytes was given, and the smallest one for rows of "
                f"{WORD_BYTES * row_words} bytes takes {least}; give more, or 0 to keep no rows"
            )
        self._kernels, self.row_words = cache_kernels, row_words
        self._memory = _taken(buckets * bucket)
        self._slots = _cut(self._memory, buckets, row_words)
        self._lock = threading.Lock()  # held around each kernel, so that nobody reads half a row

    @property
    def memory_bytes(self) -> int:
        """Bytes taken from the machine: rows, keys, marks and ages, in whole pages."""
        return -(-self._memory.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def slots(self) -> int:
        """Rows that there is room for."""
        return len(self._slots.values)

    @property
    def used_slots(self) -> int:
        """Slots that hold a row, or that the store has none."""
        return int(self._slots.counters[USED, 0])

    def probe(self, keys: Array, now_ms: int, status: Array) -> None:
        """The RowStatus of keys (n,) uint64 into status (n,) uint8; those that are here are used once more.

        Raises:
            ValueError: `status` has not one place for each key.
        """
        _check(keys, status)
        with self._lock:
            self._kernels.probe_keys(self._slots, keys, now_ms, status)

    def read(
        self,
        keys: Array,
        now_ms: int,
        decoder: RowDecoder,
        numeric: Float32Array,
        categories: Int32Array,
        status: Array,
    ) -> int:
        """Decode the rows of keys (n,) uint64 that are here, fresh or stale, into numeric (n, F) and categories (n, G).

        Lines of other keys stay as they are. `status` (n,) uint8 gets the RowStatus of each key. Returns the age in ms
        of the oldest row that was decoded, 0 if none was.

        Raises:
            ValueError: arrays whose shapes do not fit each other, or a decoder of other rows.
        """
        _check(keys, status)
        decoder.check(numeric, categories)
        if numeric.shape[0] != keys.shape[0] or decoder.row_words != self.row_words:
            raise ValueError(
                f"{keys.shape[0]} keys of rows of {self.row_words} words, and {numeric.shape[0]} lines with a decoder "
                f"of rows of {decoder.row_words}; they have to be the same"
            )
        with self._lock:
            age: int = self._kernels.read_keys(self._slots, keys, now_ms, decoder.decoding, numeric, categories, status)
        return age

    def insert(self, keys: Array, rows: Array, present: Array, now_ms: int, ttl_ms: int, absent_ttl_ms: int) -> None:
        """Keep rows (m, row_words) uint32 under keys (m,) uint64, fresh for `ttl_ms`.

        Where `present` (m,) bool is False, that the store has no such row is kept for `absent_ttl_ms`. Key 0 is passed
        over.

        Raises:
            ValueError: arrays whose shapes do not fit each other.
        """
        if rows.shape != (keys.shape[0], self.row_words) or present.shape != keys.shape:
            raise ValueError(
                f"rows are {rows.shape} and present {present.shape}, expected {(keys.shape[0], self.row_words)} and "
                f"{keys.shape}"
            )
        until, absent_until = (now_ms + min(ttl, _LONGEST_MS) for ttl in (ttl_ms, absent_ttl_ms))
        with self._lock:
            self._kernels.insert_rows(self._slots, keys, rows, present, now_ms, until, absent_until)

    def drop(self, keys: Array) -> None:
        """Forget keys (n,) uint64."""
        with self._lock:
            self._kernels.drop_keys(self._slots, keys)

    def expire(self) -> None:
        """Make everything that is here stale."""
        with self._lock:
            self._slots.marks[:, :, 0] &= self._kernels.WITHOUT_TIME

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._slots.keys[:] = 0
            self._slots.counters[USED, 0] = 0

    def counts(self) -> CacheCounts:
        """A snapshot."""
        with self._lock:
            counters = self._slots.counters.tolist()
        return CacheCounts(
            probed={status: counters[PROBED][status] for status in RowStatus},
            read={status: counters[READ][status] for status in RowStatus},
            insertions=counters[INSERTED][0],
            evictions=counters[EVICTED][0],
            used_slots=counters[USED][0],
            memory_bytes=self.memory_bytes,
        )


def _taken(size: int) -> Array:
    """Zeroed memory (size,) uint8 that is touched already, in pages of 2 MiB where the system gives them.

    Raises:
        ConfigError: the system has not so much.
    """
    try:
        if sys.platform == "win32":
            memory = mmap.mmap(-1, size)
        else:  # private, for only that can be of large pages
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(f"a row cache of {size} bytes cannot be had here: {error}; give it less") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    whole[:] = 0  # takes every page now, rather than one after the other while requests wait
    return whole


def _cut(memory: Array, buckets: int, row_words: int) -> Slots:
    """The arrays of a cache in its memory; each begins with a cache line."""
    sizes = (WAYS * WORD_BYTES * row_words, WAYS * 8, WAYS * 16, 1)
    ends = np.cumsum([buckets * size for size in sizes]).tolist()
    values, keys, marks, ages = (memory[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True))
    return Slots(
        keys.view(np.uint64).reshape(buckets, WAYS),
        marks.view(np.int64).reshape(buckets, WAYS, 2),
        values.view(np.uint32).reshape(buckets * WAYS, row_words),
        ages,
        np.zeros((5, len(RowStatus)), np.int64),
    )


def _check(keys: Array, status: Array) -> None:
    if keys.shape != status.shape:
        raise ValueError(f"status has {status.shape[0]} places for {keys.shape[0]} keys")
