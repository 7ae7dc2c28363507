"""The delaying proxy between real sockets: nothing lost, all in order, later by the delay, and ended with its owner."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from rankd.bench.feature_suite.delaying_proxy import DelayingProxy
from rankd.errors import Unavailable

DELAY_S = 0.05


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that answers each connection with the bytes it gets; yields its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    opened: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        with suppress(OSError):
            while part := connection.recv(1 << 16):
                connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                opened.append(listening.accept()[0])
                threading.Thread(target=talk, args=(opened[-1],), daemon=True).start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        accepting.join()
        for connection in opened:
            connection.close()


def connected(proxy: DelayingProxy) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", proxy.port), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def received(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(1 << 16)
        assert part, f"the connection ended after {len(parts)} of {count} bytes"
        parts += part
    return bytes(parts)


def exchange_s(connection: socket.socket, message: bytes) -> float:
    started = time.perf_counter()
    connection.sendall(message)
    assert received(connection, len(message)) == message
    return time.perf_counter() - started


def test_answers_come_later_by_the_delay(echo: int) -> None:
    with DelayingProxy(echo) as proxy, closing(connected(proxy)) as connection:
        assert min(exchange_s(connection, b"x") for _ in range(5)) < DELAY_S
        proxy.set_delay(DELAY_S)
        assert min(exchange_s(connection, b"x" * 100) for _ in range(5)) >= DELAY_S
        proxy.set_delay(0.0)
        assert min(exchange_s(connection, b"x") for _ in range(5)) < DELAY_S
        assert proxy.forwarded() == (510, 510)


def test_megabytes_arrive_whole_and_in_order_while_nobody_reads(echo: int) -> None:
    message = os.urandom(1 << 20) * 24  # more than all buffers on the way hold
    with DelayingProxy(echo) as proxy, closing(connected(proxy)) as connection:
        proxy.set_delay(0.001)
        sending = threading.Thread(target=connection.sendall, args=(message,))
        sending.start()
        time.sleep(0.2)
        assert received(connection, len(message)) == message
        sending.join()


def test_many_questions_are_under_way_at_once(echo: int) -> None:
    with DelayingProxy(echo) as proxy:
        proxy.set_delay(DELAY_S)
        connections = [connected(proxy) for _ in range(20)]
        started = time.perf_counter()
        for number, connection in enumerate(connections):
            connection.sendall(f"{number:4d}".encode())
        answers = [received(connection, 4) for connection in connections]
        assert time.perf_counter() - started < 20 * DELAY_S / 2
        assert answers == [f"{number:4d}".encode() for number in range(20)]
        for connection in connections:
            connection.close()


def test_the_end_of_a_connection_passes_through(echo: int) -> None:
    with DelayingProxy(echo) as proxy, closing(connected(proxy)) as connection:
        proxy.set_delay(DELAY_S)
        connection.sendall(b"last")
        connection.shutdown(socket.SHUT_WR)
        assert received(connection, 4) == b"last"
        assert connection.recv(1) == b""


def test_a_server_that_is_not_there_ends_the_connection(echo: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = taken.getsockname()[1]
    with DelayingProxy(nobody) as proxy, closing(connected(proxy)) as connection:
        assert connection.recv(1) == b""
        with closing(connected(proxy)) as another:
            assert another.recv(1) == b""


def test_its_process_ends_with_it(echo: int) -> None:
    proxy = DelayingProxy(echo)
    with pytest.raises(Unavailable, match="was not started"):
        proxy.set_delay(1.0)
    proxy.start()
    number = proxy.pid
    proxy.close()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
    proxy.close()
    with pytest.raises(Unavailable, match="was not started"):
        proxy.forwarded()
