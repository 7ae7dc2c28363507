"""The load generator against small servers that do what they are told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from rankd.bench.load import Connection, LoadPlan, generate, http_request, run

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
REQUEST = http_request("/x", b"body", {"content-type": "text/plain"})

Behaviour = Callable[[socket.socket, int], bool]


@contextmanager
def server(behave: Behaviour) -> Iterator[int]:
    """`behave(connection, number of the request)` answers; False ends the connection. Yields the port."""
    listening = socket.create_server(("127.0.0.1", 0))
    numbers = iter(range(1_000_000))
    opened: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while connection.recv(len(REQUEST), socket.MSG_WAITALL) == REQUEST:
                if not behave(connection, next(numbers)):
                    return

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


def answer(connection: socket.socket, number: int) -> bool:
    connection.sendall(OK)
    return True


def plan(port: int, **changes: object) -> LoadPlan:
    return LoadPlan(**{"host": "127.0.0.1", "port": port, "requests": [REQUEST], **changes})  # type: ignore[arg-type]


def test_request_bytes() -> None:
    assert REQUEST == (b"POST /x HTTP/1.1\r\nhost: rankd\r\ncontent-length: 4\r\ncontent-type: text/plain\r\n\r\nbody")


def test_a_connection_that_the_server_closed_meanwhile_is_opened_again() -> None:
    """As servers do with those that are not used: no request is lost over it."""

    def once(connection: socket.socket, number: int) -> bool:
        connection.sendall(OK)
        return False

    with server(once) as port:
        result = run(plan(port, arrivals_s=[0.0, 0.2, 0.4], connections=1))
    assert result.statuses == [200, 200, 200]


def test_closed_loop_notes_every_answer() -> None:
    with server(answer) as port:
        result = run(plan(port, requests=[REQUEST, REQUEST], seconds=0.1, warmup=3, keep=True))
    assert len(result.statuses) > 2
    assert set(result.statuses) == {200}
    assert result.index[:4] == [0, 1, 0, 1]
    assert result.scheduled_s == result.sent_s
    assert all(sent < done for sent, done in zip(result.sent_s, result.done_s, strict=True))
    assert set(result.bodies) == {b"ok"}
    assert len(result.bodies) == len(result.statuses)


def test_open_loop_counts_from_the_scheduled_time() -> None:
    """Ten requests fall due at once and the server takes 10 ms for each: the last one has waited for all of them."""

    def slow(connection: socket.socket, number: int) -> bool:
        time.sleep(0.01)
        return answer(connection, number)

    arrivals = [number * 1e-6 for number in range(10)]
    with server(slow) as port:
        result = run(plan(port, arrivals_s=arrivals, connections=1))
    assert result.scheduled_s == arrivals
    assert result.statuses == [200] * 10
    latencies = [done - due for due, done in zip(result.scheduled_s, result.done_s, strict=True)]
    assert latencies[-1] >= 0.1
    assert result.done_s[-1] - result.sent_s[-1] < latencies[-1]
    assert result.waited == 9
    assert len(result.late_s) == 10
    assert min(result.late_s) >= 0


def test_open_loop_uses_all_its_connections() -> None:
    """Answers come only when three requests are there at once."""
    together = threading.Barrier(3, timeout=10)

    def wait(connection: socket.socket, number: int) -> bool:
        together.wait()
        return answer(connection, number)

    with server(wait) as port:
        result = run(plan(port, arrivals_s=[0.0, 0.001, 0.002], connections=3))
    assert result.statuses == [200] * 3
    assert result.waited == 0


def test_errors_are_counted_and_do_not_stop_it() -> None:
    def moody(connection: socket.socket, number: int) -> bool:
        if number == 1:
            return False
        connection.sendall(BUSY if number == 2 else OK)
        return True

    with server(moody) as port:
        result = run(plan(port, arrivals_s=[0.0, 0.01, 0.02, 0.03], connections=1))
    assert sorted(result.statuses) == [0, 200, 200, 503]


def test_answers_may_come_in_pieces() -> None:
    def piecewise(connection: socket.socket, number: int) -> bool:
        for position in range(len(OK)):
            connection.sendall(OK[position : position + 1])
        return True

    with server(piecewise) as port:
        connection = Connection("127.0.0.1", port)
        for _ in range(2):
            received = connection.exchange(REQUEST)
            assert (received.status, received.body) == (200, b"ok")
        connection.close()


def test_an_answer_without_a_length_is_an_error() -> None:
    def endless(connection: socket.socket, number: int) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        return True

    with server(endless) as port:
        connection = Connection("127.0.0.1", port)
        with pytest.raises(ConnectionError, match="without content-length"):
            connection.exchange(REQUEST)
        connection.close()


def test_generator_in_a_process_of_its_own() -> None:
    with server(answer) as port:
        result = generate(plan(port, arrivals_s=[0.0, 0.001], connections=2, warmup=2))
    assert result.statuses == [200, 200]
    assert result.wall_s > 0
    assert result.cpu_s >= 0
