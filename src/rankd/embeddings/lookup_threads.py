"""Threads that help with look-ups: they take spans of bags, as the caller does, until none is left.

In: the arrays of a look-up, and where its bags are cut. Out: sums. A helper that has worked stays awake for .2 ms and
lets others have its core meanwhile; then it sleeps. Waking it takes 20 to 40 us, and the interpreter's lock: that way
the next look-up of a busy process, which takes a millisecond, finds it awake.
"""

from __future__ import annotations

import threading

import numpy as np

from rankd.embeddings import shared_lookup_kernels as kernels
from rankd.embeddings.shared_lookup_kernels import ASLEEP, AWAKE, CLOSED, MAILBOX_CELLS, STATE
from rankd.types import Float32Array, Int64Array

TURNS = 300
"""Of a helper that is awake and has nothing to do; .2 ms of a core that nobody else wants."""


class LookupThreads:
    """`count` helpers, started by the first `wake`. Thread-safe: callers share them, and who finds none that is free
    works alone."""

    def __init__(self, count: int) -> None:
        self._helpers = [_Helper(number) for number in range(count)]

    def wake(self) -> None:
        """There is work soon."""
        for helper in self._helpers:
            helper.wake()

    def sum(self, tables: Int64Array, offsets: Int64Array, ids: Int64Array, cuts: Int64Array, out: Float32Array) -> int:
        """As `table_kernels.sum_bags`, of the bags from one of `cuts` (spans + 1,) to the next."""
        arrays = (
            tables.ctypes.data,
            len(tables),
            offsets.ctypes.data,
            ids.ctypes.data,
            cuts.ctypes.data,
            len(cuts) - 1,
        )
        job = np.asarray([0, *arrays, out.ctypes.data, *out.shape], np.int64)
        free = [helper for helper in self._helpers[: len(cuts) - 2] if helper.lent.acquire(blocking=False)]
        try:
            for helper in free:
                helper.wake()
            return kernels.sum_shared(job.ctypes.data, np.asarray([helper.mailbox for helper in free], np.int64))
        finally:
            for helper in free:
                helper.lent.release()

    def close(self) -> None:
        """End the helpers; look-ups that are under way end first."""
        for helper in self._helpers:
            helper.close()


class _Helper:
    """A thread and its mailbox; `lent` is held by the look-up that it helps with."""

    def __init__(self, number: int) -> None:
        self._cells = np.full(MAILBOX_CELLS, ASLEEP, np.int64)
        self.mailbox = int(self._cells.ctypes.data)
        self.lent = threading.Lock()
        self._asleep = threading.Lock()  # held while it sleeps; whoever changes ASLEEP releases it
        self._asleep.acquire()
        self._starting = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"rankd-tables-{number}", daemon=True)

    def wake(self) -> None:
        """Do nothing if it is awake."""
        if self._cells[STATE] != ASLEEP or not kernels.change(self.mailbox, ASLEEP, AWAKE):
            return
        self._asleep.release()
        if self._thread.ident is None:
            self._thread.start()

    def close(self) -> None:
        """End it."""
        with self.lent:
            while not kernels.change(self.mailbox, AWAKE, CLOSED):
                self.wake()
        self._thread.join()

    def _run(self) -> None:
        state = ASLEEP
        while state != CLOSED:
            self._asleep.acquire()
            state = kernels.help_out(self.mailbox, TURNS)
