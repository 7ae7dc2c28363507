"""The history of a user as bytes: a header and a record of 64 bytes for each event, in the order they came.

    header (24 bytes)   format u32 = 1, events dropped u32, number of events ever u64, id of the newest event u64
    event (64 bytes)    item u64, time i64, event type u32, flags u32 (0), 4 x (name u32, value f32), id u64

Little-endian. Items are `hash_id` of their ids; types and value names the lower 32 bits of it; name 0 ends the values.
Nothing in it belongs to one model version, so every version reads the same record. The first MARK_BYTES are different
for every content that a history ever had. Ids make an append repeatable: an event whose id is there is not added again.

`appended` is the rule of appending; the Redis script does the same and is tested against it.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rankd.features.stores.store_keys import hash_id
from rankd.types import Array

FORMAT = 1
HEADER = struct.Struct("<IIQQ")
HEADER_BYTES = MARK_BYTES = HEADER.size
MAX_VALUES = 4
RECORD = np.dtype(
    [
        ("item", "<u8"),
        ("time", "<i8"),
        ("event", "<u4"),
        ("flags", "<u4"),
        ("values", [("name", "<u4"), ("value", "<f4")], (MAX_VALUES,)),
        ("id", "<u8"),
    ]
)
RECORD_BYTES = RECORD.itemsize
ID_BYTES = 8


@dataclass(frozen=True, slots=True)
class RawEvent:
    """An event as it is stored: raw values by name, at most MAX_VALUES; `identity` 0 draws one at random."""

    item_id: str
    event: str
    time: int
    values: Mapping[str, float]
    identity: int = 0


def hash_name(name: str) -> int:
    """An event type or a value's name as 32 bits, never 0."""
    return hash_id(name) & 0xFFFFFFFF or 1


def pack_events(events: Sequence[RawEvent]) -> bytes:
    """Events as records, in their order."""
    records = np.zeros(len(events), RECORD)
    for number, event in enumerate(events):
        record = records[number]
        record["item"], record["time"], record["event"] = hash_id(event.item_id), event.time, hash_name(event.event)
        for place, (name, value) in enumerate(event.values.items()):
            record["values"][place] = (hash_name(name), value)
        record["id"] = event.identity or secrets.randbits(64) or 1
    return records.tobytes()


def unpack_events(record: bytes | memoryview) -> Array:
    """The events of a history record, (n,) RECORD, as a view."""
    return np.frombuffer(record, RECORD, offset=HEADER_BYTES)


def mark_of(record: bytes | memoryview | None) -> bytes:
    """The mark of a history record; of no history that of nothing."""
    return b"" if record is None else bytes(record[:MARK_BYTES])


def counts_of(record: bytes | memoryview) -> tuple[int, int]:
    """How many events were dropped because only the newest are kept, and how many there ever were."""
    _, dropped, ever, _ = HEADER.unpack_from(record)
    return dropped, ever


def is_history(record: bytes | memoryview) -> bool:
    """Whether bytes are a whole history record of this format."""
    size = len(record) - HEADER_BYTES
    if size < 0 or size % RECORD_BYTES:
        return False
    layout, dropped, ever, _ = HEADER.unpack_from(record)
    return bool(layout == FORMAT and ever == dropped + size // RECORD_BYTES)


def appended(record: bytes | None, records: bytes, most: int) -> bytes:
    """A history record with event records added behind, except those whose id it has; the newest `most` stay.

    The same record comes back if there is nothing to add.
    """
    old = record if record is not None else HEADER.pack(FORMAT, 0, 0, 0)
    _, dropped, ever, newest = HEADER.unpack_from(old)
    known = set(unpack_events(old)["id"].tolist())
    added = []
    for start in range(0, len(records), RECORD_BYTES):
        one = records[start : start + RECORD_BYTES]
        identity = int.from_bytes(one[-ID_BYTES:], "little")
        if identity not in known:
            known.add(identity)
            added.append(one)
            newest = identity
    if not added:
        return old
    body = old[HEADER_BYTES:] + b"".join(added)
    over = max(len(body) // RECORD_BYTES - most, 0)
    return HEADER.pack(FORMAT, dropped + over, ever + len(added), newest) + body[over * RECORD_BYTES :]
