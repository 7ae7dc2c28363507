"""Servers that are no shards, or not honest ones: they are let go, and no request is answered by them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from rankd.errors import ShardFailure, Trouble, Unavailable
from rankd.shards.frames import Kind, frame, read_header, read_payload
from rankd.shards.handshake import Ready, let_in
from rankd.shards.shard_layout import ShardLayout
from rankd.shards.sharded_pooling import ShardedPooling
from rankd.shards.streams import Stream
from tests.shards.false_shard import liar
from tests.shards.plain_tables import asking, jagged, make_server, one_shard, quick, serving, whole

ASKED = jagged(["item"], [[[3], [], [4, 4]]])


def says(data: bytes) -> Callable[[Stream], None]:
    """Sends some bytes and waits for the client to go."""

    def answer(stream: Stream) -> None:
        stream.send([memoryview(data)], time.perf_counter() + 1.0)
        stream.fill(memoryview(bytearray(1 << 20)), time.perf_counter() + 1.0)

    return answer


@pytest.mark.parametrize(
    ("data", "words", "trouble"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "begins with b'HTTP'", Trouble.BROKEN),
        (b"".join(frame(Kind.CHALLENGE, 0, [memoryview(b"\xc1")])), "cannot be read", Trouble.BROKEN),
        (b"".join(frame(Kind.GOODBYE, 0)), "is draining", Trouble.DOWN),
        (b"".join(frame(Kind.POOLED, 1)), "sent POOLED, expected was CHALLENGE", Trouble.BROKEN),
        (b"", "deadline has passed", Trouble.DOWN),
    ],
)
def test_a_server_that_is_no_shard_is_never_asked(data: bytes, words: str, trouble: Trouble) -> None:
    with liar(says(data)) as address:
        pooling = ShardedPooling(one_shard(address), quick(connect_seconds=0.1))
        pooling.start()
        try:
            with pytest.raises(ShardFailure, match=words) as caught:
                pooling.wait_up(0.3)
            assert caught.value.trouble is trouble
        finally:
            pooling.close()


def cheat(layout: ShardLayout, answer: Callable[[int, int], bytes]) -> Callable[[Stream], None]:
    """Does the handshake as a shard would, then sends `answer(number, length)` to each request, `length` being the
    bytes that its answer is to have."""
    ready = Ready(layout.plan, b"", layout.served_by(layout.shards[0]), 1 << 20)

    def serve(stream: Stream) -> None:
        let_in(stream, ready, "", 1.0)
        while True:
            header = read_header(stream, 1 << 20, time.perf_counter() + 1.0, 1.0)
            read_payload(stream, header, 1.0)
            if header.kind in (Kind.POOL, Kind.STATS):
                stream.send([memoryview(answer(header.number, 3 * 4 * 4))], time.perf_counter() + 1.0)

    return serve


def framed(kind: Kind, number: int, payload: bytes) -> bytes:
    """A frame's bytes."""
    return b"".join(frame(kind, number, [memoryview(payload)]))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda number, length: bytes(64), "begins with"),
        (lambda number, length: framed(Kind.POOLED, number, bytes(length))[:-1] + b"!", "checksum"),
        (lambda number, length: framed(Kind.POOLED, number + 1, bytes(length)), "which was not asked"),
        (lambda number, length: framed(Kind.POOLED, number, bytes(length + 4)), "expected was POOLED of 48"),
        (lambda number, length: framed(Kind.STATS, number, bytes(length)), "expected was POOLED of 48"),
        (lambda number, length: framed(Kind.READY, number, bytes(length)), "READY, which is no answer"),
        (lambda number, length: framed(Kind.ERROR, number, b"?"), "an error of 1 bytes"),
        (lambda number, length: framed(Kind.ERROR, 0, b"\7\0words"), "words"),
    ],
)
def test_a_shard_that_answers_nonsense_is_let_go_and_the_next_one_asked(
    answer: Callable[[int, int], bytes], words: str
) -> None:
    layout = one_shard()
    config = quick(first_wait_seconds=30.0, longest_wait_seconds=30.0, heartbeat_seconds=30.0, hedge_share=0.0)
    with liar(cheat(layout, answer)) as bad, serving(make_server(layout)) as (good,):
        with asking(one_shard(bad), config) as alone, pytest.raises(Unavailable, match=words):
            alone.pool(ASKED)
        layout = one_shard(bad, good)
        with asking(layout, config) as pooling:
            expected = whole(layout).pool(ASKED)
            for _ in range(4):
                np.testing.assert_allclose(pooling.pool(ASKED), expected, rtol=1e-5)
            assert pooling.counts()["retried"] == 1
            assert pooling.replicas_up() == {"a": 1}


def test_an_answer_that_is_cut_at_any_byte_is_none() -> None:
    layout = one_shard()
    config = quick(first_wait_seconds=30.0)
    for end in range(32 + 48):

        def cut(number: int, length: int, end: int = end) -> bytes:
            return framed(Kind.POOLED, number, bytes(length))[:end]

        def serve(stream: Stream, end: int = end) -> None:
            def closing(number: int, length: int) -> bytes:
                stream.send([memoryview(cut(number, length))], time.perf_counter() + 1.0)
                raise ConnectionResetError

            cheat(layout, closing)(stream)

        with (
            liar(serve) as address,
            asking(one_shard(address), config) as pooling,
            pytest.raises(Unavailable, match="cannot be reached any more"),
        ):
            pooling.pool(ASKED)


def test_stats_that_cannot_be_read_are_an_error_with_a_type() -> None:
    with (
        liar(cheat(one_shard(), lambda number, length: framed(Kind.STATS, number, b"?"))) as address,
        asking(one_shard(address), quick()) as pooling,
        pytest.raises(ShardFailure, match="cannot be read"),
    ):
        pooling.stats(5.0)
