"""Spans for OpenTelemetry: which requests are sampled, and what they noted as spans of the SDK, sent over OTLP/HTTP.

In: `tracing.RequestTrace`s that are over. Out: batches of spans, sent by a thread of the SDK. Nothing here is waited
for: spans that a collector does not take in time are dropped, and the SDK's log says so.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping

from rankd.errors import MissingExtra
from rankd.observe.tracing import RequestTrace, SpanKind, SpanNote, TracingConfig

try:
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import IdGenerator
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, ParentBased, TraceIdRatioBased
    from opentelemetry.trace import (
        NonRecordingSpan,
        SpanContext,
        Status,
        StatusCode,
        TraceFlags,
        TraceState,
        get_current_span,
        set_span_in_context,
    )
    from opentelemetry.trace import SpanKind as OtelKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise MissingExtra("tracing.enabled", "tracing") from error

KINDS = {
    SpanKind.INTERNAL: OtelKind.INTERNAL,
    SpanKind.SERVER: OtelKind.SERVER,
    SpanKind.CLIENT: OtelKind.CLIENT,
}
LIBRARY = "rankd"
log = logging.getLogger("rankd")
SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class _NotedIds(IdGenerator):
    """Ids that were drawn when things happened: what a shard was told then has to be true when spans are made."""

    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


class ExportedTraces:
    """Traces that a collector gets. Everything is sampled or not when a request begins; spans are made when it ends."""

    def __init__(self, config: TracingConfig, service: str) -> None:
        endpoint = f"{config.endpoint.rstrip('/')}/v1/traces" if config.endpoint else None
        ratio = config.sample_ratio
        asked = TracerProvider(  # without a sampler it is as OTEL_TRACES_SAMPLER says
            None if ratio is None else ParentBased(TraceIdRatioBased(ratio)),
            _resource(config.service_name, service),
            shutdown_on_exit=False,
        )
        self._sampler = asked.sampler
        self._ids = _NotedIds()
        self._provider = TracerProvider(ALWAYS_ON, asked.resource, shutdown_on_exit=False, id_generator=self._ids)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer(LIBRARY)
        self._making = threading.Lock()  # guards the ids
        self._propagator = TraceContextTextMapPropagator()
        self._flush_seconds = config.flush_seconds

    def begin(self, name: str, headers: Mapping[str, str]) -> RequestTrace | None:
        """A request has come; see `Traces.begin`. A `traceparent` that cannot be read is as none."""
        started, caller = time.perf_counter(), None
        trace_id, parent_id = random.getrandbits(128) or 1, 0
        if "traceparent" in headers:
            caller = self._propagator.extract(headers, Context())
            given = get_current_span(caller).get_span_context()
            if given.is_valid:
                trace_id, parent_id = given.trace_id, given.span_id
        sampled = self._sampler.should_sample(caller, trace_id, name)
        if sampled.decision is not Decision.RECORD_AND_SAMPLE:
            return None
        state = "" if sampled.trace_state is None else sampled.trace_state.to_header()
        return RequestTrace(name, trace_id, started, parent_id, state)

    def end(self, trace: RequestTrace) -> None:
        """A request is over; see `Traces.end`. What goes wrong here is logged: it is nothing to who serves."""
        try:
            self._export(trace)
        except Exception:  # whatever it is
            log.exception("trace %s could not be exported", trace.shown_id)

    def close(self) -> None:
        """Send what is left. A collector that hangs is left alone after `flush_seconds`: the process may end."""
        flushing = threading.Thread(target=self._provider.shutdown, name="rankd-traces", daemon=True)
        flushing.start()
        flushing.join(self._flush_seconds)

    def _export(self, trace: RequestTrace) -> None:
        ended = time.perf_counter()
        epoch_ns = time.time_ns() - int(time.perf_counter() * 1e9)
        root = SpanNote(
            trace.name,
            trace.started,
            ended,
            trace.attributes,
            SpanKind.SERVER,
            trace.parent_id,
            trace.span_id,
            trace.error,
        )
        with self._making:
            self._ids.trace_id = trace.trace_id
            for note in (*trace.spans(ended), root):  # whoever has the root has all
                self._make(note, trace, epoch_ns)

    def _make(self, note: SpanNote, trace: RequestTrace, epoch_ns: int) -> None:
        self._ids.span_id = note.span_id
        span = self._tracer.start_span(
            note.name,
            _context(trace, note.parent_id),
            KINDS[note.kind],
            dict(note.attributes),
            start_time=epoch_ns + int(note.begin * 1e9),
        )
        if note.error:
            span.set_attribute("error.type", note.error)
            span.set_status(Status(StatusCode.ERROR, note.error))
        span.end(epoch_ns + int(note.end * 1e9))


def _context(trace: RequestTrace, parent_id: int) -> Context:
    """What a span is below; nothing where its id is 0."""
    if not parent_id:
        return Context()
    state = TraceState.from_header([trace.trace_state]) if trace.trace_state else None
    parent = SpanContext(trace.trace_id, parent_id, is_remote=True, trace_flags=SAMPLED, trace_state=state)
    return set_span_in_context(NonRecordingSpan(parent), Context())


def _resource(configured: str, otherwise: str) -> Resource:
    """Who sends: a service named as configured, else as the environment says, else `otherwise`."""
    given = OTELResourceDetector().detect().attributes.get(SERVICE_NAME)
    return Resource.create({SERVICE_NAME: configured or given or otherwise})
