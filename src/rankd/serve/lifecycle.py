"""The server's life: listen, load and warm, take requests, drain, end.

The socket listens first, so that /health/live answers while models load; /health/ready answers 200 only after every
bucket of every model is warm. On SIGTERM readiness goes, accepted requests are finished, then the models are closed.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Self

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rankd.errors import ConfigError
from rankd.features.reading.shared_features import FeatureService
from rankd.malloc import keep_freed
from rankd.serve.app import create_app
from rankd.serve.grpc_server import GrpcServer
from rankd.serve.repository import ModelRepository
from rankd.serve.settings import ServeConfig, without_secrets
from rankd.serve.traced_http import TracedHttp

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger("rankd")
BACKLOG = 2048
HEAD_BYTES = 1 << 16


class Server:
    """A server on a thread of this process: `start()` returns when it is ready, `close()` drains it.

    Use it as a context manager in tests and demos; `run_server` is the command.
    """

    def __init__(self, root: Path, config: ServeConfig, features: FeatureService | None = None) -> None:
        self.repository = ModelRepository(root, config, features)
        self._config = config
        self._socket: socket.socket | None = None
        self._grpc: GrpcServer | None = None
        self._url = ""
        self._uvicorn = self._make_uvicorn()  # before anybody can call `stop`
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it listens; with port 0 the port that the system chose."""
        if not self._url:
            raise ConfigError("the server is not started")
        return self._url

    @property
    def grpc_address(self) -> str:
        """Where gRPC listens, host:port.

        Raises:
            ConfigError: the server is not started, or without gRPC.
        """
        if self._grpc is None:
            raise ConfigError("the server is not started, or without gRPC")
        return f"{self._url.removeprefix('http://').rpartition(':')[0]}:{self._grpc.port}"

    def listen(self) -> None:
        """Bind the addresses.

        Raises:
            ConfigError: one of them is taken, or not ours.
        """
        config = self._config
        self._socket = _bind(config.host, config.port)
        host, port = self._socket.getsockname()[:2]
        self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        if config.grpc:
            above = config.port + 1 if config.port else 0
            try:
                self._grpc = GrpcServer(self.repository, config, above if config.grpc_port < 0 else config.grpc_port)
            except ConfigError:
                self._socket.close()
                raise

    def start(self) -> None:
        """Listen, serve on a thread, and load the models; returns when requests are taken.

        Raises:
            RankdError: the address or a model is unusable; nothing is left running.
        """
        self.listen()
        self._thread = threading.Thread(target=self.serve, name="rankd-http", daemon=True)
        self._thread.start()
        try:
            self.repository.start()
        except BaseException:
            self.close()
            raise

    def serve(self) -> None:
        """Run the event loop until `stop`; uvicorn takes SIGTERM and SIGINT if this is the main thread."""
        assert self._socket is not None  # noqa: S101 - `listen` came before
        if self._grpc is not None:
            self._grpc.start()
        with asyncio.Runner(loop_factory=self._uvicorn.config.get_loop_factory()) as runner:
            runner.run(self._uvicorn.serve(sockets=[self._socket]))

    def stop(self) -> None:
        """Ask the event loop to drain and end."""
        self.repository.begin_draining()
        self._uvicorn.should_exit = True

    def close(self) -> None:
        """Drain, end the thread, close the models and the socket."""
        self.stop()
        if self._thread is not None:
            self._thread.join()
        if self._grpc is not None:
            self._grpc.close(self._config.drain_seconds)
        self.repository.close()
        if self._socket is not None:
            self._socket.close()

    def _make_uvicorn(self) -> uvicorn.Server:
        application, traces = create_app(self.repository, self._config), self.repository.traces
        config = uvicorn.Config(
            application if traces is None else TracedHttp(application, traces),
            http=_BoundedHead,
            loop="auto",
            access_log=False,
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=ceil(self._config.drain_seconds),
            backlog=BACKLOG,
        )
        return _DrainingServer(config, self.repository, self._drain_grpc)

    def _drain_grpc(self) -> None:
        if self._grpc is not None:
            self._grpc.drain(self._config.drain_seconds)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _BoundedHead(HttpToolsProtocol):
    """HTTP, with a limit to the bytes of a request's head: the parser has none, and copies a value that grows each time
    that it does."""

    _head_bytes, _in_head = 0, False

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes, self._in_head = 0, True

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._head_bytes += len(data)
        if self._in_head and self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of the request is longer than {HEAD_BYTES} bytes.")


class _DrainingServer(uvicorn.Server):
    """uvicorn, telling the repository when a signal asks it to go."""

    def __init__(self, config: uvicorn.Config, repository: ModelRepository, also: Callable[[], None]) -> None:
        super().__init__(config)
        self._repository, self._also = repository, also

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain what else listens at the same time: both have the same `drain_seconds`."""
        self._also()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: object) -> None:
        """Readiness goes at once, the rest is uvicorn's graceful shutdown; a second SIGINT does not wait for it."""
        self._repository.begin_draining()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def run_server(root: Path, config: ServeConfig, features: FeatureService | None = None) -> None:
    """Serve until SIGTERM or SIGINT, from the main thread. `features` take the place of the configured ones.

    Raises:
        RankdError: the address or a model is unusable.
    """
    _allow_connections()
    keep_freed()
    log.info("configuration: %s", msgspec.json.encode(without_secrets(config)).decode())
    server = Server(root, config, features)
    # uvicorn takes signals only while its loop runs; before and after that they have to drain too, not kill.
    before = {one: signal.signal(one, lambda *_: server.stop()) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        _serve_and_load(server, config)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    log.info("drained and closed")


def _allow_connections() -> None:
    """As many open files as this process may have: a thousand idle connections must not be all."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _serve_and_load(server: Server, config: ServeConfig) -> None:
    server.listen()
    if config.grpc:
        log.info("gRPC on %s", server.grpc_address)
    log.info("listening on %s", server.url)
    failures: list[Exception] = []
    loader = threading.Thread(target=_load, args=(server, failures), name="rankd-loader", daemon=True)
    loader.start()
    try:
        server.serve()
    finally:
        loader.join()
        server.close()
    if failures:
        raise failures[0]


def _load(server: Server, failures: list[Exception]) -> None:
    try:
        server.repository.start()
    except Exception as error:  # noqa: BLE001 - the edge of the thread: `run_server` raises it
        failures.append(error)
        server.stop()
    else:
        if server.repository.ready:
            log.info("ready; the live page is at %s/", server.url)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on '{host}': {error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port, 0 takes a free one"
        ) from error
    bound.setblocking(False)
    return bound
