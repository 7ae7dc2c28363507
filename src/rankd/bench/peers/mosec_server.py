"""mosec: a Rust front and a process for each worker, batches by size and time. `python -m ...mosec_server`."""

from __future__ import annotations

import os
from typing import Any

from mosec import Server, Worker

from rankd.bench.peers.peer_plan import read_plan
from rankd.bench.peers.peer_worker import PeerWorker

TIMEOUT_MS = 60_000


class RankWorker(Worker):
    """Bytes in, bytes out."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self._plan = read_plan()
        self._worker = PeerWorker(self._plan)

    def deserialize(self, data: bytes) -> bytes:
        """As it came: `forward` decodes a batch."""
        return data

    def serialize(self, data: bytes) -> bytes:
        """As it is."""
        return data

    def forward(self, data: Any) -> Any:
        """A batch, or one request where batches are of one."""
        if self._plan.batch > 1:
            return self._worker.answer(data)
        return self._worker.answer([data])[0]


def main() -> None:
    """Serve until SIGTERM."""
    plan = read_plan()
    os.environ |= {
        "MOSEC_ADDRESS": plan.host,
        "MOSEC_PORT": str(plan.port),
        "MOSEC_TIMEOUT": str(TIMEOUT_MS),
    }
    server = Server()
    server.append_worker(RankWorker, num=plan.workers, max_batch_size=plan.batch, max_wait_time=plan.wait_ms)
    server.run()


if __name__ == "__main__":
    main()
