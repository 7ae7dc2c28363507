"""A Redis of the benchmark's own: a process on a free port that keeps nothing on disk, ended with the benchmark."""

from __future__ import annotations

import shutil
import signal
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import redis

from rankd.bench.server_process import free_port
from rankd.errors import ConfigError, Unavailable

BINARY = "redis-server"
START_SECONDS = 20.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.02
ROUND_TRIPS = 200
HOST = "127.0.0.1"
FORGETFUL = ("--save", "", "--appendonly", "no")


@dataclass(frozen=True, slots=True)
class RedisFigures:
    """What it says of itself: bytes sent to all clients since it started, and memory of its data."""

    sent_bytes: int
    used_bytes: int


class RedisProcess:
    """A server while the context manager is open; its log is in `folder`.

    Raises:
        ConfigError: there is no redis-server on this machine.
    """

    def __init__(self, folder: Path) -> None:
        found = shutil.which(BINARY)
        if found is None:
            raise ConfigError(
                f"`rankd bench features` measures against a real Redis, and there is no {BINARY} on the PATH; "
                f"install it (apt-get install {BINARY}, brew install redis)"
            )
        self._binary, self._folder, self.port = found, folder, 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What a StoreConfig takes."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def pid(self) -> int:
        """The process.

        Raises:
            Unavailable: it does not run.
        """
        if self._process is None:
            raise Unavailable(f"{BINARY} was not started")
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            Unavailable: it ended, or did not answer in time.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        command = [self._binary, "--bind", HOST, "--port", str(self.port), "--dir", str(self._folder), *FORGETFUL]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603 - found above
        until = time.monotonic() + START_SECONDS
        try:
            while not self._answers():
                if self._process.poll() is not None or time.monotonic() > until:
                    text = (self._folder / "redis.log").read_text(errors="replace")
                    raise Unavailable(f"{BINARY} did not start; its log ends so:\n{text[-1000:]}")
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def figures(self) -> RedisFigures:
        """A snapshot."""
        with redis.Redis(HOST, self.port, protocol=2) as client:
            about = client.info()
        return RedisFigures(int(about["total_net_output_bytes"]), int(about["used_memory"]))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self) -> bool:
        try:
            with redis.Redis(HOST, self.port, protocol=2) as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False


def round_trip_ms(port: int) -> float:
    """The median time of a question to whoever answers as Redis on a port of this machine."""
    spent = []
    with redis.Redis(HOST, port, protocol=2) as client:
        for _ in range(ROUND_TRIPS):
            started = time.perf_counter()
            client.ping()
            spent.append((time.perf_counter() - started) * 1e3)
    return statistics.median(spent)
