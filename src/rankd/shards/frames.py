"""The frame: 32 bytes of header, then a payload. Little-endian.

    0   magic      4 bytes    "RKSH"
    4   version    uint8      1
    5   kind       uint8      see Kind
    6   flags      uint16     1 of a POOL that is traced; 2 of a POOL that asks for sums in bfloat16, and of its POOLED
    8   number     uint64     of the request; its answer has the same. Of a HELLO: see handshake.py
    16  budget     uint32     microseconds left when it was sent, of an answer those that it took; 2**32 - 1: not said
    20  length     uint32     of the payload, bytes
    24  checksum   uint64     xxh3 of bytes 0 to 23 and of the payload

The payload of a traced POOL begins with the ids of its trace (16 bytes) and of the span that called (8 bytes), big
end first as W3C Trace Context writes them.

Whoever reads knows the largest payload that it takes, and checks the length before it takes memory for it. After
anything that is not such a frame the connection is closed: nobody knows where the next one would begin.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import xxhash

from rankd.errors import ShardFailure, Trouble
from rankd.shards.streams import Stream
from rankd.types import Array

MAGIC, VERSION = b"RKSH", 1
HEADER_BYTES, CHECKED_BYTES = 32, 24
UNLIMITED_US = 2**32 - 1
TRACED = 1
"""The flag of a POOL whose payload begins with TRACE_BYTES of a trace."""
NARROW = 2
"""The flag of a POOL that asks for sums in bfloat16, and of the POOLED that has them."""
TRACE_BYTES = 24
_FRONT, _CHECKSUM = struct.Struct("<4sBBHQII"), struct.Struct("<Q")


class Kind(IntEnum):
    """Of a frame. A client sends HELLO, PROOF, POOL, PING and STATS, the server what answers them."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    READY = 4
    POOL = 5
    POOLED = 6
    ERROR = 7
    PING = 8
    PONG = 9
    STATS = 10
    GOODBYE = 11


FLAGS = {Kind.POOL: TRACED | NARROW, Kind.POOLED: NARROW}
"""What a frame may have; of other kinds none."""


class Header(NamedTuple):
    """Of a frame that was read. `front` are the bytes that the checksum begins with."""

    kind: Kind
    number: int
    budget_us: int
    length: int
    checksum: int
    front: bytes
    flags: int = 0

    @property
    def traced(self) -> bool:
        """Whether its payload begins with a trace."""
        return bool(self.flags & TRACED)

    @property
    def narrow(self) -> bool:
        """Whether sums are asked for, or are, in bfloat16."""
        return bool(self.flags & NARROW)


def frame(
    kind: Kind,
    number: int,
    payload: Sequence[memoryview] = (),
    budget_us: int = UNLIMITED_US,
    trace: bytes = b"",
    narrow: bool = False,
) -> list[memoryview]:
    """The buffers of a frame: its header, then those of the payload as they are, behind a trace if there is one; none
    of them is copied.

    Raises:
        ShardFailure: a payload of 4 GiB or more.
    """
    payload = [memoryview(trace), *payload] if trace else payload
    length = sum(view.nbytes for view in payload)
    if length >= 2**32:
        raise ShardFailure(f"a payload of {length} bytes does not fit a frame: ask for less at once", Trouble.BROKEN)
    flags = (TRACED if trace else 0) | (NARROW if narrow else 0)
    front = _FRONT.pack(MAGIC, VERSION, kind, flags, number, budget_us, length)
    return [memoryview(front + _CHECKSUM.pack(checksum(front, payload))), *payload]


def checksum(front: bytes, payload: Sequence[memoryview]) -> int:
    """xxh3 of the first 24 bytes of a header and of the payload."""
    digest = xxhash.xxh3_64(front)
    for view in payload:
        digest.update(view)
    return digest.intdigest()


def parse_header(data: bytes, limit: int) -> Header:
    """A header of 32 bytes whose payload is to have at most `limit` bytes.

    Raises:
        ShardFailure: it is none, or the payload is longer.
    """
    magic, version, kind, flags, number, budget_us, length = _FRONT.unpack_from(data)
    if magic != MAGIC:
        raise ShardFailure(
            f"what came begins with {magic!r}, a frame with {MAGIC!r}: no shard is there", Trouble.BROKEN
        )
    known = Kind.HELLO <= kind <= Kind.GOODBYE
    allowed = FLAGS.get(Kind(kind), 0) if known else 0
    if version != VERSION or flags & ~allowed or (flags & TRACED and length < TRACE_BYTES):
        raise ShardFailure(
            f"a frame of version {version} and kind {kind} of {length} bytes with flags {flags:#x} came, read here is "
            f"version {VERSION}, of that kind with flags {allowed:#x}: use the same rankd on both sides",
            Trouble.BROKEN,
        )
    if not known:
        raise ShardFailure(f"a frame of kind {kind} came, known are 1 to {len(Kind)}", Trouble.BROKEN)
    if length > limit:
        raise ShardFailure(
            f"a frame with {length} bytes came, taken are {limit}: ask for less at once, or raise the limit",
            Trouble.BROKEN,
        )
    (expected,) = _CHECKSUM.unpack_from(data, CHECKED_BYTES)
    return Header(Kind(kind), number, budget_us, length, expected, data[:CHECKED_BYTES], flags)


def read_header(stream: Stream, limit: int, idle_until: float | None, frame_s: float) -> Header:
    """The next header. It may begin at any time up to `idle_until` (seconds of `time.perf_counter`, None: no limit);
    then the rest has to follow within `frame_s`.

    Raises:
        TimeoutError: none began.
        OSError: the connection has ended.
        ShardFailure: what came is no header (`parse_header`), or it stopped in between.
    """
    data = bytearray(HEADER_BYTES)
    view = memoryview(data)
    begun = stream.receive(view, idle_until)
    _fill(stream, view[begun:], frame_s)
    return parse_header(bytes(data), limit)


def read_payload(stream: Stream, header: Header, frame_s: float) -> Array:
    """The payload (length,) uint8 that follows a header.

    Raises:
        OSError: the connection has ended.
        ShardFailure: it is not what the checksum says, or did not come within `frame_s`.
    """
    payload = np.empty(header.length, np.uint8)
    view = payload.data
    if header.length:
        _fill(stream, view, frame_s)
    if checksum(header.front, [view] if header.length else []) != header.checksum:
        raise ShardFailure(f"the checksum of frame {header.number} does not fit: it was altered", Trouble.BROKEN)
    return payload


def _fill(stream: Stream, view: memoryview, frame_s: float) -> None:
    if not view.nbytes:
        return
    try:
        stream.fill(view, time.perf_counter() + frame_s)
    except TimeoutError:
        raise ShardFailure(f"a frame began and did not go on within {frame_s:g} s", Trouble.BROKEN) from None
