"""A shard: it listens, lets clients in, pools for them near its tables, and leaves without losing a request.

In: any `Pooling` that knows the shard's parts under the names of their tables, rows counted in the part. Out: sums,
over framed TCP. A thread for each connection reads; `workers` threads pool. Next: `shard_connection.py`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping

from rankd.embeddings.pooling import Pooling
from rankd.errors import Overloaded
from rankd.malloc import keep_freed
from rankd.observe.tracing import open_traces
from rankd.shards.frame_errors import RETRY_AFTER_S
from rankd.shards.frames import Kind
from rankd.shards.handshake import Ready
from rankd.shards.pool_queue import PoolQueue
from rankd.shards.shard_config import ShardServerConfig
from rankd.shards.shard_connection import ShardConnection
from rankd.shards.shard_layout import ServedNet
from rankd.shards.shard_stats import ShardStats, ShardTally
from rankd.shards.transport import accepted, listen, server_tls

LOOK_S = 0.1
"""How often it is looked whether accepting is to end, where shutting the socket does not wake who accepts."""

SERVICE = "rankd-shard"
"""In traces, unless it is named otherwise."""

log = logging.getLogger("rankd")


class ShardServer:
    """Serves the parts of `nets` under the name of a plan; `contents` says which rows the tables have, as far as known.

    Raises:
        ConfigError: an address that cannot be had or would be open to others, or files of TLS that cannot be used.
        MissingExtra: tracing is on, and its packages are not installed.
    """

    def __init__(
        self,
        pooling: Pooling,
        plan: str,
        nets: tuple[ServedNet, ...],
        config: ShardServerConfig,
        contents: Mapping[str, str] | None = None,
    ) -> None:
        self._config, self._tls = config, server_tls(config.security)
        self._traces = open_traces(config.tracing, SERVICE)
        self._listening = listen(config.host, config.port, config.security)
        self._listening.settimeout(LOOK_S)
        self._ready = Ready(plan, b"", nets, config.max_request_bytes, contents=dict(contents or {}))
        self._tally = ShardTally()
        self._line = PoolQueue(pooling, nets, config, self._tally, self._traces)
        self._connections: dict[ShardConnection, threading.Thread] = {}
        self._changed = threading.Condition()  # guards `_connections`
        self._leaving = threading.Event()
        self._accepting = threading.Thread(target=self._accept, name="shard-accept", daemon=True)

    @property
    def address(self) -> str:
        """Where it listens: "host:port"."""
        host, port = self._listening.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def start(self) -> None:
        """Let clients in."""
        self._line.start()
        self._accepting.start()
        log.info("shard: plan %s at %s", self._ready.plan, self.address)

    def drain(self) -> None:
        """Leave: say so to all clients, answer what they have sent, and end when they have all gone, or after
        `drain_seconds`. A client that hears it sends no more, waits for its answers and goes."""
        until = time.perf_counter() + self._config.drain_seconds
        self._stop_accepting()
        with self._changed:
            connections = list(self._connections)
        for connection in connections:
            connection.answer(Kind.GOODBYE, 0)
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, max(until - time.perf_counter(), 0.0))
        self.close()

    def close(self) -> None:
        """End at once: connections are cut, what waits is not answered."""
        self._stop_accepting()
        with self._changed:
            connections = dict(self._connections)
        for connection in connections:
            connection.shut()
        for thread in connections.values():
            thread.join()
        self._line.close()
        if self._traces is not None:
            self._traces.close()

    def stats(self) -> ShardStats:
        """What it has done."""
        return self._tally.stats(self._line.waiting, len(self._connections))

    def _stop_accepting(self) -> None:
        self._leaving.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes who accepts, on Linux
        if self._accepting.ident is not None:
            self._accepting.join()
        self._listening.close()

    def _accept(self) -> None:
        while not self._leaving.is_set():
            try:
                connected, _ = self._listening.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if self._leaving.is_set():
                    return
                # Of one client, or no file descriptor is left: others may be served yet
                log.warning("shard: a client could not be accepted: %s", error)
                self._leaving.wait(LOOK_S)
                continue
            with contextlib.suppress(OSError):  # it has gone again
                self._begin(connected)

    def _begin(self, connected: socket.socket) -> None:
        stream = accepted(connected, self._tls)
        connection = ShardConnection(stream, self._ready, self._line, self.stats, self._config)
        if len(self._connections) >= self._config.max_connections:
            connection.refuse(
                Overloaded(f"{self._config.max_connections} clients are here, allowed are no more", RETRY_AFTER_S)
            )
            return
        thread = threading.Thread(target=self._run, args=(connection,), name="shard-connection", daemon=True)
        with self._changed:
            self._connections[connection] = thread
            thread.start()

    def _run(self, connection: ShardConnection) -> None:
        try:
            connection.run()
        finally:
            with self._changed:
                del self._connections[connection]
                self._changed.notify_all()


def serve_shard(server: ShardServer, started: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; `started` is told the address. Runs in the main thread."""
    keep_freed()
    asked_to_leave = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_leave.set())
    server.start()
    started(server.address)
    asked_to_leave.wait()
    server.drain()
