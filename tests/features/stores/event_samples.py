"""Event records by number, for tests of stores."""

from __future__ import annotations

import struct

from rankd.features.stores.event_records import RECORD_BYTES, unpack_events

_ID = struct.Struct("<Q")


def record(identity: int, content: int = 0) -> bytes:
    """An event record with an id."""
    return bytes([content % 256]) * (RECORD_BYTES - _ID.size) + _ID.pack(identity)


def records(*identities: int) -> bytes:
    """Event records with ids."""
    return b"".join(record(identity, identity) for identity in identities)


def identities(history: bytes | None) -> list[int]:
    """The ids in a history record."""
    return [] if history is None else [int(one) for one in unpack_events(history)["id"]]
