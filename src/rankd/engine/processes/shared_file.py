"""Memory that several processes see: one file without a name, mapped by whoever was given its descriptor.

`SharedFile` is the side that hands out memory, an extent of the file for each allocation, and finds the extent that an
array lies in; `SharedView` is the other side, which is told an offset. An extent whose arrays are gone gives its pages
back; its place in the file is not used again, so that an offset never means something else than it did. A file takes
only the pages that were written to: 1 GiB for states costs nothing until there are states.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from bisect import bisect_right, insort
from collections import deque

import numpy as np

from rankd.errors import ConfigError
from rankd.types import Array, Bytes

PAGE = mmap.ALLOCATIONGRANULARITY
MOST_VIEWS = 4096
"""Of arrays that calls named: a few for each bucket and executor, and one or more for each state in memory."""


class SharedFile:
    """Thread-safe.

    Raises:
        ConfigError: this system has no such files (it is not Linux).
    """

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise ConfigError('engine.isolation = "processes" needs Linux (memfd_create); use "threads"')
        self.descriptor = os.memfd_create("rankd", os.MFD_CLOEXEC)
        self._lock = threading.Lock()
        self._size = 0
        self._starts: list[tuple[int, int]] = []  # (address, offset) of extents, in order; an address may come again
        self._lengths: dict[int, int] = {}  # offset -> bytes
        self._gone: deque[tuple[int, int]] = deque()  # appended by finalizers, whose thread may hold the lock

    def allocate(self, num_bytes: int) -> Bytes:
        """(num_bytes,) uint8 of zeros, from the beginning of a page on."""
        length = max(-(-num_bytes // PAGE), 1) * PAGE
        with self._lock:
            self._forget_gone()
            offset = self._size
            os.ftruncate(self.descriptor, offset + length)
            self._size = offset + length
            mapped = mmap.mmap(self.descriptor, length, offset=offset)
            memory: Bytes = np.frombuffer(mapped, np.uint8, num_bytes)
            start = memory.__array_interface__["data"][0], offset
            insort(self._starts, start)
            self._lengths[offset] = length
            weakref.finalize(mapped, self._gone.append, start).atexit = False
        return memory

    def offset_of(self, array: Array) -> int | None:
        """Where a contiguous array lies in the file; None if it lies elsewhere."""
        address: int = array.__array_interface__["data"][0]
        with self._lock:
            self._forget_gone()
            place = bisect_right(self._starts, (address, self._size)) - 1
            if place < 0:
                return None
            start, offset = self._starts[place]
            length = self._lengths[offset]
        inside = address - start
        return offset + inside if inside + array.nbytes <= length else None

    def close(self) -> None:
        """Let go of the file; arrays that are still used stay as they are."""
        with self._lock:
            if self.descriptor >= 0:
                os.close(self.descriptor)
                self.descriptor = -1

    def _forget_gone(self) -> None:
        while self._gone:
            start = self._gone.popleft()
            offset, length = start[1], self._lengths.pop(start[1])
            self._starts.remove(start)
            with mmap.mmap(self.descriptor, length, offset=offset) as pages:
                pages.madvise(mmap.MADV_REMOVE)


class SharedView:
    """The file seen from a process that was given its descriptor. Not thread-safe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._bytes: Bytes = np.empty(0, np.uint8)
        self._views: dict[tuple[int, str, tuple[int, ...]], Array] = {}

    def array(self, offset: int, dtype: str, shape: tuple[int, ...]) -> Array:
        """The array that lies at an offset."""
        known = self._views.get((offset, dtype, shape))
        if known is not None:
            return known
        kind = np.dtype(dtype)
        size = kind.itemsize * math.prod(shape)
        if offset + size > self._bytes.nbytes:
            whole = mmap.mmap(self._descriptor, os.fstat(self._descriptor).st_size)
            self._bytes = np.frombuffer(whole, np.uint8)
            self._views.clear()  # they keep the smaller mapping
        if len(self._views) >= MOST_VIEWS:
            self._views.clear()
        view: Array = self._bytes[offset : offset + size].view(kind).reshape(shape)
        self._views[offset, dtype, shape] = view
        return view
