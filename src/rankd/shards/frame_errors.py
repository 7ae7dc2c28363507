"""Errors on the wire: the payload of an ERROR frame is a code (uint16) and a message in UTF-8 of at most 1000 bytes."""

from __future__ import annotations

import struct
from enum import IntEnum

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

LONGEST_MESSAGE = 1000
RETRY_AFTER_S = 0.05
"""Said of a shard whose queue is full: it holds fractions of a second of work."""
_CODE = struct.Struct("<H")


class ErrorCode(IntEnum):
    """What went wrong, as the other side can act on it."""

    INVALID = 1  # the same request fails everywhere
    TOO_LARGE = 2  # likewise
    LATE = 3  # its budget had passed
    OVERLOADED = 4  # another replica may have room
    UNAVAILABLE = 5  # the tables cannot be asked now
    DENIED = 6  # another secret or plan
    BROKEN = 7  # what was sent is not of this protocol
    FAILED = 8  # the look-up failed on a valid request


def error_payload(error: RankdError) -> list[memoryview]:
    """The payload of an ERROR frame."""
    message = str(error).encode()[:LONGEST_MESSAGE]
    return [memoryview(_CODE.pack(_code_of(error)) + message)]


def read_error(payload: memoryview, shown: str) -> RankdError:
    """What an ERROR frame's payload says, its message with the name of who sent it.

    Raises:
        ShardFailure: it is not such a payload.
    """
    if payload.nbytes < _CODE.size or payload.nbytes > _CODE.size + LONGEST_MESSAGE:
        raise ShardFailure(f"{shown} sent an error of {payload.nbytes} bytes, which is none", Trouble.BROKEN)
    (code,) = _CODE.unpack_from(payload)
    message = f"{shown}: {bytes(payload[_CODE.size :]).decode(errors='replace')}"
    if code in (ErrorCode.DENIED, ErrorCode.BROKEN):
        return ShardFailure(message, Trouble.DENIED if code == ErrorCode.DENIED else Trouble.BROKEN)
    if code == ErrorCode.OVERLOADED:
        return Overloaded(message, RETRY_AFTER_S)
    if code not in _PLAIN:
        raise ShardFailure(f"{shown} sent an error of the unknown code {code}", Trouble.BROKEN)
    return _PLAIN[code](message)


_PLAIN: dict[int, type[RankdError]] = {
    ErrorCode.INVALID: InvalidRequest,
    ErrorCode.TOO_LARGE: PayloadTooLarge,
    ErrorCode.LATE: DeadlineExceeded,
    ErrorCode.UNAVAILABLE: Unavailable,
    ErrorCode.FAILED: EngineFailure,
}


def _code_of(error: RankdError) -> ErrorCode:
    if isinstance(error, ShardFailure):
        return ErrorCode.DENIED if error.trouble is Trouble.DENIED else ErrorCode.BROKEN
    if isinstance(error, Overloaded):
        return ErrorCode.OVERLOADED
    kinds = {kind: ErrorCode(code) for code, kind in _PLAIN.items()}
    return kinds.get(type(error), ErrorCode.INVALID if isinstance(error, InvalidRequest) else ErrorCode.FAILED)
