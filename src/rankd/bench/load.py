"""The load generator: a process of its own that sends prepared bytes over real sockets and notes when what happened.

    python -m rankd.bench.load < LoadPlan (msgpack) > LoadResult (msgpack)

One thread, one select() loop, no event-loop library: half a millisecond is to be measured. select() and not epoll,
because its time-out has a resolution of microseconds, not of milliseconds.

Closed loop (no arrivals): one connection, the next request leaves when the answer is there. Open loop: requests leave
at their scheduled times whatever the server does, and latency counts from then (no coordinated omission).
"""

from __future__ import annotations

import ctypes
import gc
import re
import select
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from itertools import cycle, islice

import msgspec

from rankd.errors import Unavailable

ANSWER_TIMEOUT_S = 60.0
HEAD_END = b"\r\n\r\n"
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
READ_BYTES = 1 << 20
PR_SET_TIMERSLACK = 29


class LoadPlan(msgspec.Struct, frozen=True):
    """What to send where. `requests` are whole HTTP requests, sent in turn.

    `arrivals_s` (ascending, from the start) makes it an open loop over `connections`; without arrivals it is a closed
    loop of `seconds`. The first `warmup` requests are sent beforehand, one by one, and not counted. `keep` collects the
    bodies of a closed loop's answers.
    """

    host: str
    port: int
    requests: list[bytes]
    seconds: float = 0.0
    arrivals_s: list[float] = []
    connections: int = 1
    warmup: int = 0
    keep: bool = False


class LoadResult(msgspec.Struct, frozen=True):
    """One entry in `index`, `scheduled_s`, `sent_s`, `done_s`, `statuses` for each request, as the answers came.

    `index` is the request's place in the plan. Times count from the start. Status 0: the connection failed, or no
    answer came. `late_s` is how long after its scheduled time the generator took up each arrival: its own fault, unlike
    waiting for a free connection (`waited` counts those). `cpu_s` is the generator's own processor time.
    """

    index: list[int]
    scheduled_s: list[float]
    sent_s: list[float]
    done_s: list[float]
    statuses: list[int]
    bodies: list[bytes]
    late_s: list[float]
    waited: int
    cpu_s: float
    wall_s: float


class Answer(msgspec.Struct, frozen=True):
    """An HTTP answer: status, its head up to the empty line, and its body."""

    status: int
    head: bytes
    body: bytes


class Connection:
    """A keep-alive connection with one request on its way at most."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._received = bytearray()
        self._socket = self._connect()

    def fileno(self) -> int:
        """For select()."""
        return self._socket.fileno()

    def send(self, request: bytes) -> None:
        """Send a whole request.

        Raises:
            OSError: the connection is gone.
        """
        self._socket.sendall(request)

    def receive(self) -> Answer | None:
        """Read what is there; the answer once it is whole.

        Raises:
            OSError: the connection is gone, or what comes is no HTTP answer with a content-length.
        """
        part = self._socket.recv(READ_BYTES)
        if not part:
            raise ConnectionResetError("the server closed the connection")
        self._received += part
        end = self._received.find(HEAD_END)
        if end < 0:
            return None
        head = bytes(self._received[:end])
        length = CONTENT_LENGTH.search(head)
        if length is None:
            raise ConnectionError(f"an answer without content-length: {head[:200]!r}")
        whole = end + len(HEAD_END) + int(length[1])
        if len(self._received) < whole:
            return None
        body = bytes(self._received[end + len(HEAD_END) : whole])
        del self._received[:whole]
        return Answer(int(head[9:12]), head, body)

    def ended(self) -> bool:
        """Whether the server has closed it while it was not used."""
        readable, _, _ = select.select([self._socket], [], [], 0.0)
        try:
            return bool(readable) and self._socket.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def exchange(self, request: bytes) -> Answer:
        """Send a request and wait for its answer.

        Raises:
            OSError: as `send` and `receive`, or no answer within ANSWER_TIMEOUT_S.
        """
        self.send(request)
        while (answer := self.receive()) is None:
            pass
        return answer

    def reopen(self) -> None:
        """Start again after a failure.

        Raises:
            OSError: the server does not take connections.
        """
        self.close()
        self._received.clear()
        self._socket = self._connect()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _connect(self) -> socket.socket:
        opened = socket.create_connection(self._address, timeout=ANSWER_TIMEOUT_S)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return opened


class Log:
    """The lists of a LoadResult while they grow; `now` counts from the start of the measurement."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._cpu = time.process_time()
        self._rows: list[tuple[int, float, float, float, int]] = []
        self.bodies: list[bytes] = []
        self.late_s: list[float] = []
        self.waited = 0

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def add(self, index: int, scheduled: float, sent: float, done: float, status: int) -> None:
        """Note one request that ended."""
        self._rows.append((index, scheduled, sent, done, status))

    def result(self) -> LoadResult:
        """Everything noted."""
        cpu_s, wall_s = time.process_time() - self._cpu, self.now()
        columns = [list(column) for column in zip(*self._rows, strict=True)] or [[], [], [], [], []]
        index, scheduled, sent, done, statuses = columns
        return LoadResult(
            index,
            scheduled,
            sent,
            done,
            statuses,
            self.bodies,
            self.late_s,
            self.waited,
            cpu_s,
            wall_s,
        )


def closed_loop(plan: LoadPlan, connection: Connection) -> LoadResult:
    """Requests in turn over one connection, for the plan's seconds."""
    log = Log()
    for index in cycle(range(len(plan.requests))):
        sent = log.now()
        if sent >= plan.seconds:
            break
        status, body = 0, b""
        try:
            answer = connection.exchange(plan.requests[index])
            status, body = answer.status, answer.body
        except OSError:
            connection.reopen()
        log.add(index, sent, sent, log.now(), status)
        if plan.keep:
            log.bodies.append(body)
    return log.result()


def open_loop(plan: LoadPlan, connections: list[Connection]) -> LoadResult:
    """Requests at their scheduled times; one that finds every connection busy waits for the first free one."""
    log, free, waiting = Log(), deque(connections), deque[tuple[int, float]]()
    busy: dict[int, tuple[Connection, int, float, float]] = {}
    arrivals = iter(zip(cycle(range(len(plan.requests))), plan.arrivals_s, strict=False))
    coming = next(arrivals, None)
    while coming is not None or waiting or busy:
        pause = ANSWER_TIMEOUT_S if coming is None else max(coming[1] - log.now(), 0.0)
        readable, _, _ = select.select(list(busy), [], [], pause)
        for number in readable:
            _receive(number, busy, free, log)
        if not readable and coming is None:
            _give_up(busy, log)
        now = log.now()
        while coming is not None and coming[1] <= now:
            log.late_s.append(now - coming[1])
            log.waited += len(waiting) >= len(free)
            waiting.append(coming)
            coming = next(arrivals, None)
        while waiting and free:
            _send(plan, waiting.popleft(), free, busy, log)
    return log.result()


def _send(
    plan: LoadPlan,
    arrival: tuple[int, float],
    free: deque[Connection],
    busy: dict[int, tuple[Connection, int, float, float]],
    log: Log,
) -> None:
    connection, (index, scheduled) = free.popleft(), arrival
    sent = log.now()
    try:
        if connection.ended():  # servers close connections that are not used for some seconds
            connection.reopen()
        connection.send(plan.requests[index])
    except OSError:
        log.add(index, scheduled, sent, log.now(), 0)
        with suppress(OSError):
            connection.reopen()
        free.append(connection)
    else:
        busy[connection.fileno()] = (connection, index, scheduled, sent)


def _receive(
    number: int, busy: dict[int, tuple[Connection, int, float, float]], free: deque[Connection], log: Log
) -> None:
    connection, index, scheduled, sent = busy[number]
    try:
        answer = connection.receive()
    except OSError:
        log.add(index, scheduled, sent, log.now(), 0)
        connection.reopen()
    else:
        if answer is None:
            return
        log.add(index, scheduled, sent, log.now(), answer.status)
    del busy[number]
    free.appendleft(connection)  # the one used last: as few connections as the load needs


def _give_up(busy: dict[int, tuple[Connection, int, float, float]], log: Log) -> None:
    """No answer for ANSWER_TIMEOUT_S after the last arrival."""
    for connection, index, scheduled, sent in busy.values():
        log.add(index, scheduled, sent, log.now(), 0)
        connection.close()
    busy.clear()


def http_request(path: str, body: bytes, headers: dict[str, str], host: str = "rankd") -> bytes:
    """A whole POST request as bytes."""
    lines = [f"POST {path} HTTP/1.1", f"host: {host}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + HEAD_END + body


def generate(plan: LoadPlan) -> LoadResult:
    """Run a plan in a fresh process.

    Raises:
        Unavailable: the generator could not connect, or failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "rankd.bench.load"], input=msgspec.msgpack.encode(plan), capture_output=True, check=False
    )
    if done.returncode:
        raise Unavailable(f"the load generator failed: {done.stderr.decode(errors='replace')[-2000:]}")
    return msgspec.msgpack.decode(done.stdout, type=LoadResult)


def run(plan: LoadPlan) -> LoadResult:
    """Connect, warm up, measure."""
    connections = [Connection(plan.host, plan.port) for _ in range(plan.connections)]
    try:
        for number, request in enumerate(islice(cycle(plan.requests), plan.warmup)):
            connections[number % len(connections)].exchange(request)
        gc.collect()
        gc.disable()
        _wake_in_time()
        return open_loop(plan, connections) if plan.arrivals_s else closed_loop(plan, connections[0])
    finally:
        for connection in connections:
            with suppress(OSError):
                connection.close()


def _wake_in_time() -> None:
    """Linux lets a sleeper sleep 50 us longer than asked unless told otherwise (79 us late against 33, measured)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


def main() -> None:
    """Standard input to standard output."""
    plan = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=LoadPlan)
    sys.stdout.buffer.write(msgspec.msgpack.encode(run(plan)))


if __name__ == "__main__":
    main()
