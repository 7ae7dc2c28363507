"""Traces over HTTP: around the application, and only where tracing is on. A request's trace begins with its first byte
and ends when the last byte of its answer has been handed to the socket; then its spans are made.

Traced are POSTs that rank or append events. The answer, an error's too, says its trace's id (`x-trace-id`).
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rankd.observe.tracing import TRACE_HEADER, RequestTrace, Traces

KEY = "rankd.trace"
"""Where a request's scope has its trace."""


def trace_of(request: Request) -> RequestTrace | None:
    """The trace of a request, if it is traced."""
    trace: RequestTrace | None = request.scope.get(KEY)
    return trace


class TracedHttp:
    """An ASGI application around another one."""

    def __init__(self, application: ASGIApp, traces: Traces) -> None:
        self._application, self._traces = application, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        route = _route(scope)
        trace = self._traces.begin(route, _headers(scope)) if route else None
        if trace is None:
            await self._application(scope, receive, send)
            return
        scope[KEY] = trace
        trace.attributes |= {"http.request.method": "POST", "http.route": route.partition(" ")[2]}

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.attributes["http.response.status_code"] = message["status"]
                message["headers"] = [*message["headers"], (TRACE_HEADER.encode(), trace.shown_id.encode())]
            await send(message)

        try:
            await self._application(scope, receive, noting)
        finally:
            self._traces.end(trace)


def _route(scope: Scope) -> str:
    """What a request is named in traces; nothing if it is not traced. A name has no part of the caller's making."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return ""
    path: str = scope["path"]
    if path in ("/v1/rank", "/v1/events"):
        return f"POST {path}"
    if path.startswith("/v2/models/") and path.endswith("/infer"):
        versions = "/versions/{version}" if "/versions/" in path else ""
        return f"POST /v2/models/{{model}}{versions}/infer"
    return ""


def _headers(scope: Scope) -> dict[str, str]:
    """What says who has called: `traceparent` and `tracestate`, if they are there."""
    wanted = (b"traceparent", b"tracestate")
    return {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in wanted}
