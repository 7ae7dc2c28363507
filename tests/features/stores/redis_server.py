"""A real Redis for tests: started on a free port, and killed, frozen and restarted as the faults of a real one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.free_ports import free_port

BINARY = shutil.which("redis-server")
DURABLE = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")
PATIENCE_S = 60.0


def redis_binary() -> str:
    """The path of redis-server. Without it the test is skipped, on CI it fails."""
    if BINARY is not None:
        return BINARY
    if os.environ.get("CI"):
        pytest.fail("CI has to have redis-server")
    pytest.skip("no redis-server on this machine")


def eventually(holds: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> Any:
    """Wait until something holds; what it returned then."""
    deadline = time.monotonic() + within_s
    while not (found := holds()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s} s: {what}")
        time.sleep(0.01)
    return found


class RedisServer:
    """A server in `folder`, with more arguments of redis-server if it needs them. What it keeps survives a restart."""

    def __init__(self, folder: Path, *arguments: str, password: str = "") -> None:
        self.folder, self.arguments, self.password = folder, arguments, password
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What a StoreConfig takes, without the password."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self, port: int = 0) -> RedisServer:
        """Start it and wait until it answers; on another port than before only if one is given."""
        self.port = port or self.port or free_port()
        self.folder.mkdir(parents=True, exist_ok=True)
        secret = ("--requirepass", self.password) if self.password else ()
        command = [redis_binary(), "--port", str(self.port), "--dir", str(self.folder), *DURABLE, *secret]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen([*command, *self.arguments], stdout=log, stderr=log)
        eventually(self._answers, f"redis-server answers; see {self.folder / 'server.log'}")
        return self

    def stop(self) -> None:
        """End it in order."""
        self._signal(signal.SIGTERM)
        self._gone()

    def kill(self) -> None:
        """End it as a crash does."""
        self._signal(signal.SIGKILL)
        self._gone()

    def restart(self) -> None:
        """Stop it and start it again on the same port."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Stop answering while connections stay: SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on after `freeze`."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it if it runs, frozen or not."""
        if self._process is not None:
            self.kill()

    def ask(self, *command: str | bytes | int) -> Any:
        """The reply to a command."""
        with redis.Redis(port=self.port, password=self.password or None, protocol=2) as client:
            return client.execute_command(*command)

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            pytest.fail(f"redis-server ended: {(self.folder / 'server.log').read_text()}")
        try:
            return bool(self.ask("PING"))
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _gone(self) -> None:
        assert self._process is not None
        self._process.wait(PATIENCE_S)
        self._process = None


@contextmanager
def running_redis(folder: Path, *arguments: str, password: str = "") -> Iterator[RedisServer]:
    """A server while the block runs."""
    server = RedisServer(folder, *arguments, password=password)
    try:
        yield server.start()
    finally:
        server.close()


@contextmanager
def running_cluster(folder: Path, num_nodes: int = 2) -> Iterator[list[RedisServer]]:
    """Some primaries that share the slots evenly; the URL of any of them names the cluster."""
    nodes: list[RedisServer] = []
    try:
        for number in range(num_nodes):
            arguments = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
            nodes.append(RedisServer(folder / f"node{number}", *arguments).start())
        for number, node in enumerate(nodes):
            first, last = 16384 * number // num_nodes, 16384 * (number + 1) // num_nodes - 1
            node.ask("CLUSTER", "ADDSLOTSRANGE", first, last)
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.ask("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, nodes[0].arguments[3])
        eventually(lambda: all(_whole(node, num_nodes) for node in nodes), "the nodes have met")
        yield nodes
    finally:
        for node in nodes:
            node.close()


def cluster_url(nodes: list[RedisServer]) -> str:
    """The URL of a cluster."""
    return f"redis+cluster://127.0.0.1:{nodes[-1].port}"


def _whole(node: RedisServer, num_nodes: int) -> bool:
    known = node.ask("CLUSTER", "SLOTS")
    return b"cluster_state:ok" in node.ask("CLUSTER", "INFO") and len({tuple(one[2][:2]) for one in known}) == num_nodes
