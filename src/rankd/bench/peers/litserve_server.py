"""LitServe: FastAPI in front, a process for each worker, batches by size and time. `python -m ...litserve_server`."""

# No `from __future__ import annotations`: LitServe looks at the annotation of `decode_request` itself.
from typing import Any

import litserve
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from rankd.bench.peers.peer_plan import PeerPlan, read_plan
from rankd.bench.peers.peer_worker import PeerWorker, Question

TIMEOUT_S = 60


class RankApi(litserve.LitAPI):
    """A JSON document in, bytes out."""

    def __init__(self, plan: PeerPlan) -> None:
        super().__init__(max_batch_size=plan.batch, batch_timeout=plan.wait_ms / 1e3)
        self._plan = plan
        self._worker: PeerWorker | None = None

    def setup(self, device: str) -> None:
        """In each worker's process."""
        self._worker = PeerWorker(self._plan)

    def decode_request(self, request: Request) -> Question:
        """The annotation tells LitServe to parse JSON; what comes is the parsed document."""
        return msgspec.convert(request, Question)

    def batch(self, inputs: list[Question]) -> list[Question]:
        """Lists of different lengths are padded later."""
        return inputs

    def predict(self, x: Any) -> Any:
        """A batch, or one request where batches are of one."""
        assert self._worker is not None  # noqa: S101 - LitServe calls setup first
        return self._worker.rank(x) if self._plan.batch > 1 else self._worker.rank([x])[0]

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """One for each request."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """Bytes as they are."""
        return Response(output, media_type="application/octet-stream")


def main() -> None:
    """Serve until SIGTERM."""
    plan = read_plan()
    server = litserve.LitServer(RankApi(plan), accelerator="cpu", workers_per_device=plan.workers, timeout=TIMEOUT_S)
    server.run(host=plan.host, port=plan.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
