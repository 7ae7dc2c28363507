"""What a shard has done, for its `stats` frame: requests by how they ended, look-ups, rows and times."""

from __future__ import annotations

import threading
from enum import Enum

import msgspec


class Ending(Enum):
    """Of a request to a shard."""

    ANSWERED = "answered"
    INVALID = "invalid"
    LATE = "late"  # its budget had passed before it was begun
    FULL = "full"  # too much waited
    FAILED = "failed"  # the look-up failed on a valid request
    GONE = "gone"  # nobody was there any more to take the answer


class ShardStats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Since the start, save `waiting` and `connections`: now.

    `requests` by Ending value; `lookups`: rows that were read; `rows`: sums that were sent, a sample and table each;
    `queue_ms` and `service_ms`: of all requests together, without sending.
    """

    requests: dict[str, int]
    lookups: int = 0
    rows: int = 0
    queue_ms: float = 0.0
    service_ms: float = 0.0
    waiting: int = 0
    connections: int = 0


class ShardTally:
    """The counts of a shard. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = {ending.value: 0 for ending in Ending}
        self._lookups = self._rows = 0
        self._queue_s = self._service_s = 0.0

    def ended(self, ending: Ending, queue_s: float = 0.0, service_s: float = 0.0) -> None:
        """A request has ended, after so long in the queue and in work."""
        with self._lock:
            self._requests[ending.value] += 1
            self._queue_s += queue_s
            self._service_s += service_s

    def pooled(self, lookups: int, rows: int) -> None:
        """So many rows were read, and sums made of them."""
        with self._lock:
            self._lookups += lookups
            self._rows += rows

    def stats(self, waiting: int, connections: int) -> ShardStats:
        """A snapshot."""
        with self._lock:
            return ShardStats(
                dict(self._requests),
                self._lookups,
                self._rows,
                self._queue_s * 1e3,
                self._service_s * 1e3,
                waiting,
                connections,
            )
