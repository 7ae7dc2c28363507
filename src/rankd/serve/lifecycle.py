"""The server's life: listen, load and warm, take requests, drain, end.

The socket listens first, so that /health/live answers while models load; /health/ready answers 200 only after every
bucket of every model is warm. On SIGTERM readiness goes, accepted requests are finished, then the models are closed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from pathlib import Path
from typing import Self

import msgspec
import uvicorn

from rankd.errors import ConfigError, RankdError
from rankd.serve.app import create_app
from rankd.serve.repository import ModelRepository
from rankd.serve.settings import ServeConfig

log = logging.getLogger("rankd")
BACKLOG = 2048


class Server:
    """A server on a thread of this process: `start()` returns when it is ready, `close()` drains it.

    Use it as a context manager in tests and demos; `run_server` is the command.
    """

    def __init__(self, root: Path, config: ServeConfig) -> None:
        self.repository = ModelRepository(root, config)
        self._config = config
        self._socket: socket.socket | None = None
        self._uvicorn: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it listens; with port 0 the port that the system chose."""
        if self._socket is None:
            raise ConfigError("the server is not started")
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def listen(self) -> None:
        """Bind the address.

        Raises:
            ConfigError: it is taken, or not ours.
        """
        self._socket = _bind(self._config.host, self._config.port)

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
        except RankdError:
            self.close()
            raise

    def serve(self) -> None:
        """Run the event loop until `stop`; uvicorn takes SIGTERM and SIGINT if this is the main thread."""
        app = create_app(self.repository, self._config)
        self._uvicorn = _DrainingServer(
            uvicorn.Config(
                app,
                http="httptools",
                loop="auto",
                access_log=False,
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=int(self._config.drain_seconds) or 1,
                backlog=BACKLOG,
            ),
            self.repository,
        )
        assert self._socket is not None  # noqa: S101 - `listen` came before
        with asyncio.Runner(loop_factory=self._uvicorn.config.get_loop_factory()) as runner:
            runner.run(self._uvicorn.serve(sockets=[self._socket]))

    def stop(self) -> None:
        """Ask the event loop to drain and end."""
        self.repository.begin_draining()
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    def close(self) -> None:
        """Drain, end the thread, close the models and the socket."""
        self.stop()
        if self._thread is not None:
            self._thread.join()
        self.repository.close()
        if self._socket is not None:
            self._socket.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _DrainingServer(uvicorn.Server):
    """uvicorn, telling the repository when a signal asks it to go."""

    def __init__(self, config: uvicorn.Config, repository: ModelRepository) -> None:
        super().__init__(config)
        self._repository = repository

    def handle_exit(self, sig: int, frame: object) -> None:
        """SIGTERM or SIGINT: readiness goes at once, the rest is uvicorn's graceful shutdown."""
        self._repository.begin_draining()
        self.should_exit = True


def run_server(root: Path, config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT, from the main thread.

    Raises:
        RankdError: the address or a model is unusable.
    """
    log.info("configuration: %s", msgspec.json.encode(config).decode())
    server = Server(root, config)
    server.listen()
    log.info("listening on %s", server.url)
    failures: list[RankdError] = []
    loader = threading.Thread(target=_load, args=(server, failures), name="rankd-loader", daemon=True)
    loader.start()
    try:
        server.serve()
    finally:
        loader.join()
        server.close()
    if failures:
        raise failures[0]
    log.info("drained and closed")


def _load(server: Server, failures: list[RankdError]) -> None:
    try:
        server.repository.start()
    except RankdError as error:
        failures.append(error)
        server.stop()
    else:
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
