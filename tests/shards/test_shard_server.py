"""A shard by itself: who is let in, what is refused, and that nothing a client sends harms the others."""

from __future__ import annotations

import contextlib
import socket
import time

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.embeddings.jagged import JaggedIds
from rankd.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    ShardFailure,
    Trouble,
)
from rankd.shards.frames import HEADER_BYTES, Kind, frame
from rankd.shards.handshake import Challenge, Hello, Ready
from rankd.shards.pool_queue import PoolQueue
from rankd.shards.shard_config import ShardSecurity, ShardServerConfig
from rankd.shards.shard_connection import ShardConnection
from rankd.shards.shard_server import ShardServer
from rankd.shards.shard_stats import ShardStats, ShardTally
from rankd.shards.streams import Stream
from rankd.types import Float32Array
from tests.shards.plain_tables import Hold, PlainPooling, asking, jagged, make_server, one_shard, serving, until, whole
from tests.shards.raw_client import let_in, pool_request, raw, sums

LAYOUT = one_shard()
ASKED = jagged(["item"], [[[3], [4, 4]]])
REQUEST = pool_request(LAYOUT, ASKED)


def check_serves(address: str) -> None:
    """It still answers others."""
    with asking(one_shard(address)) as pooling:
        np.testing.assert_allclose(pooling.pool(ASKED), whole(LAYOUT).pool(ASKED), rtol=1e-5)


def test_ping_and_stats() -> None:
    with serving(make_server(LAYOUT)) as (address,), let_in(address, LAYOUT) as client:
        client.send(Kind.PING, 5)
        assert client.next() == (Kind.PONG, 5, b"")
        client.send(Kind.POOL, 6, REQUEST)
        kind, number, payload = client.next()
        assert (kind, number) == (Kind.POOLED, 6)
        np.testing.assert_allclose(sums(payload), whole(LAYOUT).pool(ASKED).ravel(), rtol=1e-5)
        client.send(Kind.STATS, 7)
        kind, number, payload = client.next()
        stats = msgspec.json.decode(payload, type=ShardStats)
        assert (kind, number) == (Kind.STATS, 7)
        assert (stats.lookups, stats.rows, stats.waiting, stats.connections) == (3, 2, 0, 1)
        assert stats.service_ms > 0.0


def test_a_late_request_is_refused_and_not_computed() -> None:
    with serving(make_server(LAYOUT)) as (address,), let_in(address, LAYOUT) as client:
        client.send(Kind.POOL, 6, REQUEST, budget_us=0)
        number, error = client.next_error()
        assert (number, type(error)) == (6, DeadlineExceeded)
        client.send(Kind.STATS, 7)
        stats = msgspec.json.decode(client.next()[2], type=ShardStats)
        assert (stats.requests["late"], stats.lookups) == (1, 0)


def test_a_request_whose_time_passes_in_the_line_is_not_computed() -> None:
    hold = Hold()
    server = make_server(LAYOUT, config=ShardServerConfig(workers=1), before=hold)
    with serving(server) as (address,), let_in(address, LAYOUT) as client:
        client.send(Kind.POOL, 1, REQUEST)
        assert hold.entered.acquire(timeout=10)
        client.send(Kind.POOL, 2, REQUEST, budget_us=1000)
        until(lambda: server.stats().waiting == 1)
        time.sleep(0.01)
        hold.let_go()
        assert client.next()[:2] == (Kind.POOLED, 1)
        assert isinstance(client.next_error()[1], DeadlineExceeded)
        assert not hold.entered.acquire(blocking=False)


def test_a_full_line_refuses_and_short_requests_pass_long_ones() -> None:
    hold = Hold()
    config = ShardServerConfig(workers=1, max_waiting=2)
    server = make_server(LAYOUT, config=config, before=hold)
    with serving(server) as (address,), let_in(address, LAYOUT) as client:
        client.send(Kind.POOL, 1, REQUEST)
        assert hold.entered.acquire(timeout=10)
        for number in (2, 3, 4):
            client.send(Kind.POOL, number, REQUEST)
        number, error = client.next_error()
        assert (number, type(error)) == (4, Overloaded)
        client.send(Kind.PING, 9)
        assert client.next()[0] is Kind.PONG  # who computes does not keep who reads
        hold.let_go()
        assert [client.next()[1] for _ in range(3)] == [1, 2, 3]
        assert server.stats().requests == {
            "answered": 3, "invalid": 0, "late": 0, "full": 1, "failed": 0, "gone": 0
        }  # fmt: skip


def test_bytes_that_wait_are_bounded() -> None:
    hold = Hold()
    config = ShardServerConfig(workers=1, max_waiting_bytes=1024)
    server = make_server(LAYOUT, config=config, before=hold)
    large = pool_request(LAYOUT, jagged(["item"], [[list(range(100)) * 4, [1]]]))
    with serving(server) as (address,), let_in(address, LAYOUT) as client:
        client.send(Kind.POOL, 1, large)
        assert hold.entered.acquire(timeout=10)
        client.send(Kind.POOL, 2, large)
        client.send(Kind.POOL, 3, large)
        assert isinstance(client.next_error()[1], Overloaded)
        hold.let_go()
        assert [client.next()[1] for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("payload", [b"", REQUEST[:-1], b"\7" + REQUEST[1:], REQUEST[:-2] + b"\xff\xff"])
def test_an_invalid_request_fails_alone(payload: bytes) -> None:
    with serving(make_server(LAYOUT)) as (address,), let_in(address, LAYOUT) as client:
        client.send(Kind.POOL, 1, payload)
        client.send(Kind.POOL, 2, REQUEST)
        answers = {}
        for _ in range(2):
            kind, number, _ = client.next()
            answers[number] = kind
        assert answers == {1: Kind.ERROR, 2: Kind.POOLED}


def test_a_look_up_that_fails_is_an_error_of_the_shard() -> None:
    class Broken:
        def pool(self, asked: JaggedIds) -> Float32Array:
            raise ZeroDivisionError("a bug")

    server = ShardServer(Broken(), LAYOUT.plan, LAYOUT.served_by(LAYOUT.shards[0]), ShardServerConfig())
    with serving(server) as (address,), let_in(address, LAYOUT) as client:
        client.send(Kind.POOL, 1, REQUEST)
        number, error = client.next_error()
        assert (number, type(error)) == (1, EngineFailure)
        client.send(Kind.PING)
        assert client.next()[0] is Kind.PONG


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: shard\r\nAccept: */*\r\n\r\n",
        bytes(100),
        b"".join(frame(Kind.READY, 1)),
        b"".join(frame(Kind.POOL, 1, [memoryview(REQUEST)]))[:-1] + b"!",
        b"".join(frame(Kind.POOL, 1, [memoryview(REQUEST)]))[:20] + b"\xff" * 12,
    ],
)
def test_what_is_no_frame_ends_the_connection_with_an_error(data: bytes) -> None:
    with serving(make_server(LAYOUT)) as (address,):
        with let_in(address, LAYOUT) as client:
            client.send_bytes(data)
            number, error = client.next_error()
            assert number == 0
            assert isinstance(error, ShardFailure)
            assert error.trouble is Trouble.BROKEN
            assert client.ended()
        check_serves(address)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=200), max_size=3), st.booleans())
def test_any_bytes_harm_nobody_else(pieces: list[bytes], handshake: bool) -> None:
    with let_in(FUZZED[0], LAYOUT) if handshake else raw(FUZZED[0]) as client:
        try:
            for piece in pieces:
                client.send_bytes(piece)
            client.stream.shut()
        except OSError:  # it has hung up by then
            assert client.ended()


FUZZED: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def fuzzed() -> object:
    """A server for all examples, which serves at the end as it did at the beginning."""
    with serving(make_server(LAYOUT)) as (address,):
        FUZZED.append(address)
        yield address
        check_serves(address)


def test_a_connection_that_is_cut_at_any_byte_harms_nobody() -> None:
    whole_frame = b"".join(frame(Kind.POOL, 1, [memoryview(REQUEST)]))
    server = make_server(LAYOUT)
    with serving(server) as (address,):
        for end in range(len(whole_frame)):
            with let_in(address, LAYOUT) as client:
                client.send_bytes(whole_frame[:end])
        until(lambda: server.stats().connections == 0)
        assert server.stats().requests["answered"] == 0
        check_serves(address)


def test_a_client_that_stops_within_a_frame_is_let_go() -> None:
    server = make_server(LAYOUT, config=ShardServerConfig(frame_seconds=0.05, handshake_seconds=0.05))
    with serving(server) as (address,):
        with let_in(address, LAYOUT) as client:
            client.send_bytes(frame(Kind.PING, 1)[0][: HEADER_BYTES - 1].tobytes())
            assert client.ended()
        with raw(address) as client:  # says nothing at all
            assert client.ended()
        until(lambda: server.stats().connections == 0)


def test_a_client_that_takes_no_answers_is_let_go_and_the_others_are_served() -> None:
    server = make_server(LAYOUT, config=ShardServerConfig(workers=1, answer_seconds=0.05))
    different = [[number % 101, number // 101 % 101, number // 10_201] for number in range(200_000)]
    large = pool_request(LAYOUT, jagged(["item"], [different]))  # bags that are equal are answered once
    with serving(server) as (address,), let_in(address, LAYOUT) as client:
        for number in range(10):
            client.send(Kind.POOL, number, large)
        until(lambda: server.stats().connections == 0)
        check_serves(address)


def test_no_more_clients_than_allowed() -> None:
    with serving(make_server(LAYOUT, config=ShardServerConfig(max_connections=1))) as (address,):
        with let_in(address, LAYOUT), raw(address) as second:
            assert isinstance(second.next_error()[1], Overloaded)
        until(lambda: _can_enter(address))


def _can_enter(address: str) -> bool:
    try:
        with let_in(address, LAYOUT):
            return True
    except (Overloaded, OSError):
        return False


def test_the_first_frame_is_a_hello_and_nothing_large() -> None:
    with serving(make_server(LAYOUT)) as (address,):
        with raw(address) as client:
            client.send(Kind.POOL, 1, REQUEST)
            assert "expected was HELLO" in str(client.next_error()[1])
        with raw(address) as client:
            client.send_bytes(frame(Kind.HELLO, 1, [memoryview(bytes(5000))])[0].tobytes())
            assert "taken are 4096" in str(client.next_error()[1])
        with raw(address) as client:
            client.send(Kind.HELLO, 0, msgspec.msgpack.encode(Hello(LAYOUT.plan, b"n")))
            kind, _, payload = client.next()
            assert kind is Kind.CHALLENGE
            assert len(msgspec.msgpack.decode(payload, type=Challenge).nonce) == 32
            client.send(Kind.PROOF, 0, b"\xc1")
            assert "cannot be read" in str(client.next_error()[1])
        with raw(address) as client:  # an error of ours, from the wrong side
            client.send(Kind.ERROR, 0, b"\1\0words")
            assert "words" in str(client.next_error()[1])
            assert client.ended()


def test_without_secret_and_tls_only_this_machine_is_listened_to() -> None:
    with pytest.raises(ConfigError, match=r"security\.secret or security\.tls"):
        make_server(LAYOUT, config=ShardServerConfig(host="0.0.0.0"))
    security = ShardSecurity(secret="sixteen letters!")
    make_server(LAYOUT, config=ShardServerConfig(host="0.0.0.0", security=security)).close()


def test_an_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened on"):
            make_server(LAYOUT, config=ShardServerConfig(port=port))
    with pytest.raises(ConfigError, match="no address of this machine"):
        make_server(LAYOUT, config=ShardServerConfig(host="no such host"))


def test_wrong_ids_are_refused_by_the_shard_too() -> None:
    with serving(make_server(LAYOUT)) as (address,), let_in(address, LAYOUT) as client:
        client.send(Kind.POOL, 1, REQUEST[:-2] + b"\xff\xff")
        assert isinstance(client.next_error()[1], InvalidRequest)


def test_a_client_whose_answer_cannot_even_begin_is_let_go() -> None:
    ours, theirs = socket.socketpair()
    stream = Stream(ours)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(1 << 16))
    config = ShardServerConfig(answer_seconds=0.05)
    line = PoolQueue(PlainPooling({}), (), config, ShardTally())
    connection = ShardConnection(stream, Ready("p", b"", (), 1024), line, lambda: ShardStats({}), config)
    connection.answer(Kind.PONG, 1)
    assert connection.gone
    while theirs.recv(1 << 20):  # to the end, which is there
        pass
    stream.close()
    theirs.close()
