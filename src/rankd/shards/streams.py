"""Bytes over TCP, with TLS or without, by a deadline. One thread reads; any thread sends, a frame at a time.

Sockets do not block; who has to wait polls. A blocking socket with a timeout polls before each call, and OpenSSL takes
one thread at a time in a connection: so a reader must not sit in it while others send. Next: `frames.py`.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
_MOST_BUFFERS = 512
"""Of one `sendmsg`; systems take 1024."""


class Stream:
    """A connected socket. Deadlines are in seconds of `time.perf_counter`, None: no limit."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._sending = threading.Lock()  # held for a whole frame
        self._tls = isinstance(connected, ssl.SSLSocket)
        self._turn = threading.Lock() if self._tls else contextlib.nullcontext()  # OpenSSL has no lock itself

    def shake_hands(self, deadline: float) -> None:
        """TLS's own handshake, if it is TLS.

        Raises:
            OSError: the other side is not let in, does not let us in, or was not done by the deadline.
        """
        if isinstance(self._socket, ssl.SSLSocket):
            self._do(self._socket.do_handshake, select.POLLIN, deadline)

    def receive(self, view: memoryview, deadline: float | None) -> int:
        """At least one byte and at most all of the view; how many.

        Raises:
            OSError: the connection has ended (ConnectionError), or the deadline has passed (TimeoutError).
        """
        count: int = self._do(lambda: self._socket.recv_into(view), select.POLLIN, deadline)
        if not count:
            raise ConnectionResetError("the other side has closed the connection")
        return count

    def fill(self, view: memoryview, deadline: float | None) -> None:
        """The whole view. Raises as `receive` does."""
        while view.nbytes:
            view = view[self.receive(view, deadline) :]

    def send(self, buffers: Sequence[memoryview], deadline: float | None) -> None:
        """All buffers, with nobody else's between them.

        Raises:
            OSError: the connection has ended, or the deadline has passed. If a part was sent by then the connection is
                shut, since nobody could tell where the next frame begins.
        """
        if not self._sending.acquire(timeout=-1 if deadline is None else max(deadline - time.perf_counter(), 0.0)):
            raise TimeoutError("the frame before was not sent by the deadline")
        begun = self._tls  # OpenSSL wants the same bytes again
        try:
            left = [view for view in buffers if view.nbytes]
            if self._tls:
                left = [memoryview(b"".join(left))]  # it copies anyway, and makes a record of each piece
            while left:
                sent = self._do(lambda: self._send_some(left), select.POLLOUT, deadline)
                begun = True
                while left and sent >= left[0].nbytes:
                    sent -= left.pop(0).nbytes
                if sent:
                    left[0] = left[0][sent:]
        except OSError as error:
            if begun or not isinstance(error, TimeoutError):
                self.shut()
            raise
        finally:
            self._sending.release()

    def shut(self) -> None:
        """End the connection; whoever waits in it wakes up. Any thread may, any number of times."""
        with contextlib.suppress(OSError):
            # Not `SSLSocket.shutdown`: that takes TLS off first, and who sends meanwhile would do so in clear.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back. The thread that reads does this, as the last thing."""
        self.shut()
        with self._sending:  # else its number could be another's socket while somebody still sends
            self._socket.close()

    def _send_some(self, buffers: list[memoryview]) -> int:
        return self._socket.send(buffers[0]) if self._tls else self._socket.sendmsg(buffers[:_MOST_BUFFERS])

    def _do(self, operation: Callable[[], T], event: int, deadline: float | None) -> T:
        while True:
            try:
                with self._turn:
                    return operation()
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as wanted:
                if isinstance(wanted, ssl.SSLWantReadError):
                    event = select.POLLIN
                elif isinstance(wanted, ssl.SSLWantWriteError):
                    event = select.POLLOUT
            self._wait(event, deadline)

    def _wait(self, event: int, deadline: float | None) -> None:
        left_ms = None if deadline is None else (deadline - time.perf_counter()) * 1e3
        if left_ms is not None and left_ms <= 0.0:
            raise TimeoutError("the deadline has passed")
        poll = select.poll()
        poll.register(self._socket, event)
        poll.poll(left_ms)
