"""The network between a server and its store: a process that hands bytes on, the answers a moment later.

    python -m rankd.bench.feature_suite.delaying_proxy PORT     listens on a free port, connects each caller to PORT;
    see `main`

The kernel's own delay (tc netem) needs rights and a module that machines often lack. What a caller sends goes on at
once; what comes back leaves `delay` after it came, so that a round trip takes that much longer. Per connection bytes
keep their order, and any number may be under way: only latency is added, bandwidth stays.
"""

from __future__ import annotations

import heapq
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from itertools import count
from typing import Self

from rankd.bench import load
from rankd.errors import Unavailable

HOST = "127.0.0.1"
READ_BYTES = 1 << 18
STOP_SECONDS = 5.0
BACKLOG = 256


class Way:
    """One direction of a connection: bytes of `source` go to `target`. `waiting` holds (when due, bytes), oldest first;
    no bytes mean that the source has ended. `late` says that this direction is the one that is delayed."""

    def __init__(self, source: socket.socket, target: socket.socket, late: bool) -> None:
        self.source, self.target, self.late = source, target, late
        self.waiting: deque[tuple[float, memoryview]] = deque()
        self.blocked = self.ended = False
        self.watched = selectors.EVENT_READ
        self.other: Way = self


class Proxy:
    """The proxy's loop, on one thread. `delay` in seconds may change at any time; what waits keeps its time."""

    def __init__(self, listening: socket.socket, to_port: int) -> None:
        self.delay = 0.0
        self.asked_bytes = self.answered_bytes = 0
        self._listening, self._to_port = listening, to_port
        self._poll = selectors.DefaultSelector()
        self._poll.register(listening, selectors.EVENT_READ)
        self._due: list[tuple[float, int, Way]] = []
        self._numbers = count()

    def serve(self, control: int) -> None:
        """Work until the file descriptor `control`, which gives commands (see `main`), is at its end."""
        self._poll.register(control, selectors.EVENT_READ)
        commands = b""
        while True:
            pause = max(self._due[0][0] - time.perf_counter(), 0.0) if self._due else None
            # epoll rounds times up to milliseconds, select() does not: so select() waits for epoll's own descriptor.
            ready, _, _ = select.select([self._poll], [], [], pause)
            for key, events in self._poll.select(0) if ready else ():
                if key.fileobj is self._listening:
                    self._accept()
                elif key.fd == control:
                    part = os.read(control, READ_BYTES)
                    if not part:
                        return
                    *lines, commands = (commands + part).split(b"\n")
                    for line in lines:
                        self._obey(line)
                else:
                    self._serve_way(key.data, events)
            self._send_due()

    def _obey(self, line: bytes) -> None:
        if line.startswith(b"delay "):
            self.delay = float(line.split()[1])
        print(self.asked_bytes, self.answered_bytes, flush=True)

    def _accept(self) -> None:
        near, _ = self._listening.accept()
        try:
            far = socket.create_connection((HOST, self._to_port))
        except OSError:
            near.close()
            return
        asking, answering = Way(near, far, False), Way(far, near, True)
        asking.other, answering.other = answering, asking
        for way in (asking, answering):
            way.source.setblocking(False)
            way.source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._poll.register(way.source, selectors.EVENT_READ, way)

    def _serve_way(self, way: Way, events: int) -> None:
        """What a socket is ready for: more bytes to read, or room for what waits in the other direction."""
        if events & selectors.EVENT_WRITE:
            way.other.blocked = False
            self._send(way.other)
        if events & selectors.EVENT_READ and not way.ended:
            self._receive(way)

    def _receive(self, way: Way) -> None:
        try:
            part = way.source.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._close(way)
            return
        way.ended = not part
        now = time.perf_counter()
        due = max(now + self.delay, way.waiting[-1][0] if way.waiting else now) if way.late else now
        way.waiting.append((due, memoryview(part)))
        if way.ended:
            self._watch(way)
        if way.late:
            self.answered_bytes += len(part)
            heapq.heappush(self._due, (due, next(self._numbers), way))
        else:
            self.asked_bytes += len(part)
            self._send(way)

    def _send_due(self) -> None:
        now = time.perf_counter()
        while self._due and self._due[0][0] <= now:
            self._send(heapq.heappop(self._due)[2])

    def _send(self, way: Way) -> None:
        """Whatever of a direction is due and finds room."""
        now = time.perf_counter()
        try:
            while way.waiting and way.waiting[0][0] <= now and not way.blocked:
                due, part = way.waiting[0]
                if not part:
                    way.target.shutdown(socket.SHUT_WR)
                    way.waiting.popleft()
                    continue
                sent = way.target.send(part)
                if sent == len(part):
                    way.waiting.popleft()
                else:
                    way.waiting[0] = (due, part[sent:])
        except BlockingIOError:
            way.blocked = True
        except OSError:
            self._close(way)
            return
        if way.ended and way.other.ended and not way.waiting and not way.other.waiting:
            self._close(way)
        else:
            self._watch(way)
            self._watch(way.other)

    def _watch(self, way: Way) -> None:
        """Ask for what is of use of a direction's source: bytes until it ends, room if the other direction has none."""
        wanted = (0 if way.ended else selectors.EVENT_READ) | (selectors.EVENT_WRITE if way.other.blocked else 0)
        if wanted == way.watched:
            return
        if not wanted:
            self._poll.unregister(way.source)
        elif not way.watched:
            self._poll.register(way.source, wanted, way)
        else:
            self._poll.modify(way.source, wanted, way)
        way.watched = wanted

    def _close(self, way: Way) -> None:
        for one in (way, way.other):
            one.ended = one.blocked = True
            one.waiting.clear()
            if one.watched:
                self._poll.unregister(one.source)
                one.watched = 0
            one.source.close()


class DelayingProxy:
    """A proxy to a port, in a process of its own, while the context manager is open; `port` is where it listens."""

    def __init__(self, to_port: int) -> None:
        self._to_port, self.port = to_port, 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process.

        Raises:
            Unavailable: it does not run.
        """
        if self._process is None:
            raise Unavailable("the delaying proxy was not started")
        return self._process.pid

    def start(self) -> None:
        """Start it; it takes connections when this returns.

        Raises:
            Unavailable: it ended.
        """
        command = [sys.executable, "-m", "rankd.bench.feature_suite.delaying_proxy", str(self._to_port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603
        try:
            self.port = int(self._answer())
        except BaseException:
            self.close()
            raise

    def set_delay(self, seconds: float) -> None:
        """What answers that come from now on wait.

        Raises:
            Unavailable: it ended.
        """
        self._say(f"delay {seconds!r}")

    def forwarded(self) -> tuple[int, int]:
        """Bytes asked and bytes answered since it started.

        Raises:
            Unavailable: it ended.
        """
        asked, answered = self._say("bytes").split()
        return int(asked), int(answered)

    def close(self) -> None:
        """End it and its connections."""
        if self._process is None:
            return
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=STOP_SECONDS)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self, command: str) -> bytes:
        if self._process is None or self._process.stdin is None:
            raise Unavailable("the delaying proxy was not started")
        try:
            self._process.stdin.write(command.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Unavailable("the delaying proxy has ended") from error
        return self._answer()

    def _answer(self) -> bytes:
        assert self._process is not None  # noqa: S101 - who calls this has looked
        assert self._process.stdout is not None  # noqa: S101 - a pipe
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable("the delaying proxy has ended")
        return line


def main() -> None:
    """Prints its port, then an answer for each line of standard input: after `delay SECONDS`, and after anything else,
    the bytes asked and answered so far. Ends with standard input, so never later than who started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends who started it, who ends this
    load._wake_in_time()
    listening = socket.create_server((HOST, 0), backlog=BACKLOG)
    print(listening.getsockname()[1], flush=True)
    Proxy(listening, int(sys.argv[1])).serve(sys.stdin.fileno())


if __name__ == "__main__":
    main()
