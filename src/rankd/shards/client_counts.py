"""What a client of shards has done since its start."""

from __future__ import annotations

import threading
from enum import Enum


class Counted(Enum):
    """What is counted."""

    CALLS = "calls"  # one for each shard and net of a request
    HEDGED = "hedged"  # sent to a second replica, since the first took long
    RETRIED = "retried"  # sent to another replica, since the one before failed
    DEGRADED_TABLES = "degraded_tables"  # whose defaults were given
    FAILED = "failed"  # requests of which a table without a default could not be had


class RowsFrom(Enum):
    """Where rows were looked up."""

    SHARDS = "shards"
    KEPT = "kept"  # in this process, being hot


class ClientCounts:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Counted | RowsFrom, int] = dict.fromkeys([*Counted, *RowsFrom], 0)

    def add(self, what: Counted | RowsFrom, number: int = 1) -> None:
        """So many more."""
        with self._lock:
            self._counts[what] += number

    def snapshot(self, kind: type[Counted] | type[RowsFrom] = Counted) -> dict[str, int]:
        """By the values of a kind."""
        with self._lock:
            return {what.value: self._counts[what] for what in kind}
