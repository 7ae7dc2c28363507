"""Which rows of a table are asked for most, learned from some of the requests. No clock, no threads.

In: ids of a request. Out: the hottest rows. Counts are halved from time to time, so that rows which were hot once make
room; and of many rows only the most asked for are remembered.
"""

from __future__ import annotations

import numpy as np

from rankd.types import Array, Int64Array

HALVED_EVERY = 1000
"""Requests; at four a second they are four minutes."""
REMEMBERED = 4
"""Times the rows that are wanted; at least LEAST."""
LEAST = 4096
LEAST_COUNT = 2.0
"""What was asked for once may never be again."""


class RowCounter:
    """Counts the rows of one table, to find the `wanted` hottest."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._rows: Int64Array = np.zeros(0, np.int64)
        self._counts: Array = np.zeros(0)
        self._requests = 0

    def saw(self, ids: Int64Array) -> None:
        """A request asks for these rows; those that it asks for several times count once each time."""
        self._requests += 1
        if self._requests % HALVED_EVERY == 0:
            self._counts /= 2
            self._keep(self._counts >= 0.5)
        rows, counts = np.unique(ids, return_counts=True)
        both, places = np.unique(np.concatenate([self._rows, rows]), return_inverse=True)
        self._counts = np.bincount(places, np.concatenate([self._counts, counts]), minlength=len(both))
        self._rows = both
        most = max(REMEMBERED * self._wanted, LEAST)
        if len(both) > 2 * most:
            kept = np.zeros(len(both), bool)
            kept[np.argpartition(self._counts, -most)[-most:]] = True
            self._keep(kept)

    def hottest(self) -> Int64Array:
        """At most `wanted` rows, ascending."""
        often = np.flatnonzero(self._counts >= LEAST_COUNT)
        if len(often) > self._wanted:
            often = often[np.argpartition(self._counts[often], -self._wanted)[-self._wanted :]]
        return np.sort(self._rows[often])

    def _keep(self, kept: Array) -> None:
        self._rows, self._counts = self._rows[kept], self._counts[kept]
