"""The application: all routes, and the one place where errors become answers."""

from __future__ import annotations

import logging
import math

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rankd.errors import Overloaded, RankdError
from rankd.serve import open_inference, openapi, operations, page, v1
from rankd.serve.repository import ModelRepository
from rankd.serve.settings import ServeConfig
from rankd.serve.traced_http import trace_of
from rankd.serve.v1 import json_response
from rankd.serve.wire import ErrorAnswer, ErrorDetail, encode

log = logging.getLogger("rankd")


def create_app(repository: ModelRepository, config: ServeConfig) -> Starlette:
    """The ASGI application over a repository, which is started and closed by whoever runs it (`lifecycle.py`)."""
    return Starlette(
        routes=[
            *v1.routes(repository, config),
            *open_inference.routes(repository, config),
            *operations.routes(repository),
            *openapi.routes(repository),
            *page.routes(repository),
        ],
        exception_handlers={
            RankdError: _rankd_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _internal_error,
        },
    )


def error_headers(error: RankdError) -> dict[str, str]:
    """Retry-After in whole seconds where the line was full."""
    return {"retry-after": str(max(math.ceil(error.retry_after_s), 1))} if isinstance(error, Overloaded) else {}


def _error(kind: str, message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return json_response(encode(ErrorAnswer(ErrorDetail(kind, message))), status, headers)


async def _rankd_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RankdError)  # noqa: S101 - registered for this class
    return _error(type(error).__name__, str(error), error.http_status, error_headers(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
    kind = {404: "NotFound", 405: "MethodNotAllowed"}.get(error.status_code, "InvalidRequest")
    message = f"{request.method} {request.url.path}: {error.detail}; GET /openapi.json lists what there is"
    return _error(kind, message, error.status_code, dict(error.headers or {}))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody is there to read it


async def _internal_error(request: Request, error: Exception) -> Response:
    trace = trace_of(request)
    traced = "" if trace is None else f" (trace {trace.shown_id})"
    log.error("%s %s failed%s", request.method, request.url.path, traced, exc_info=error)
    return _error("InternalError", "the server failed on this request; its log says why", 500)
