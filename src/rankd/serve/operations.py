"""What the on-call person and the load balancer read: health, readiness, metrics."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rankd.errors import Unavailable
from rankd.serve.repository import ModelRepository, ModelState


def check_ready(repository: ModelRepository) -> None:
    """Do nothing if the server takes requests.

    Raises:
        Unavailable: models are loading, or the server is draining; the message says which.
    """
    if not repository.ready:
        waiting = [f"{s.name} {s.version}" for s in repository.index() if s.state is not ModelState.READY]
        raise Unavailable(f"not ready: loading or draining ({', '.join(waiting) or 'no model yet'})")


def routes(repository: ModelRepository) -> list[Route]:
    """GET /health/live, /health/ready, /metrics."""

    async def live(request: Request) -> Response:
        return Response('{"live":true}', media_type="application/json")

    async def ready(request: Request) -> Response:
        check_ready(repository)
        return Response('{"ready":true}', media_type="application/json")

    async def metrics(request: Request) -> Response:
        rankers = {(name, version): ranker for name, version, ranker in repository.rankers()}
        repository.metrics.schedules.show({key: ranker.schedule_figures() for key, ranker in rankers.items()})
        repository.metrics.states.show({key: ranker.state_counts() for key, ranker in rankers.items()})
        tables = {key: ranker.table_figures() for key, ranker in rankers.items()}
        repository.metrics.tables.show({key: figures for key, figures in tables.items() if figures is not None})
        repository.metrics.features.show(repository.feature_figures())
        repository.metrics.elastic.show(repository.elastic.figures())
        return Response(repository.metrics.text(), media_type="text/plain; version=0.0.4")

    return [
        Route("/health/live", live, methods=["GET"]),
        Route("/health/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]
