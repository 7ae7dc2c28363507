"""A server in a process of its own: `python -m ...`, from its start until it is ready, to SIGTERM.

`ServedModel` is `rankd serve`, `peers.peer_process.PeerServer` a general model server around the same model.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from tempfile import TemporaryFile
from typing import Self

from rankd.bench.load import Answer, Connection
from rankd.errors import Unavailable

READY_SECONDS = 180.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.02


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


class ServerProcess(ABC):
    """A process to be started and ended; use it as a context manager. `host` and `port` are known once it is started.

    `command` is what `python -m` runs, `variables` are added to the environment, which keeps no RANKD_* but those.
    """

    def __init__(
        self, command: Sequence[str], variables: Mapping[str, str] | None = None, python: str = sys.executable
    ) -> None:
        self._command, self._variables, self._python = tuple(command), dict(variables or {}), python
        self._log = TemporaryFile()  # noqa: SIM115 - the server writes to it as long as it lives
        self._process: subprocess.Popen[bytes] | None = None
        self.host, self.port = "", 0

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it answers now."""

    def start(self) -> float:
        """Start, and wait until it is ready; returns the seconds that took.

        Raises:
            Unavailable: it ended, or was not ready in time; the message has the end of its log.
        """
        started = time.perf_counter()
        self._process = self._launch()
        try:
            while not self.is_ready():
                if self._process.poll() is not None or time.perf_counter() - started > READY_SECONDS:
                    raise Unavailable(
                        f"`{' '.join(self._command)}` did not become ready; its log ends so:\n{self.log_text()[-2000:]}"
                    )
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.close()
            raise
        return time.perf_counter() - started

    def close(self) -> None:
        """SIGTERM, and SIGKILL if it has not drained in time; it is not started again."""
        self._log.close()
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def exchange(self, request: bytes) -> Answer:
        """One request over a connection of its own."""
        with closing(Connection(self.host, self.port)) as connection:
            return connection.exchange(request)

    def log_text(self) -> str:
        """What it has written to standard error."""
        descriptor = self._log.fileno()  # pread: the place where the server goes on writing stays where it is
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    @property
    def pid(self) -> int:
        """The process.

        Raises:
            Unavailable: it does not run.
        """
        if self._process is None:
            raise Unavailable(f"`{' '.join(self._command)}` was not started")
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _launch(self) -> subprocess.Popen[bytes]:
        # The contestant in process reads no variables either.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RANKD_")}
        return subprocess.Popen(  # noqa: S603 - our own command
            [self._python, "-m", *self._command],
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            env={**clean, **self._variables},
        )
