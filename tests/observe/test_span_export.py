"""Sampling, callers' decisions, and collectors that refuse or hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from rankd.observe.span_export import ExportedTraces
from rankd.observe.tracing import RequestTrace, SpanNote, TracingConfig
from tests.observe.collector import Collector, collecting

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = f"00-{TRACE}-{SPAN}-01"
DECLINED = f"00-{TRACE}-{SPAN}-00"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


def opened(config: TracingConfig) -> ExportedTraces:
    return ExportedTraces(config, "tested")


def test_a_request_is_one_tree_of_one_service(collector: Collector) -> None:
    traces = opened(collector.config())
    before = time.time_ns()
    trace = traces.begin("rank", {})
    assert trace is not None
    now = time.perf_counter()
    child = SpanNote("look-up", now, now + 0.25)
    trace.notes += [child, SpanNote("call", now, now + 0.125, {"rankd.rows": 3}, parent_id=child.span_id)]
    trace.error = "Unavailable"
    traces.end(trace)
    traces.close()
    spans = {span.name: span for span in collector.of(trace.shown_id).values()}
    assert sorted(spans) == ["call", "look-up", "rank"]
    root, look_up, call = spans["rank"], spans["look-up"], spans["call"]
    assert (root.parent_id, look_up.parent_id, call.parent_id) == ("", root.span_id, look_up.span_id)
    assert {span.service for span in spans.values()} == {"tested"}
    assert (root.failed, root.attributes["error.type"], call.failed) == (True, "Unavailable", False)
    assert call.attributes["rankd.rows"] == 3
    assert look_up.end - look_up.begin == pytest.approx(0.25e9, abs=1000)
    assert before <= root.begin <= root.end <= time.time_ns()


def test_a_callers_trace_goes_on(collector: Collector) -> None:
    traces = opened(collector.config(sample_ratio=0.0))
    trace = traces.begin("rank", {"traceparent": CALLER, "tracestate": "vendor=1"})
    assert trace is not None
    traces.end(trace)
    traces.close()
    (span,) = collector.spans
    assert (span.trace_id, span.parent_id, span.trace_state) == (TRACE, SPAN, "vendor=1")


@pytest.mark.parametrize("header", [None, DECLINED])
def test_who_is_not_sampled_has_no_trace(collector: Collector, header: str | None) -> None:
    ratio = 0.0 if header is None else 1.0
    traces = opened(collector.config(sample_ratio=ratio))
    assert traces.begin("rank", {} if header is None else {"traceparent": header}) is None
    traces.close()
    assert collector.spans == []


@pytest.mark.parametrize(
    "header",
    [
        "",
        "x",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        "00-" + "é" * 32 + f"-{SPAN}-01",
        "0" * 10_000,
    ],
)
def test_a_malformed_traceparent_is_as_none(collector: Collector, header: str) -> None:
    traces = opened(collector.config(sample_ratio=1.0))
    trace = traces.begin("rank", {"traceparent": header})
    traces.close()
    assert trace is not None
    assert trace.shown_id != TRACE
    assert (trace.parent_id, len(trace.shown_id)) == (0, 32)


def test_about_the_share_that_was_asked_for_is_sampled(collector: Collector) -> None:
    traces = opened(collector.config(sample_ratio=0.25))
    sampled = sum(traces.begin("rank", {}) is not None for _ in range(4000))
    traces.close()
    assert 800 < sampled < 1200  # seven standard deviations


def test_the_environment_decides_what_is_left_out(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    never = opened(TracingConfig(enabled=True))
    assert never.begin("rank", {"traceparent": CALLER}) is None
    never.close()
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "from the environment")
    traces = opened(TracingConfig(enabled=True))
    end_one(traces)
    traces.close()
    assert [span.service for span in collector.spans] == ["from the environment"]
    named = opened(TracingConfig(enabled=True, service_name="configured"))
    end_one(named)
    named.close()
    assert collector.spans[-1].service == "configured"


def end_many(traces: ExportedTraces, count: int) -> list[RequestTrace]:
    return [end_one(traces) for _ in range(count)]


def end_one(traces: ExportedTraces) -> RequestTrace:
    trace = traces.begin("rank", {})
    assert trace is not None
    traces.end(trace)
    return trace


def test_a_collector_that_hangs_stops_nobody(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests than the SDK keeps: the oldest spans are dropped, and nobody waits, on the end neither."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16")
    go_on = threading.Event()
    collector.answer = lambda: 200 if go_on.wait(60) else 500
    traces = opened(collector.config(flush_seconds=0.2))
    try:
        end_many(traces, 500)
        assert collector.spans == []
        began = time.perf_counter()
        traces.close()
        assert time.perf_counter() - began < 5.0
        assert collector.batches == 1
    finally:
        go_on.set()


def test_a_collector_that_refuses_stops_nobody(collector: Collector) -> None:
    collector.answer = lambda: 400
    traces = opened(collector.config(flush_seconds=5.0))
    end_many(traces, 3)
    traces.close()
    assert (collector.batches, collector.spans) == (1, [])


def test_no_collector_at_all_stops_nobody() -> None:
    traces = opened(TracingConfig(enabled=True, endpoint="http://127.0.0.1:9", flush_seconds=0.2))
    end_many(traces, 3)
    began = time.perf_counter()
    traces.close()
    assert time.perf_counter() - began < 5.0


def test_closing_sends_what_is_left(collector: Collector) -> None:
    traces = opened(collector.config())
    ended = end_many(traces, 40)
    traces.close()
    assert {span.trace_id for span in collector.spans} == {trace.shown_id for trace in ended}
