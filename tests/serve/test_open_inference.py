"""The Open Inference Protocol with a client that others wrote: tritonclient, unmodified."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from rankd import Event, Ranker, RankRequest
from rankd.serve.lifecycle import Server


@pytest.fixture
def connection(server: Server) -> Iterator[Any]:
    made = triton.InferenceServerClient(server.url.removeprefix("http://"))
    yield made
    made.close()


def texts(name: str, values: tuple[str, ...], binary: bool = True) -> Any:
    made = triton.InferInput(name, [len(values)], "BYTES")
    made.set_data_from_numpy(np.asarray([value.encode() for value in values], np.object_), binary_data=binary)
    return made


def numbers(name: str, values: list[int]) -> Any:
    made = triton.InferInput(name, [len(values)], "INT64")
    made.set_data_from_numpy(np.asarray(values, np.int64))
    return made


def test_server_and_model_metadata(connection: Any) -> None:
    assert connection.is_server_live()
    assert connection.is_server_ready()
    assert connection.is_model_ready("demo")
    assert connection.is_model_ready("demo", "1")
    assert not connection.is_model_ready("other")
    assert connection.get_server_metadata()["name"] == "rankd"
    metadata = connection.get_model_metadata("demo")
    assert metadata["versions"] == ["1"]
    assert [one["name"] for one in metadata["outputs"]] == ["scores", "candidates", "unknown"]
    assert connection.get_model_config("demo")["max_batch_size"] == 0
    assert connection.get_model_repository_index() == [{"name": "demo", "version": "1", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_scores_equal_in_process_scores(
    connection: Any, demo_ranker: Ranker, binary: bool, compression: str | None
) -> None:
    user, items = demo_ranker.catalogue.ids.users[0], demo_ranker.catalogue.ids.items[:40]
    result = connection.infer(
        "demo",
        [texts("user_id", (user,), binary), texts("candidates", (*items, "what?"), binary)],
        outputs=[triton.InferRequestedOutput(n, binary_data=binary) for n in ("scores", "unknown", "candidates")],
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
        request_id="r1",
    )
    expected = demo_ranker.rank(RankRequest(user, (*items, "what?")))
    np.testing.assert_allclose(result.as_numpy("scores"), expected.scores, atol=1e-6)
    assert result.as_numpy("unknown").tolist() == [False] * 40 + [True]
    returned = result.as_numpy("candidates").tolist()
    assert [one.decode() if isinstance(one, bytes) else one for one in returned] == [*items, "what?"]
    assert result.get_response()["id"] == "r1"


def test_inline_history_time_and_top_k(connection: Any, demo_ranker: Ranker) -> None:
    items = demo_ranker.catalogue.ids.items
    now = demo_ranker.schema.log_end
    result = connection.infer(
        "demo",
        [
            texts("user_id", ("u",)),
            texts("candidates", items[:12]),
            texts("history_item", items[3:5]),
            texts("history_event", ("like", "click")),
            numbers("history_time", [now - 50, now - 20]),
            numbers("time", [now]),
        ],
        parameters={"top_k": 4},
    )
    history = (Event(items[3], "like", now - 50), Event(items[4], "click", now - 20))
    expected = demo_ranker.rank(RankRequest("u", items[:12], history=history, time=now, top_k=4))
    np.testing.assert_allclose(result.as_numpy("scores"), expected.scores, atol=1e-6)
    assert [one.decode() for one in result.as_numpy("candidates")] == list(expected.candidates)


def test_statistics_count(connection: Any, demo_ranker: Ranker) -> None:
    def success() -> dict[str, int]:
        found: dict[str, int] = connection.get_inference_statistics("demo")["model_stats"][0]["inference_stats"][
            "success"
        ]
        return found

    before = success()
    connection.infer("demo", [texts("user_id", ("u",)), texts("candidates", demo_ranker.catalogue.ids.items[:3])])
    after = success()
    assert after["count"] == before["count"] + 1
    assert after["ns"] > before["ns"]


def test_unload_and_load(connection: Any, demo_ranker: Ranker) -> None:
    inputs = [texts("user_id", ("u",)), texts("candidates", demo_ranker.catalogue.ids.items[:3])]
    connection.unload_model("demo")
    with pytest.raises(InferenceServerException, match="no version that is ready"):
        connection.infer("demo", inputs)
    connection.load_model("demo")
    assert connection.infer("demo", inputs).as_numpy("scores").shape == (3, 2)
    with pytest.raises(InferenceServerException, match="no model 'else'"):
        connection.load_model("else")


USER = {"name": "user_id", "datatype": "BYTES", "shape": [1], "data": ["u"]}
CANDIDATES = {"name": "candidates", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}


def infer(server: Server, body: bytes | dict[str, Any], **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + "/v2/models/demo/infer", content=content, headers=headers)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": [USER]}, "'candidates' is missing"),
        ({"inputs": [CANDIDATES]}, "'user_id' is missing"),
        ({"inputs": [USER, CANDIDATES, {**USER, "name": "usr"}]}, "unknown input 'usr'"),
        ({"inputs": [{**USER, "shape": [2], "data": ["u", "v"]}, CANDIDATES]}, "one user a request"),
        ({"inputs": [USER, {**CANDIDATES, "datatype": "FP32", "data": [1, 2]}]}, "BYTES or INT64"),
        ({"inputs": [USER, {**CANDIDATES, "shape": [0], "data": []}]}, "candidates is empty"),
        ({"inputs": [USER, CANDIDATES], "outputs": [{"name": "logits"}]}, "unknown output 'logits'"),
        (
            {"inputs": [USER, CANDIDATES], "outputs": [{"name": "scores", "parameters": {"classification": 3}}]},
            "'classification' is not offered",
        ),
        ({"inputs": [USER, CANDIDATES], "parameters": {"top_k": "3"}}, "top_k is '3'"),
        ({"inputs": [USER, CANDIDATES], "parameters": {"top_k": 1.5}}, "whole number"),
        ({"inputs": [USER, CANDIDATES], "parameters": {"timeout_ms": -1}}, "above 0"),
        (b"nonsense", "not valid JSON"),
    ],
)
def test_bad_requests_are_refused_in_the_protocols_words(server: Server, body: bytes, words: str) -> None:
    response = infer(server, body)
    assert response.status_code == 400
    assert words in response.json()["error"]


def test_compressed_bodies_that_lie(server: Server) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) < 100_000
    assert infer(server, bomb, **{"content-encoding": "gzip"}).status_code == 413
    assert infer(server, b"no gzip", **{"content-encoding": "gzip"}).status_code == 400
    cut = gzip.compress(json.dumps({"inputs": [USER, CANDIDATES]}).encode())[:-9]
    assert "is cut" in infer(server, cut, **{"content-encoding": "gzip"}).json()["error"]
    assert infer(server, b"x", **{"content-encoding": "br"}).status_code == 415


def test_unknown_models_and_versions_are_not_found(server: Server) -> None:
    for path in ("nope", "nope/ready", "demo/versions/7", "demo/versions/7/stats", "nope/config"):
        response = httpx.get(f"{server.url}/v2/models/{path}")
        assert response.status_code == 404
        assert isinstance(response.json()["error"], str)
