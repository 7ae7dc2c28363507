"""A server that answers at once and computes nothing: what the load generator itself costs, and up to which rate.

    python -m rankd.bench.null_server PORT

In: the requests and arrivals of a measurement. Out: the latencies that it would show if the server took no time.
"""

from __future__ import annotations

import selectors
import socket
import sys
from collections.abc import Sequence

from rankd.bench.load import CONTENT_LENGTH, HEAD_END, LoadPlan, generate
from rankd.bench.report import Row, percentile
from rankd.bench.server_process import ServerProcess, free_port

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2048\r\n\r\n" + bytes(2048)
READ_BYTES = 1 << 20
PROBE = b"POST / HTTP/1.1\r\ncontent-length: 0" + HEAD_END


class NullServer(ServerProcess):
    """The process."""

    def __init__(self) -> None:
        port = free_port()
        super().__init__(("rankd.bench.null_server", str(port)))
        self.host, self.port = "127.0.0.1", port

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            return self.exchange(PROBE).status == 200
        except OSError:
            return False


def generator_alone(requests: Sequence[bytes], arrivals_s: Sequence[float], connections: int) -> Row:
    """Latencies in ms of these arrivals against a server that does nothing, how late the generator took them up, and
    its share of a processor."""
    with NullServer() as server:
        plan = LoadPlan(server.host, server.port, list(requests), arrivals_s=list(arrivals_s), connections=connections)
        result = generate(plan)
    latencies = [(done - planned) * 1e3 for done, planned in zip(result.done_s, result.scheduled_s, strict=True)]
    return {
        "rate": len(arrivals_s) / max(arrivals_s[-1], 1e-9),
        "p50_ms": percentile(latencies, 0.5),
        "p99_ms": percentile(latencies, 0.99),
        "failed": sum(status != 200 for status in result.statuses),
        "generator_late_p99_ms": percentile(result.late_s, 0.99) * 1e3,
        "generator_cpu_share": result.cpu_s / result.wall_s,
    }


def serve(port: int) -> None:
    """Answer until killed."""
    selector = selectors.DefaultSelector()
    listening = socket.create_server(("127.0.0.1", port), backlog=1024)
    selector.register(listening, selectors.EVENT_READ, None)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                connection, _ = listening.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(connection, selectors.EVENT_READ, bytearray())
            elif not _answer(key.fileobj, key.data):  # type: ignore[arg-type]  # sockets are all that is registered
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]


def _answer(connection: socket.socket, received: bytearray) -> bool:
    """Read what is there and answer whole requests; False if the connection is over."""
    try:
        part = connection.recv(READ_BYTES)
        received += part
        while (end := received.find(HEAD_END)) >= 0:
            length = CONTENT_LENGTH.search(received[:end])
            whole = end + len(HEAD_END) + (int(length[1]) if length else 0)
            if len(received) < whole:
                break
            del received[:whole]
            connection.sendall(ANSWER)
    except OSError:
        return False
    return bool(part)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
