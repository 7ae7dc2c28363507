"""The protocol of stores: bytes by key, in batches, answered by Futures.

In: keys from `store_keys.py`. Out: packed rows (`rows/`) and history records (`event_records.py`). Three stores speak
it:

    memory   this process alone; forgets on a restart
    lmdb     a folder on this machine's disk, shared by its processes; an append is synced before it is acknowledged
    redis    Redis or Valkey, one server or a cluster

A store never decodes what it keeps. It does not retry: who asks decides what to do without an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from rankd.errors import StoreFailure, Trouble

__all__ = ["FeatureStore", "Heard", "HistoryRead", "Pair", "StoreFailure", "StoreHealth", "Trouble"]

Pair = tuple[bytes, bytes]
Heard = Callable[[bytes, bytes], None]
"""Called with (history key, appended records) when anybody appended to a history; from a thread of the store."""


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """A snapshot of what a store did. `trouble` is None while it works; `failures` counts by Trouble value."""

    up: bool
    trouble: Trouble | None = None
    failures: Mapping[str, int] = field(default_factory=dict)
    read_keys: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    recoveries: int = 0


@dataclass(frozen=True, slots=True)
class HistoryRead:
    """A history as the store has it. `record` is None where the user has none, or where nothing `changed`."""

    changed: bool
    record: bytes | None = None


class FeatureStore(Protocol):
    """Whatever keeps bytes by key. Thread-safe. Futures end with a result or a StoreFailure, never later than the
    store's own time limit; those of a `local` store are done when the call returns."""

    @property
    def local(self) -> bool:
        """Whether a read costs microseconds, so that asking each time is cheaper than keeping and checking."""
        ...

    def get(self, keys: Sequence[bytes]) -> Future[list[bytes | None]]:
        """The values of some keys in their order; None where there is none. An empty list is answered at once."""
        ...

    def put(self, pairs: Sequence[Pair]) -> Future[None]:
        """Write values over what is there. When it is done they survive what the store survives."""
        ...

    def delete(self, keys: Sequence[bytes]) -> Future[None]:
        """Remove keys; those that are not there are passed over."""
        ...

    def exchange(self, key: bytes, expected: bytes | None, value: bytes) -> Future[bool]:
        """Write a value if the one there is `expected` (None: if there is none), in one step. False: it was another."""
        ...

    def history(self, key: bytes, mark: bytes = b"") -> Future[HistoryRead]:
        """A history record, unless its first MARK_BYTES are `mark`: then it is the one the caller has."""
        ...

    def append(self, key: bytes, records: bytes, most: int) -> Future[bytes]:
        """Add event records to a history in one step, those left out whose id is there; keep the newest `most`.

        Returns the header of the record as it is now. Whoever asks for the history after this is done sees the events.
        """
        ...

    def append_many(self, appends: Sequence[Pair], most: int) -> list[Future[bytes]]:
        """As `append` for several keys, each by itself, and with one sync of the disk where there is one."""
        ...

    def keys(self, prefix: bytes) -> Iterator[list[bytes]]:
        """All keys that begin with a prefix, in batches; blocks. Keys written meanwhile may be missing.

        Raises:
            StoreFailure: as the Futures.
        """
        ...

    def listen(self, heard: Heard) -> None:
        """Have every append from now on told to `heard`, whoever made it."""
        ...

    def listening(self) -> int:
        """0 while appends of others may be missed; else a number that is another one after each time they were.

        A local store answers 0: it is asked each time.
        """
        ...

    def health(self) -> StoreHealth:
        """A snapshot."""
        ...

    def close(self) -> None:
        """Finish what was asked for and let go of everything; nothing is asked after this."""
        ...
