"""The frame as bytes: written by hand, cut, altered, and any bytes at all."""

from __future__ import annotations

import socket
import struct
import threading
import time

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from rankd.errors import (
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    RankdError,
    ShardFailure,
    Trouble,
    Unavailable,
)
from rankd.shards.frame_errors import LONGEST_MESSAGE, error_payload, read_error
from rankd.shards.frames import HEADER_BYTES, UNLIMITED_US, Header, Kind, frame, read_header, read_payload
from rankd.shards.streams import Stream

FRAME_S = 0.05


def written(kind: Kind, number: int = 7, payload: bytes = b"", budget_us: int = UNLIMITED_US) -> bytes:
    """A frame's bytes."""
    return b"".join(frame(kind, number, [memoryview(payload)], budget_us))


def read(data: bytes, limit: int = 1 << 20) -> tuple[Header, bytes]:
    """The frame that some bytes are, when nothing follows and the sender stays."""
    ours, theirs = socket.socketpair()
    stream = Stream(ours)
    try:
        theirs.sendall(data)
        header = read_header(stream, limit, time.perf_counter() + FRAME_S, FRAME_S)
        return header, bytes(read_payload(stream, header, FRAME_S))
    finally:
        stream.close()
        theirs.close()


def test_a_frame_written_by_hand() -> None:
    front = b"RKSH" + bytes([1, 5, 0, 0]) + b"\x02\x01\0\0\0\0\0\0" + b"\x10\x27\0\0" + b"\x03\0\0\0"
    data = front + struct.pack("<Q", xxhash.xxh3_64_intdigest(front + b"abc")) + b"abc"
    header, payload = read(data)
    assert header[:4] == (Kind.POOL, 258, 10_000, 3)
    assert payload == b"abc"
    assert written(Kind.POOL, 258, b"abc", 10_000) == data


@given(st.sampled_from(Kind), st.integers(0, 2**64 - 1), st.binary(max_size=300), st.integers(0, UNLIMITED_US))
def test_what_is_written_is_read(kind: Kind, number: int, payload: bytes, budget_us: int) -> None:
    header, found = read(written(kind, number, payload, budget_us))
    assert header[:4] == (kind, number, budget_us, len(payload))
    assert found == payload


@given(st.binary(min_size=HEADER_BYTES, max_size=100))
def test_any_bytes_are_an_error_with_a_type(data: bytes) -> None:
    with pytest.raises(ShardFailure) as caught:
        read(data)
    assert caught.value.trouble is Trouble.BROKEN


@given(st.data())
def test_a_bit_that_differs_is_noticed(data: st.DataObject) -> None:
    whole = bytearray(written(Kind.POOLED, 3, b"some payload"))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ShardFailure):
        read(bytes(whole))


def test_a_frame_that_stops_is_noticed_at_every_byte() -> None:
    whole = written(Kind.POOLED, 3, b"some payload")
    for end in range(1, len(whole)):
        ours, theirs = socket.socketpair()
        stream = Stream(ours)
        theirs.sendall(whole[:end])
        theirs.close()
        with pytest.raises(ConnectionError):
            read_payload(stream, read_header(stream, 1 << 20, None, 1.0), 1.0)
        stream.close()
    for end in (1, HEADER_BYTES - 1, HEADER_BYTES, len(whole) - 1):  # the sender stays and says no more
        with pytest.raises(ShardFailure, match="did not go on"):
            read(whole[:end])
    with pytest.raises(TimeoutError):
        read(b"")


def test_a_length_over_the_limit_is_refused_from_the_header_alone() -> None:
    whole = written(Kind.POOLED, 3, bytes(1001))
    assert read(whole, limit=1001)[0].length == 1001
    with pytest.raises(ShardFailure, match="1001 bytes came, taken are 1000"):
        read(whole[:HEADER_BYTES], limit=1000)


def test_another_version_is_refused_by_name() -> None:
    whole = bytearray(written(Kind.PING))
    whole[4] = 2
    with pytest.raises(ShardFailure, match="version 2"):
        read(bytes(whole))


def test_frames_of_several_threads_do_not_mix_and_a_full_socket_waits() -> None:
    ours, theirs = socket.socketpair()
    sender, receiver = Stream(ours), Stream(theirs)
    payloads = {number: bytes([number]) * 300_000 for number in range(8)}

    def send(number: int) -> None:
        pieces = [memoryview(payloads[number])[begin : begin + 1000] for begin in range(0, 300_000, 1000)]
        sender.send(frame(Kind.POOLED, number, pieces), time.perf_counter() + 10.0)

    threads = [threading.Thread(target=send, args=(number,)) for number in payloads]
    for thread in threads:
        thread.start()
    for _ in threads:
        header = read_header(receiver, 1 << 20, time.perf_counter() + 10.0, 10.0)
        assert bytes(read_payload(receiver, header, 10.0)) == payloads.pop(header.number)
    for thread in threads:
        thread.join()
    sender.close()
    receiver.close()


def test_a_frame_that_is_half_sent_at_its_deadline_ends_the_connection() -> None:
    ours, theirs = socket.socketpair()
    stream = Stream(ours)
    with pytest.raises(TimeoutError):
        stream.send(frame(Kind.POOLED, 1, [memoryview(bytes(50 << 20))]), time.perf_counter() + 0.05)
    with pytest.raises(OSError, match=r"[Pp]ipe"):
        stream.send(frame(Kind.PING, 2), time.perf_counter() + 0.05)
    stream.close()
    theirs.close()


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("m"),
        PayloadTooLarge("m"),
        DeadlineExceeded("m"),
        Overloaded("m", 1.0),
        Unavailable("m"),
        EngineFailure("m"),
        ShardFailure("m", Trouble.DENIED),
        ShardFailure("m", Trouble.BROKEN),
    ],
)
def test_an_error_arrives_as_what_it_was(error: RankdError) -> None:
    found = read_error(error_payload(error)[0], "shard 'a'")
    assert type(found) is type(error)
    assert str(found) == "shard 'a': m"
    if isinstance(error, ShardFailure) and isinstance(found, ShardFailure):
        assert found.trouble is error.trouble


@given(st.binary(max_size=40))
def test_any_bytes_as_an_error_are_one(data: bytes) -> None:
    found: RankdError
    try:
        found = read_error(memoryview(data), "shard 'a'")
    except ShardFailure as failure:
        found = failure
    assert len(data) >= 2 or (isinstance(found, ShardFailure) and found.trouble is Trouble.BROKEN)


def test_a_long_message_is_cut_so_that_it_can_be_read() -> None:
    found = read_error(error_payload(InvalidRequest("ü" * 5000))[0], "a")
    assert len(str(found)) <= LONGEST_MESSAGE + 3
