"""The /v1 API for people: rank, events, models. Bytes in, `wire.py`, a Ranker, bytes out."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rankd.errors import RankdError
from rankd.ranker import Ranker
from rankd.serve.bodies import check_json, read_body
from rankd.serve.repository import ModelRepository, ModelState, ModelStatus
from rankd.serve.settings import ServeConfig
from rankd.serve.wire import EventsAnswer, ModelAnswer, decode_events, decode_rank, encode, encode_scores
from rankd.types import RankRequest, Scores


def json_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON that is already encoded."""
    return Response(body, status, headers, media_type="application/json")


async def rank_with(repository: ModelRepository, request: RankRequest) -> Scores:
    """Rank on the executors' threads without holding up the event loop, and book how it ended."""
    started = time.perf_counter()
    name, version = request.model, request.version
    try:
        ranker = repository.get(name, version)
        name, version = ranker.manifest.name, ranker.manifest.version
        scores = await asyncio.wrap_future(ranker.submit(request))
    except RankdError as error:
        known = version != request.version or name != request.model  # never a label of the caller's making
        labels = (name, version) if known else ("", "")
        repository.metrics.failed(*labels, type(error).__name__, time.perf_counter() - started)
        raise
    repository.metrics.succeeded(scores)
    return scores


def routes(repository: ModelRepository, config: ServeConfig) -> list[Route]:
    """POST /v1/rank, POST /v1/events, GET /v1/models."""

    async def rank(request: Request) -> Response:
        check_json(request)
        scores = await rank_with(repository, decode_rank(await read_body(request, config.max_body_bytes)))
        return json_response(encode_scores(scores), headers={"x-request-id": scores.request_id})

    async def events(request: Request) -> Response:
        check_json(request)
        model, user_id, appended = decode_events(await read_body(request, config.max_body_bytes))
        stored, unknown = await asyncio.to_thread(repository.append_events, model, user_id, appended)
        name = repository.get(model).manifest.name
        return json_response(encode(EventsAnswer(name, user_id, stored, unknown)))

    async def models(request: Request) -> Response:
        return json_response(encode([_describe(repository, status) for status in repository.index()]))

    return [
        Route("/v1/rank", rank, methods=["POST"]),
        Route("/v1/events", events, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
    ]


def _describe(repository: ModelRepository, status: ModelStatus) -> ModelAnswer:
    if status.state is not ModelState.READY:
        return ModelAnswer(status.name, status.version, status.state.value, status.reason)
    return _of_ranker(status, repository.get(status.name, status.version))


def _of_ranker(status: ModelStatus, ranker: Ranker) -> ModelAnswer:
    manifest, schema = ranker.manifest, ranker.schema
    precision = ranker.backend.precision.value
    return ModelAnswer(
        name=status.name,
        version=status.version,
        state=status.state.value,
        kind=manifest.model,
        created=manifest.created,
        precision=precision,
        parity={target: record.parity[precision] for target, record in manifest.engines.items()},
        metrics=manifest.metrics,
        tasks=schema.task_names,
        event_types=schema.event_types,
        history_length=schema.history_length,
        max_candidates=schema.max_candidates,
        num_items=len(ranker.catalogue.ids.items),
    )
