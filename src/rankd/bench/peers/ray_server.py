"""Ray Serve: a proxy in front, an actor for each replica, batches by size and time. `python -m ...ray_server`.

Ray puts the host's own address in the place of 127.0.0.1: run it where loopback is the only interface.
"""

from __future__ import annotations

import signal
import threading

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from rankd.bench.peers.peer_plan import PeerPlan, read_plan
from rankd.bench.peers.peer_worker import PeerWorker

STORE_BYTES = 200 << 20
ONGOING = 256
"""Requests that a replica is given before it has answered: all that the load generator sends."""


def replica(plan: PeerPlan) -> serve.Application:
    """The deployment, a replica for each worker."""

    class Replica:
        def __init__(self) -> None:
            self._worker = PeerWorker(plan)

        @serve.batch(max_batch_size=plan.batch, batch_wait_timeout_s=plan.wait_ms / 1e3)
        async def _answer(self, bodies: list[bytes]) -> list[bytes]:
            return self._worker.answer(bodies)

        async def __call__(self, request: Request) -> Response:
            scores: bytes = await self._answer(await request.body())
            return Response(scores, media_type="application/octet-stream")

    options = {"num_cpus": 1, "runtime_env": {"env_vars": plan.variables()}}
    deployment = serve.deployment(
        Replica, num_replicas=plan.workers, max_ongoing_requests=ONGOING, ray_actor_options=options
    )
    return deployment.bind()


def main() -> None:
    """Serve until SIGTERM."""
    plan, stop = read_plan(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    ray.init(num_cpus=plan.workers, include_dashboard=False, object_store_memory=STORE_BYTES, log_to_driver=False)
    try:
        serve.start(http_options={"host": plan.host, "port": plan.port, "access_log": False})
        serve.run(replica(plan), name="rank", route_prefix="/inference")
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
