"""A client that sends what it is told, frame by frame."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.errors import RankdError
from rankd.shards.frame_errors import read_error
from rankd.shards.frames import UNLIMITED_US, Kind, frame, read_header, read_payload
from rankd.shards.handshake import introduce
from rankd.shards.routing import Router
from rankd.shards.shard_layout import ShardLayout
from rankd.shards.streams import Stream
from rankd.shards.transport import connect

WITHIN_S = 10.0


class RawClient:
    """A stream to a shard, with frames in and out."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def send(self, kind: Kind, number: int = 0, payload: bytes = b"", budget_us: int = UNLIMITED_US) -> None:
        """A frame."""
        self.send_bytes(b"".join(frame(kind, number, [memoryview(payload)], budget_us)))

    def send_bytes(self, data: bytes) -> None:
        """Any bytes."""
        self.stream.send([memoryview(data)], time.perf_counter() + WITHIN_S)

    def next(self) -> tuple[Kind, int, bytes]:
        """Kind, number and payload of the next frame.

        Raises:
            OSError: the shard has ended the connection.
        """
        header = read_header(self.stream, 1 << 24, time.perf_counter() + WITHIN_S, WITHIN_S)
        return header.kind, header.number, bytes(read_payload(self.stream, header, WITHIN_S))

    def next_error(self) -> tuple[int, RankdError]:
        """Number and error of the next frame, which is one."""
        kind, number, payload = self.next()
        assert kind is Kind.ERROR
        return number, read_error(memoryview(payload), "shard")

    def ended(self) -> bool:
        """Whether nothing comes any more, errors aside."""
        try:
            while self.next()[0] is Kind.ERROR:
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return False


@contextmanager
def raw(address: str) -> Iterator[RawClient]:
    """Connected, without a handshake."""
    stream = connect(address, None, WITHIN_S)
    try:
        yield RawClient(stream)
    finally:
        stream.close()


@contextmanager
def let_in(address: str, layout: ShardLayout, shard: int = 0) -> Iterator[RawClient]:
    """Connected, with the handshake done."""
    with raw(address) as client:
        nets = layout.served_by(layout.shards[shard])
        introduce(client.stream, layout.plan, nets, "", time.perf_counter() + WITHIN_S, "shard")
        yield client


def pool_request(layout: ShardLayout, asked: JaggedIds) -> bytes:
    """The payload of the only call that a request makes."""
    (call,) = Router(layout).route([asked]).calls
    return bytes(call.payload)


def sums(payload: bytes) -> list[float]:
    """Of a POOLED frame."""
    values: list[float] = np.frombuffer(payload, "<f4").tolist()
    return values
