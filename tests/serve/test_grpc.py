"""gRPC: an unmodified Triton client, rankd's own service, deadlines, cancellation, and what errors become."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from rankd import RankRequest
from rankd.engine.backend import EngineConfig
from rankd.errors import ConfigError
from rankd.schedule.schedule_config import ScheduleConfig
from rankd.serve import messages
from rankd.serve.grpc_server import RANKING
from rankd.serve.lifecycle import Server
from rankd.serve.settings import ServeConfig
from tests.features.stores.redis_server import eventually


@pytest.fixture(scope="module")
def server(demo_models: Path) -> Iterator[Server]:
    with Server(demo_models, ServeConfig(port=0, engine=EngineConfig(executors=1))) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with triton.InferenceServerClient(server.grpc_address) as opened:
        yield opened


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_address) as opened:
        yield opened


def method(channel: grpc.Channel, service: str, name: str) -> Any:
    asked, given, _ = messages.methods(service)[name]
    return channel.unary_unary(
        f"/{service}/{name}", request_serializer=asked.SerializeToString, response_deserializer=given.FromString
    )


def text_input(name: str, *texts: str) -> Any:
    one = triton.InferInput(name, [len(texts)], "BYTES")
    one.set_data_from_numpy(np.asarray([text.encode() for text in texts], object))
    return one


def slow(server: Server, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Requests of user "slow" wait on their executor; (they have begun, let them go on)."""
    begun, gate = threading.Event(), threading.Event()
    path = server.repository.get().path
    prepare = path.prepare

    def waiting(item: Any, executor: Any, alone: bool, wide: bool) -> Any:
        if item.request.user_id == "slow":
            begun.set()
            gate.wait(20)
        return prepare(item, executor, alone, wide)

    monkeypatch.setattr(path, "prepare", waiting)
    return begun, gate


def test_the_descriptors_are_those_of_the_proto_files() -> None:
    assert messages.compiled() == (messages.FOLDER / messages.DESCRIPTORS).read_bytes()


def test_an_unmodified_client_finds_its_way(server: Server, client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("demo")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata().name == "rankd"
    metadata = client.get_model_metadata("demo")
    assert [one.name for one in metadata.outputs] == ["scores", "candidates", "unknown"]
    assert client.get_model_config("demo").config.input[0].name == "user_id"
    assert [(one.name, one.state) for one in client.get_model_repository_index().models] == [("demo", "READY")]
    before = client.get_inference_statistics("demo").model_stats[0].inference_count
    client.infer("demo", [text_input("user_id", "u"), text_input("candidates", "a")])
    assert client.get_inference_statistics("demo").model_stats[0].inference_count == before + 1


def test_scores_are_those_of_the_ranker(server: Server, client: Any) -> None:
    ranker = server.repository.get()
    users, items = ranker.catalogue.ids.users, ranker.catalogue.ids.items[:50]
    for user in (*users[:3], "nobody"):
        answer = client.infer(
            "demo",
            [text_input("user_id", user), text_input("candidates", *items, "unheard of")],
            request_id="r-1",
            parameters={"top_k": 7},
        )
        expected = ranker.rank(RankRequest(user, (*items, "unheard of"), top_k=7))
        np.testing.assert_allclose(answer.as_numpy("scores"), expected.scores, atol=1e-5)
        assert [one.decode() for one in answer.as_numpy("candidates")] == list(expected.candidates)
        assert answer.as_numpy("unknown").tolist() == [one in expected.unknown for one in expected.candidates]
        assert answer.get_response().id == "r-1"


def test_tensors_in_contents_and_streams(server: Server, client: Any, channel: grpc.Channel) -> None:
    ranker = server.repository.get()
    items = ranker.catalogue.ids.items[:5]
    request = messages.message("inference.ModelInferRequest")(model_name="demo")
    for name, values in (("user_id", ["u"]), ("candidates", items)):
        one = request.inputs.add(name=name, datatype="BYTES", shape=[len(values)])
        one.contents.bytes_contents.extend(value.encode() for value in values)
    one = request.inputs.add(name="time", datatype="INT64", shape=[1])
    one.contents.int64_contents.append(ranker.schema.log_end)
    response = method(channel, "inference.GRPCInferenceService", "ModelInfer")(request)
    expected = ranker.rank(RankRequest("u", items, time=ranker.schema.log_end)).scores
    scores = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(expected.shape)
    np.testing.assert_allclose(scores, expected, atol=1e-5)

    answers: Queue[tuple[Any, Any]] = Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("demo", [text_input("user_id", "u"), text_input("candidates", *items)])
    client.async_stream_infer("demo", [text_input("user_id", "u"), text_input("candidates")])
    client.async_stream_infer("demo", [text_input("user_id", "u"), text_input("candidates", *items)])
    found = [answers.get(timeout=20) for _ in range(3)]
    client.stop_stream()
    assert [error is None for _, error in found] == [True, False, True]
    assert "candidates is empty" in str(found[1][1])


@pytest.mark.parametrize(
    ("inputs", "model", "code", "words"),
    [
        (("user_id",), "demo", "INVALID_ARGUMENT", "input 'candidates' is missing"),
        (("user_id", "candidates", "size"), "demo", "INVALID_ARGUMENT", "unknown input 'size'"),
        (("user_id", "candidates"), "dema", "NOT_FOUND", "Did you mean 'demo'"),
    ],
)
def test_errors_keep_their_words(client: Any, inputs: tuple[str, ...], model: str, code: str, words: str) -> None:
    with pytest.raises(InferenceServerException, match=words) as raised:
        client.infer(model, [text_input(name, "x") for name in inputs])
    assert raised.value.status() == f"StatusCode.{code}"


def test_broken_tensors_are_refused_by_name(channel: grpc.Channel) -> None:
    infer = method(channel, "inference.GRPCInferenceService", "ModelInfer")
    kind = messages.message("inference.ModelInferRequest")
    for shape, raw, words in (
        ([2], b"\x01\x00\x00\x00a", "has shape"),
        ([-1], b"", "negative"),
        ([1], b"\xff", "ends"),
    ):
        request = kind(model_name="demo", raw_input_contents=[raw])
        request.inputs.add(name="candidates", datatype="BYTES", shape=shape)
        with pytest.raises(grpc.RpcError) as raised:
            infer(request)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in str(raised.value.details())
    untyped: Any = channel.unary_unary("/inference.GRPCInferenceService/TraceSetting")
    with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
        untyped(b"")


def test_the_rank_method_says_all_that_http_says(server: Server, channel: grpc.Channel) -> None:
    ranker = server.repository.get()
    items, user = ranker.catalogue.ids.items[:12], ranker.catalogue.ids.users[4]
    kind = messages.message("rankd.v1.RankRequest")
    rank = method(channel, "rankd.v1.Ranking", "Rank")
    answer = rank(kind(user_id=user, candidates=[*items, "new"], top_k=5, request_id="mine", priority="batch"))
    expected = ranker.rank(RankRequest(user, (*items, "new"), top_k=5))
    assert list(answer.candidates) == list(expected.candidates)
    assert list(answer.tasks) == list(expected.tasks)
    scores = np.frombuffer(answer.scores, "<f4").reshape(expected.scores.shape)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
    assert (answer.request_id, answer.model, answer.state) == ("mine", "demo", "encoded")
    assert set(answer.timings_ms) >= {"queue", "score", "total"}
    append = method(channel, "rankd.v1.Ranking", "AppendEvents")
    events = messages.message("rankd.v1.AppendEventsRequest")(user_id="grpc newcomer")
    events.events.add(item_id=items[0])
    assert append(events).confirmed_by == "store"
    with_history = kind(user_id="x", candidates=items)
    with_history.history.events.add(item_id=items[0])
    assert not rank(with_history).unknown_user
    with_history.history.ClearField("events")
    inline = rank(with_history)
    assert not inline.unknown_user
    with pytest.raises(grpc.RpcError, match="priority is 'now'"):
        rank(kind(user_id=user, candidates=items, priority="now"))


def test_the_deadline_of_an_rpc_is_the_requests(
    server: Server, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = slow(server, monkeypatch)
    kind, rank = messages.message("rankd.v1.RankRequest"), method(channel, "rankd.v1.Ranking", "Rank")
    schedule = server.repository.get().schedule
    late = schedule.figures().counts.late
    try:
        blocked = rank.future(kind(user_id="slow", candidates=["a"]))
        assert begun.wait(20)
        with pytest.raises(grpc.RpcError) as raised:
            rank(kind(user_id="u", candidates=["a"]), timeout=0.3)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: schedule.figures().counts.late == late + 1, "it has left the schedule")
        with pytest.raises(grpc.RpcError) as raised:
            rank(kind(user_id="u", candidates=["a"], timeout_ms=200.0))
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "timeout_ms passed" in str(raised.value.details())
    finally:
        gate.set()
    assert blocked.result(20).candidates == ["a"]


def test_a_cancelled_rpc_leaves_the_schedule(
    server: Server, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = slow(server, monkeypatch)
    kind, rank = messages.message("rankd.v1.RankRequest"), method(channel, "rankd.v1.Ranking", "Rank")
    schedule = server.repository.get().schedule
    try:
        blocked = rank.future(kind(user_id="slow", candidates=["a"]))
        assert begun.wait(20)
        waiting = [rank.future(kind(user_id=f"u{number}", candidates=["a"])) for number in range(10)]
        eventually(lambda: schedule.unfinished == 11, "all of them wait")
        for one in waiting:
            one.cancel()
        eventually(lambda: schedule.unfinished == 1, "they have left")
    finally:
        gate.set()
    assert blocked.result(20).candidates == ["a"]


def test_an_overloaded_server_says_when_to_come_back(demo_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServeConfig(port=0, engine=EngineConfig(executors=1), schedule=ScheduleConfig(max_waiting_candidates=3))
    kind = messages.message("rankd.v1.RankRequest")
    with Server(demo_models, config) as server, grpc.insecure_channel(server.grpc_address) as channel:
        begun, gate = slow(server, monkeypatch)
        rank = method(channel, "rankd.v1.Ranking", "Rank")
        try:
            blocked = rank.future(kind(user_id="slow", candidates=["a"]))
            assert begun.wait(20)
            waits = rank.future(kind(user_id="v", candidates=["a", "b", "c"]))
            eventually(lambda: server.repository.get().schedule.unfinished == 2, "it waits")
            started = time.perf_counter()
            with pytest.raises(grpc.RpcError) as raised:
                rank(kind(user_id="u", candidates=["a"]))
            assert time.perf_counter() - started < 5.0
        finally:
            gate.set()
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        metadata: Any = raised.value.trailing_metadata()
        assert int(dict(metadata)["retry-after-ms"]) >= 1
        assert (len(blocked.result(20).candidates), len(waits.result(20).candidates)) == (1, 3)


def test_closing_finishes_what_was_accepted(demo_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(demo_models, ServeConfig(port=0, engine=EngineConfig(executors=1)))
    server.start()
    kind = messages.message("rankd.v1.RankRequest")
    with grpc.insecure_channel(server.grpc_address) as channel:
        begun, gate = slow(server, monkeypatch)
        rank = method(channel, "rankd.v1.Ranking", "Rank")
        accepted = rank.future(kind(user_id="slow", candidates=["a"]))
        assert begun.wait(20)
        closing = threading.Thread(target=server.close)
        closing.start()
        time.sleep(0.1)
        gate.set()
        assert accepted.result(20).candidates == ["a"]
        closing.join(30)
    assert not closing.is_alive()


def test_ports(demo_models: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="for gRPC"):
            Server(demo_models, ServeConfig(port=0, grpc_port=port)).listen()
    without = Server(demo_models, ServeConfig(port=0, grpc=False))
    without.listen()
    with pytest.raises(ConfigError, match="without gRPC"):
        _ = without.grpc_address
    without.close()


def test_readiness_is_answered_however_many_wait(
    server: Server, channel: grpc.Channel, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, gate = slow(server, monkeypatch)
    kind, rank = messages.message("rankd.v1.RankRequest"), method(channel, "rankd.v1.Ranking", "Rank")
    request = kind(user_id="slow", candidates=["a"])
    waiting = [rank.future(request, timeout=60) for _ in range(RANKING)]
    ranker = server.repository.get()
    eventually(lambda: ranker.schedule.unfinished == RANKING, "all wait")
    assert client.is_server_ready()
    with pytest.raises(grpc.RpcError, match="RPCs are waiting") as refused:
        rank(request, timeout=60)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    gate.set()
    assert all(len(one.result().scores) for one in waiting)
    assert rank(request, timeout=60).scores
