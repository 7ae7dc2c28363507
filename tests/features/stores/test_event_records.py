"""The rule of appending: in Python by its properties, in Lua by being the same."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankd.features.stores.event_records import (
    HEADER,
    HEADER_BYTES,
    RawEvent,
    appended,
    counts_of,
    hash_name,
    is_history,
    mark_of,
    pack_events,
    unpack_events,
)
from rankd.features.stores.redis_scripts import APPEND, CHANNEL, appended_message
from rankd.features.stores.store_keys import hash_id
from tests.features.stores.event_samples import identities, record
from tests.features.stores.redis_server import RedisServer

# Some ids are found inside the content of other events (the same byte eight times), so that only those at an id's place
# may count; the others are the ends of the range.
IDS = (0, 1, 2, 0x0101010101010101, 0x0707070707070707, 2**53 + 1, 2**64 - 1, *range(10**18, 10**18 + 40))
POOL = [record(identity, content) for identity in IDS for content in (0, 1, 7)]
EVENTS = st.integers(0, len(POOL) - 1).map(POOL.__getitem__)
FEW = st.lists(EVENTS, max_size=6).map(b"".join)
MANY = st.lists(EVENTS, min_size=29, max_size=40).map(b"".join)
BATCHES = st.one_of(FEW, FEW, MANY)
MOSTS = st.integers(1, 45)


@st.composite
def histories(draw: st.DrawFn) -> bytes | None:
    """A history that is there, or none; some have lost events before."""
    if draw(st.booleans()):
        return None
    body = appended(None, draw(BATCHES), draw(MOSTS))
    dropped, ever = counts_of(body)
    before = draw(st.sampled_from([0, 1, 70_000]))
    return HEADER.pack(1, dropped + before, ever + before, HEADER.unpack_from(body)[3]) + body[HEADER_BYTES:]


@given(histories(), BATCHES, MOSTS)
def test_appending_keeps_the_newest_once(old: bytes | None, records: bytes, most: int) -> None:
    new = appended(old, records, most)
    assert is_history(new)
    assert appended(new, b"", most) == new
    before = identities(old)
    added = [one for one in dict.fromkeys(identities(bytes(HEADER_BYTES) + records)) if one not in before]
    if not added:
        assert new == (old if old is not None else HEADER.pack(1, 0, 0, 0))
        return
    assert identities(new) == (before + added)[-most:]
    assert mark_of(new) != mark_of(old)
    assert counts_of(new)[1] == (counts_of(old)[1] if old else 0) + len(added)


@pytest.fixture(scope="module")
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """One connection for all examples."""
    with redis.Redis(port=redis_server.port, protocol=2) as connected:
        yield connected


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories(), BATCHES, MOSTS)
def test_the_script_does_the_same(client: redis.Redis, old: bytes | None, records: bytes, most: int) -> None:
    key = b"rankd:h:shop:\xffada"
    client.delete(key)
    if old is not None:
        client.set(key, old)
    new = appended(old, records, most)
    assert client.eval(APPEND.text.decode(), 1, key, records, most, CHANNEL) == new[:HEADER_BYTES]
    assert client.get(key) == (new if old is not None or counts_of(new)[1] else None)


@given(st.binary(max_size=200))
def test_only_histories_are_histories(data: bytes) -> None:
    assert not is_history(b"\x02" + data)
    assert is_history(data) == (
        len(data) >= HEADER_BYTES
        and (len(data) - HEADER_BYTES) % 64 == 0
        and struct.unpack_from("<I", data)[0] == 1
        and counts_of(data)[1] - counts_of(data)[0] == len(data) // 64
    )


def test_events_are_packed_as_documented() -> None:
    events = [RawEvent("shoe", "buy", -5, {"price": 2.5, "stars": 4.0}, 77), RawEvent("hat", "view", 6, {})]
    packed = pack_events(events)
    price, stars = hash_name("price"), hash_name("stars")
    by_hand = struct.pack(
        "<QqIIIfIfIfIfQ", hash_id("shoe"), -5, hash_name("buy"), 0, price, 2.5, stars, 4.0, 0, 0, 0, 0, 77
    )
    assert packed[:64] == by_hand
    assert len(packed) == 128
    there = unpack_events(appended(None, packed, 10))
    assert there["item"].tolist() == [hash_id("shoe"), hash_id("hat")]
    assert there["id"][1] != 0
    assert pack_events(events)[64:] != packed[64:]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (b"\x03\x00abcRECORDS", (b"abc", b"RECORDS")),
        (b"\x00\x00", (b"", b"")),
        (b"", None),
        (b"\x03", None),
        (b"\x03\x00ab", None),
    ],
)
def test_messages(message: bytes, told: tuple[bytes, bytes] | None) -> None:
    assert appended_message(message) == told
