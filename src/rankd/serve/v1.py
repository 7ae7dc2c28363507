"""The /v1 API for people: rank, events, models. Bytes in, `wire.py`, a Ranker, bytes out."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rankd.errors import RankdError
from rankd.observe.tracing import RequestTrace
from rankd.ranker import Ranker
from rankd.serve.bodies import check_json, read_body
from rankd.serve.booking import book_failure, booked
from rankd.serve.disconnects import Receive, cancelled_if_gone
from rankd.serve.repository import ModelRepository, ModelState, ModelStatus
from rankd.serve.settings import ServeConfig
from rankd.serve.traced_http import trace_of
from rankd.serve.wire import EventsAnswer, ModelAnswer, decode_events, decode_rank, encode, encode_scores
from rankd.types import RankRequest, Scores


def json_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON that is already encoded."""
    return Response(body, status, headers, media_type="application/json")


async def rank_with(
    repository: ModelRepository, request: RankRequest, receive: Receive, trace: RequestTrace | None = None
) -> Scores:
    """Rank on the executors' threads without holding up the event loop, and book how it ended. `receive` is the ASGI
    request's: a client that goes away cancels it."""
    with booked(repository, trace) as booking:
        future = booking.submit(request)
        with cancelled_if_gone(receive, future):
            scores = await asyncio.wrap_future(future)
    if trace is not None:
        trace.answered(scores)
    # Booked on the loop's next turn, when the answer is on its way.
    asyncio.get_running_loop().call_soon(repository.metrics.succeeded, scores)
    return scores


def routes(repository: ModelRepository, config: ServeConfig) -> list[Route]:
    """POST /v1/rank, POST /v1/events, GET /v1/models."""

    async def rank(request: Request) -> Response:
        started = time.perf_counter()
        try:
            check_json(request)
            decoded = decode_rank(await read_body(request, config.max_body_bytes))
        except RankdError as error:
            book_failure(repository, None, error, started)
            raise
        scores = await rank_with(repository, decoded, request.receive, trace_of(request))
        return json_response(encode_scores(scores), headers={"x-request-id": scores.request_id})

    async def events(request: Request) -> Response:
        check_json(request)
        model, user_id, appended = decode_events(await read_body(request, config.max_body_bytes))
        name = repository.get(model).manifest.name
        done = await asyncio.to_thread(repository.append_events, name, user_id, appended)
        by = "store" if done.confirmed else "outbox"
        return json_response(encode(EventsAnswer(name, user_id, done.stored, done.unknown, by)))

    async def models(request: Request) -> Response:
        found = await asyncio.to_thread(repository.index)  # it reads the disk
        rankers = {(name, version): ranker for name, version, ranker in repository.rankers()}
        return json_response(encode([_describe(one, rankers.get((one.name, one.version))) for one in found]))

    return [
        Route("/v1/rank", rank, methods=["POST"]),
        Route("/v1/events", events, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
    ]


def _describe(status: ModelStatus, ranker: Ranker | None) -> ModelAnswer:
    """A version for people; one that was READY in the index and has no ranker by now is on its way out."""
    if ranker is None or status.state is not ModelState.READY:
        state = ModelState.UNLOADING if status.state is ModelState.READY else status.state
        return ModelAnswer(status.name, status.version, state.value, status.reason)
    return describe_version(ranker)


def describe_version(ranker: Ranker) -> ModelAnswer:
    """A version that is ready."""
    manifest, schema = ranker.manifest, ranker.schema
    precision = ranker.backend.precision.value
    return ModelAnswer(
        name=manifest.name,
        version=manifest.version,
        state=ModelState.READY.value,
        kind=manifest.model,
        created=manifest.created,
        precision=precision,
        target=ranker.backend.target,
        parity={t: record.parity[precision] for t, record in manifest.engines.items() if precision in record.parity},
        metrics=manifest.metrics,
        tasks=schema.task_names,
        event_types=schema.event_types,
        history_length=schema.history_length,
        max_candidates=schema.max_candidates,
        num_items=len(ranker.catalogue.ids.items),
        compression=manifest.compression,
    )
