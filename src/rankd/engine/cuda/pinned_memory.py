"""Host memory that the GPU reads and writes where it lies, states above all; and who knows what lies in it.

In: sizes. Out: page-locked memory, or ordinary memory where the system refuses to lock so much; then what lies there
goes through the pinned blocks of `arriving_states.py`. Next: `fetched_states.py` has the GPU read states from here.
"""

from __future__ import annotations

import logging
import mmap
import threading
import weakref
from bisect import bisect_right, insort
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from rankd.errors import EngineFailure
from rankd.types import Array, Bytes

if TYPE_CHECKING:
    from rankd.engine.cuda.cuda_device import Device

log = logging.getLogger("rankd")
ALIGNMENT = 16
"""Bytes that a thread of the GPU reads or writes at once."""
MIB = 1 << 20


class _Piece:
    """What every array over a piece keeps: it goes with the last of them, before anybody else can get the addresses."""

    def __init__(self, memory: Bytes) -> None:
        self.memory, self.__array_interface__ = memory, memory.__array_interface__


class PinnedMemory:
    """Makes memory and remembers which of it is locked, for as long as somebody has it. Thread-safe."""

    def __init__(self, device: Device) -> None:
        self._device, self._warned = device, False
        self._lock = threading.Lock()
        self._starts: list[int] = []  # addresses of locked pieces, in order
        self._ends: dict[int, int] = {}  # of each piece, by its start
        self._gone: deque[int] = deque()  # appended by finalizers, whose thread may hold the lock

    def allocate(self, num_bytes: int) -> Bytes:
        """(num_bytes,) uint8 of zeros, locked if that can be had. All of it is taken at once, whatever is written."""
        try:
            with self._device.running():
                tensor = self._device.pinned(num_bytes)
        except EngineFailure as error:
            self._warn(num_bytes, error)
            return np.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), np.uint8, num_bytes)
        if num_bytes == 0:
            return np.empty(0, np.uint8)
        piece = _Piece(tensor.numpy())
        start = address_of(piece.memory)
        with self._lock:
            self._forget_gone()
            insort(self._starts, start)
            self._ends[start] = start + num_bytes
        weakref.finalize(piece, self._gone.append, start).atexit = False
        memory: Bytes = np.asarray(piece)
        return memory

    def holds(self, array: Array) -> bool:
        """Whether kernels can read and write an array where it lies: whole in locked memory, without gaps, and from a
        multiple of ALIGNMENT bytes on. Of an empty one there is nothing to read: false."""
        if array.nbytes == 0 or not array.flags.c_contiguous:
            return False
        address = address_of(array)
        with self._lock:
            self._forget_gone()
            place = bisect_right(self._starts, address) - 1
            inside = place >= 0 and address + array.nbytes <= self._ends[self._starts[place]]
        return inside and address % ALIGNMENT == 0

    def _forget_gone(self) -> None:
        while self._gone:
            start = self._gone.popleft()
            self._starts.remove(start)
            del self._ends[start]

    def _warn(self, num_bytes: int, error: EngineFailure) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "%.0f MiB of host memory cannot be locked (%s): states there are copied once more on their way to the "
                "GPU. Lower states.budget_mib, or let this process lock more (ulimit -l, the container's memory)",
                num_bytes / MIB,
                error,
            )


def address_of(array: Array) -> int:
    """Where an array begins."""
    address: int = array.__array_interface__["data"][0]
    return address
