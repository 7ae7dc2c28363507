"""Traces of real requests: over HTTP and gRPC, of errors, with collectors that hang, and on a stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from rankd.engine.backend import EngineConfig
from rankd.observe.tracing import TRACE_HEADER
from rankd.serve import messages
from rankd.serve.lifecycle import Server
from rankd.serve.settings import ServeConfig
from tests.features.stores.redis_server import eventually
from tests.observe.collector import Collector, Span, collecting
from tests.serve.test_rough_clients import rankd_serve

ENGINE = EngineConfig(executors=1)
RANK = {"user_id": "user-0004", "candidates": [f"film-{number:04}" for number in range(1, 41)]}
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = f"00-{TRACE}-{SPAN}-01"
SERVER_KIND = 2


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield running


@pytest.fixture(scope="module")
def server(demo_models: Path, collector: Collector) -> Iterator[Server]:
    config = ServeConfig(port=0, engine=ENGINE, tracing=collector.config(sample_ratio=1.0))
    with Server(demo_models, config) as running:
        yield running


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_address) as opened:
        yield opened


def root_of(collector: Collector, trace_id: str, parent: str = "") -> Span:
    """A request's own span, by what called it, when it has come."""

    def root() -> Span | None:
        return next((span for span in collector.of(trace_id).values() if span.parent_id == parent), None)

    found: Span = eventually(root, "the trace has come")
    return found


def spans_of(collector: Collector, trace_id: str, parent: str = "") -> tuple[Span, list[Span]]:
    """It, and the spans below it, which come before it."""
    root = root_of(collector, trace_id, parent)
    return root, [span for span in collector.of(trace_id).values() if span is not root]


def check_stages(root: Span, below: list[Span], timings_ms: dict[str, float], rows: int) -> None:
    """Stages are below the request and are as long as its answer says; calls of the engine are below the scoring."""
    stages = [span for span in below if span.parent_id == root.span_id]
    assert {span.name for span in stages} >= {"read", "queue", "features", "score", "order", "write"}
    for stage, ms in timings_ms.items():
        if stage != "total":
            spent = sum(span.end - span.begin for span in stages if span.name == stage)
            assert spent / 1e6 == pytest.approx(ms, abs=0.01), stage
    assert min(span.begin for span in stages) == root.begin
    assert max(span.end for span in stages) <= root.end
    calls = [span for span in below if span.name == "score call"]
    scoring = next(span for span in stages if span.name == "score")
    assert {span.parent_id for span in calls} == {scoring.span_id}
    assert sum(span.attributes["rankd.rows"] for span in calls) == rows
    for span in calls:
        assert span.attributes["rankd.bucket"] >= span.attributes["rankd.rows"]
        assert span.attributes["rankd.executor"] == "demo-executor-0"


def test_a_request_over_http_is_a_tree_of_its_stages(server: Server, collector: Collector) -> None:
    request = {**RANK, "request_id": "mine"}
    answer = httpx.post(f"{server.url}/v1/rank", json=request, headers={"traceparent": CALLER})
    assert answer.headers[TRACE_HEADER] == TRACE
    root, below = spans_of(collector, TRACE, SPAN)
    assert (root.name, root.kind, root.failed) == ("POST /v1/rank", SERVER_KIND, False)
    assert root.attributes["http.response.status_code"] == 200
    assert (root.attributes["rankd.model"], root.attributes["rankd.candidates"]) == ("demo", 40)
    assert root.attributes["rankd.request_id"] == "mine"
    assert root.attributes["rankd.state"] == answer.json()["state"]
    check_stages(root, below, answer.json()["timings_ms"], 40)


def test_the_open_inference_protocol_is_traced_too(server: Server, collector: Collector) -> None:
    body = {
        "inputs": [
            {"name": "user_id", "datatype": "BYTES", "shape": [1], "data": ["user-0004"]},
            {"name": "candidates", "datatype": "BYTES", "shape": [2], "data": ["film-0001", "film-0002"]},
        ]
    }
    answer = httpx.post(f"{server.url}/v2/models/demo/infer", json=body)
    root, below = spans_of(collector, answer.headers[TRACE_HEADER])
    assert root.name == "POST /v2/models/{model}/infer"
    assert [span.attributes["rankd.rows"] for span in below if span.name == "score call"] == [2]


def test_who_declines_is_not_traced(server: Server, collector: Collector) -> None:
    declined = "2" * 32
    answer = httpx.post(f"{server.url}/v1/rank", json=RANK, headers={"traceparent": f"00-{declined}-{SPAN}-00"})
    assert answer.status_code == 200
    assert TRACE_HEADER not in answer.headers
    spans_of(collector, httpx.post(f"{server.url}/v1/rank", json=RANK).headers[TRACE_HEADER])
    assert collector.of(declined) == {}


def test_what_is_no_request_is_not_traced(server: Server) -> None:
    for path in ("/health/ready", "/metrics", "/v1/models"):
        assert TRACE_HEADER not in httpx.get(f"{server.url}{path}").headers


def test_errors_are_traced_and_say_their_trace(server: Server, collector: Collector) -> None:
    bad = httpx.post(f"{server.url}/v1/rank", content=b"{", headers={"traceparent": "00-nonsense"})
    late = httpx.post(f"{server.url}/v1/rank", json={**RANK, "timeout_ms": 1e-6})
    assert (bad.status_code, late.status_code) == (400, 504)
    mended, failed = (root_of(collector, answer.headers[TRACE_HEADER]) for answer in (bad, late))
    assert (mended.failed, mended.attributes["http.response.status_code"]) == (False, 400)
    assert (failed.failed, failed.attributes["error.type"]) == (True, "DeadlineExceeded")
    assert failed.attributes["http.response.status_code"] == 504


def test_the_log_names_the_trace_of_what_failed(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(type(server.repository.get()), "submit", broken)
    with caplog.at_level(logging.ERROR, "rankd"):
        answer = httpx.post(f"{server.url}/v1/rank", json=RANK)
        assert answer.status_code == 500
        assert f"(trace {answer.headers[TRACE_HEADER]})" in caplog.text
        with grpc.insecure_channel(server.grpc_address) as channel, pytest.raises(grpc.RpcError) as caught:
            rpc(channel, "rankd.v1.Ranking", "Rank")(rank_message())
        assert f"an RPC failed (trace {trailing(caught.value)})" in caplog.text


def rpc(channel: grpc.Channel, service: str, name: str) -> Any:
    asked, given, _ = messages.methods(service)[name]
    return channel.unary_unary(f"/{service}/{name}", asked.SerializeToString, given.FromString)


def rank_message(**more: Any) -> Any:
    return messages.message("rankd.v1.RankRequest")(user_id=RANK["user_id"], candidates=RANK["candidates"], **more)


def trailing(call: Any) -> str:
    return str(dict(call.trailing_metadata())[TRACE_HEADER])


def test_a_request_over_grpc_is_a_tree_of_its_stages(channel: grpc.Channel, collector: Collector) -> None:
    trace_id = "1" * 32
    caller = (("traceparent", f"00-{trace_id}-{SPAN}-01"),)
    answer, call = rpc(channel, "rankd.v1.Ranking", "Rank").with_call(rank_message(), metadata=caller)
    assert trailing(call) == trace_id
    root, below = spans_of(collector, trace_id, SPAN)
    assert (root.name, root.attributes["rpc.grpc.status_code"]) == ("rankd.v1.Ranking/Rank", 0)
    check_stages(root, below, dict(answer.timings_ms), 40)


def test_an_rpc_that_fails_is_traced(channel: grpc.Channel, collector: Collector) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        rpc(channel, "rankd.v1.Ranking", "Rank")(rank_message(model="no such"))
    root = root_of(collector, trailing(caught.value))
    assert (root.failed, root.attributes["rpc.grpc.status_code"]) == (False, 5)


def test_each_request_of_a_stream_has_a_trace(channel: grpc.Channel, collector: Collector) -> None:
    service, name = "inference.GRPCInferenceService", "ModelStreamInfer"
    asked, given, _ = messages.methods(service)[name]
    request = asked(model_name="demo")
    for tensor, texts in (("user_id", [b"user-0004"]), ("candidates", [b"film-0001", b"film-0002"])):
        one = request.inputs.add(name=tensor, datatype="BYTES", shape=[len(texts)])
        one.contents.bytes_contents.extend(texts)
    stream = channel.stream_stream(f"/{service}/{name}", asked.SerializeToString, given.FromString)
    assert [bool(one.error_message) for one in stream(iter([request, request]))] == [False, False]
    roots = eventually(lambda: len(found := collector.named(f"{service}/{name}")) == 2 and found, "both have come")
    assert len({span.trace_id for span in roots}) == 2


def test_requests_do_not_wait_for_a_collector(demo_models: Path) -> None:
    """The first batch is never answered; requests are, and the server ends."""
    go_on = threading.Event()
    with collecting() as hanging:
        hanging.answer = lambda: 200 if go_on.wait(60) else 500
        config = hanging.config(sample_ratio=1.0, flush_seconds=0.2)
        try:
            with Server(demo_models, ServeConfig(port=0, grpc=False, engine=ENGINE, tracing=config)) as running:
                for _ in range(80):  # a thousand spans: more than a batch
                    assert httpx.post(f"{running.url}/v1/rank", json=RANK).status_code == 200
                eventually(lambda: hanging.batches, "a batch was sent")
            assert hanging.spans == []
        finally:
            go_on.set()


def test_a_server_that_is_told_to_stop_sends_its_spans(
    demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as own:
        monkeypatch.setenv("RANKD_TRACING__ENABLED", "true")
        monkeypatch.setenv("RANKD_TRACING__ENDPOINT", own.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")  # nothing is sent before the stop
        with rankd_serve(demo_models, tmp_path) as running:
            asked = {httpx.post(f"{running.url}/v1/rank", json=RANK).headers[TRACE_HEADER] for _ in range(3)}
            assert own.spans == []
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(20) == 0
        assert {span.trace_id for span in own.spans} == asked
        assert {span.service for span in own.spans} == {"rankd"}
