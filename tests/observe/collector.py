"""A collector of traces: OTLP/HTTP on a free port, with the messages that OpenTelemetry publishes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from rankd.observe.tracing import TracingConfig

MS = 1e6


@dataclass(frozen=True)
class Span:
    """As it came; times in nanoseconds since 1970."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    begin: int
    end: int
    attributes: dict[str, Any]
    failed: bool
    trace_state: str


@dataclass
class Collector:
    """What has come so far. `answer` is called for each batch, before it is taken; its result is the status."""

    url: str
    spans: list[Span] = field(default_factory=list)
    batches: int = 0
    answer: Callable[[], int] = lambda: 200

    def of(self, trace_id: str) -> dict[str, Span]:
        """The spans of a trace by their ids."""
        return {span.span_id: span for span in self.spans if span.trace_id == trace_id}

    def named(self, name: str) -> list[Span]:
        """All spans of a name, in the order of their beginnings."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.begin)

    def config(self, **more: Any) -> TracingConfig:
        """Of a process that sends here."""
        return TracingConfig(enabled=True, endpoint=self.url, **more)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.batches += 1
            status = collector.answer()
            if status == 200 and self.path == "/v1/traces":
                collector.spans += _spans(ExportTraceServiceRequest.FromString(body))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _spans(request: Any) -> list[Span]:
    return [
        Span(
            _attributes(resource.resource)["service.name"],
            span.name,
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.kind,
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            _attributes(span),
            span.status.code == 2,
            span.trace_state,
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _attributes(message: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in message.attributes}
