"""A shard in a process of its own: `python -m tests.shards.shard_process LAYOUT SHARD PORT`, the layout as JSON."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from rankd.shards.shard_config import ShardServerConfig
from rankd.shards.shard_layout import ShardLayout
from rankd.shards.shard_server import serve_shard
from tests.free_ports import free_port
from tests.shards.plain_tables import make_server


class ShardProcess:
    """Started by the constructor; `address` is where it listens, so that another one can take its `port` after it."""

    def __init__(self, layout: ShardLayout, shard: int = 0, port: int = 0) -> None:
        arguments = [msgspec.json.encode(layout).decode(), str(shard), str(port or free_port())]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        self.port = int(self.address.rpartition(":")[2])

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def freeze(self) -> None:
        """Stop it, as if it hung."""
        self.signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def wait(self) -> int:
        """Until it has ended; its exit status."""
        return self._process.wait(30.0)

    def end(self) -> None:
        """Kill it if it still runs."""
        self._process.kill()
        self._process.wait(30.0)
        assert self._process.stdout is not None
        self._process.stdout.close()


def main() -> None:
    """Serve until SIGTERM."""
    layout = msgspec.json.decode(sys.argv[1], type=ShardLayout)
    server = make_server(layout, int(sys.argv[2]), ShardServerConfig(port=int(sys.argv[3])))
    serve_shard(server, lambda address: print(address, flush=True))


if __name__ == "__main__":
    main()
