"""The /v1 API over real sockets: what it answers, and every way in which it refuses."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from rankd import Client, Event, Ranker, RankRequest
from rankd.serve.lifecycle import Server
from rankd.serve.repository import ModelState, ModelStatus


def post(server: Server, path: str, body: bytes | dict[str, Any], **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + path, content=content, headers={"content-type": "application/json", **headers})


@pytest.fixture
def items(server: Server) -> tuple[str, ...]:
    return server.repository.get().catalogue.ids.items


def test_http_scores_equal_in_process_scores(client: Client, demo_ranker: Ranker, items: tuple[str, ...]) -> None:
    for user in (*demo_ranker.catalogue.ids.users[:5], "somebody new"):
        request = RankRequest(user, items[:37])
        np.testing.assert_allclose(client.rank(request).scores, demo_ranker.rank(request).scores, atol=1e-6)


def test_every_part_of_the_answer(server: Server, items: tuple[str, ...]) -> None:
    user = server.repository.get().catalogue.ids.users[0]
    body = {"user_id": user, "candidates": [*items[:4], "no such item"], "request_id": "abc", "model": "demo"}
    response = post(server, "/v1/rank", body)
    answer = response.json()
    assert response.headers["x-request-id"] == answer["request_id"] == "abc"
    assert (answer["model"], answer["version"], answer["tasks"]) == ("demo", "1", ["click", "like"])
    assert answer["candidates"] == body["candidates"]
    assert (answer["unknown"], answer["unknown_user"], answer["degraded"]) == (["no such item"], False, [])
    assert answer["scores"][4] == [-30.0, -30.0]
    assert set(answer["timings_ms"]) == {"queue", "features", "encode", "score", "order", "total"}


def test_top_k_gives_the_best_first(client: Client, items: tuple[str, ...]) -> None:
    whole = client.rank(RankRequest("somebody new", items[:20]))
    top = client.rank(RankRequest("somebody new", items[:20], top_k=3))
    weighted = whole.scores @ np.asarray([1.0, 0.5])
    best = np.argsort(-weighted, kind="stable")[:3]
    assert top.candidates == tuple(items[i] for i in best)
    np.testing.assert_allclose(top.scores, whole.scores[best], atol=1e-6)


def test_numbers_are_ids_too(server: Server) -> None:
    answer = post(server, "/v1/rank", {"user_id": 7, "candidates": [1, 2.0]}).json()
    assert answer["candidates"] == ["1", "2"]
    assert answer["unknown_user"]


def test_an_inline_history_replaces_the_stored_one(client: Client, items: tuple[str, ...]) -> None:
    user = "somebody new"
    events = tuple(Event(item, "like") for item in items[:6])
    stored = client.rank(RankRequest(user, items[:10]))
    inline = client.rank(RankRequest(user, items[:10], history=events))
    assert not np.allclose(stored.scores, inline.scores)
    assert not inline.unknown_user


def test_context_changes_scores(client: Client, items: tuple[str, ...]) -> None:
    one = client.rank(RankRequest("x", items[:5], context={"plan": "basic"}))
    other = client.rank(RankRequest("x", items[:5], context={"plan": "family"}))
    assert not np.allclose(one.scores, other.scores)


def test_the_very_next_rank_sees_the_events(client: Client, items: tuple[str, ...]) -> None:
    def reader_of_own_writes(number: int) -> bool:
        user = f"writer-{number}"
        for step in range(4):
            events = (Event(items[number * 5 + step], "like"),)
            inline = tuple(Event(items[number * 5 + s], "like") for s in range(step + 1))
            stored, unknown = client.append_events(user, events)
            if (stored, unknown) != (step + 1, ()):
                return False
            mine = client.rank(RankRequest(user, items[:20])).scores
            expected = client.rank(RankRequest("nobody", items[:20], history=inline)).scores
            if not np.allclose(mine, expected, atol=1e-5):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(reader_of_own_writes, range(8)))


def test_the_state_is_kept_extended_and_shown(server: Server, client: Client, items: tuple[str, ...]) -> None:
    ranker = server.repository.get()
    ranker.states.extend_up_to(dict.fromkeys(ranker.schema.history_buckets, 32))  # whatever pays on this machine
    event, request = Event(items[0], "view"), RankRequest("user of states", items[:10])
    client.append_events("user of states", (event,))
    origins = [client.rank(request).state, client.rank(request).state]
    client.append_events("user of states", (event,))
    origins += [client.rank(request).state, client.rank(request).state]
    assert origins == ["encoded", "cached", "extended", "cached"]
    figures = httpx.get(server.url + "/metrics").text
    for origin in ("encoded", "cached", "extended"):
        assert re.search(rf'rankd_states_total{{model="demo",origin="{origin}",version="1"}} [1-9]', figures)
    assert re.search(r'rankd_state_bytes{model="demo",version="1"} [1-9]', figures)


def test_unknown_items_of_events_are_named(client: Client, items: tuple[str, ...]) -> None:
    stored, unknown = client.append_events("appender", (Event("what?", "click"), Event(items[0], "click")))
    assert (stored, unknown) == (2, ("what?",))


RANK = {"user_id": "u", "candidates": ["a"]}
REFUSED = [
    (b"", 400, "not valid JSON"),
    (b"{", 400, "not valid JSON"),
    (b"[]", 400, "Expected `object`"),
    (b'{"user_id": "u", "candidates": ["a"], "time": NaN}', 400, "not valid JSON"),
    (b'{"user_id": "\xff", "candidates": ["a"]}', 400, "not valid JSON"),
    ({"user_id": "u"}, 400, "missing required field `candidates`"),
    ({**RANK, "candidates": []}, 400, "length >= 1"),
    ({**RANK, "candidates": "a"}, 400, r"\$.candidates"),
    ({**RANK, "candidates": [1.5]}, 400, "the id 1.5 is neither"),
    ({**RANK, "candidates": [True]}, 400, r"\$.candidates"),
    ({**RANK, "candidates": ["a"] * 201}, 400, "at most 200"),
    ({**RANK, "user_id": ""}, 400, "length >= 1"),
    ({**RANK, "user_id": None}, 400, r"\$.user_id"),
    ({**RANK, "topk": 3}, 400, "Did you mean 'top_k'"),
    ({**RANK, "top_k": 0}, 400, r"\$.top_k"),
    ({**RANK, "top_k": -1}, 400, r"\$.top_k"),
    ({**RANK, "top_k": 2.5}, 400, "whole number"),
    ({**RANK, "timeout_ms": 0}, 400, r"\$.timeout_ms"),
    ({**RANK, "time": -1}, 400, r"\$.time"),
    ({**RANK, "history": [{"item_id": "a", "event": "clik"}]}, 400, "Did you mean 'click'"),
    ({**RANK, "history": [{"item_id": "a", "evnt": "click"}]}, 400, "Did you mean 'event'"),
    ({**RANK, "history": [{"item_id": "a", "values": {"x": 1}}]}, 400, "unknown event value 'x'"),
    ({**RANK, "context": {"plam": "basic"}}, 400, "Did you mean 'plan'"),
    ({**RANK, "context": {"plan": 3}}, 400, "is a text"),
    ({**RANK, "model": "dmo"}, 404, "Did you mean 'demo'"),
    ({**RANK, "model": "../demo"}, 404, "no model"),
    ({**RANK, "version": "9"}, 404, "has no version '9'"),
    ({**RANK, "timeout_ms": 1e-6}, 504, "even if it is alone"),
]


@pytest.mark.parametrize(("body", "status", "message"), REFUSED)
def test_a_bad_rank_request_is_refused(server: Server, body: bytes, status: int, message: str) -> None:
    response = post(server, "/v1/rank", body)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert re.search(message, error["message"]), error
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"user_id": "u", "events": []}, 400, "length >= 1"),
        ({"user_id": "u", "events": [{"item_id": "a", "event": "buy"}]}, 400, "unknown event type 'buy'"),
        ({"user_id": "u", "events": [{"item_id": ""}]}, 400, "length >= 1"),
        ({"user_id": "u", "events": [{"item_id": "a"}], "model": "x"}, 404, "no model 'x'"),
    ],
)
def test_bad_events_are_refused(server: Server, body: bytes, status: int, message: str) -> None:
    response = post(server, "/v1/events", body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_a_body_over_the_limit(server: Server) -> None:
    assert post(server, "/v1/rank", b"x" * 100_001).status_code == 413

    def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 10_000

    streamed = httpx.post(server.url + "/v1/rank", content=chunks())
    assert streamed.status_code == 413
    assert streamed.json()["error"]["type"] == "PayloadTooLarge"


def test_other_content_types_routes_and_methods(server: Server) -> None:
    assert post(server, "/v1/rank", b"a=b", **{"content-type": "text/plain"}).status_code == 415
    assert httpx.get(server.url + "/v1/nothing").json()["error"]["type"] == "NotFound"
    wrong = httpx.get(server.url + "/v1/rank")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["type"] == "MethodNotAllowed"


def test_models_health_and_metrics(server: Server, client: Client, items: tuple[str, ...]) -> None:
    (model,) = client.models()
    assert (model["name"], model["version"], model["state"], model["max_candidates"]) == ("demo", "1", "READY", 200)
    assert model["parity"]["openvino"] < 1e-3
    assert httpx.get(server.url + "/health/live").json() == {"live": True}
    assert httpx.get(server.url + "/health/ready").json() == {"ready": True}
    client.rank(RankRequest("u", items[:3]))
    text = httpx.get(server.url + "/metrics").text
    assert 'rankd_requests_total{model="demo",outcome="ok",version="1"}' in text
    assert 'rankd_stage_milliseconds_count{model="demo",stage="score",version="1"}' in text
    assert 'rankd_model_ready{model="demo",version="1"} 1.0' in text


def outcomes(server: Server) -> dict[tuple[str, str, str], float]:
    """rankd_requests_total by model, version and outcome."""
    text = httpx.get(server.url + "/metrics").text
    found = re.findall(r'rankd_requests_total\{model="(.*?)",outcome="(.*?)",version="(.*?)"\} (\S+)', text)
    return {(model, version, outcome): float(count) for model, outcome, version, count in found}


@pytest.mark.parametrize(
    ("change", "booked"),
    [
        ({"timeout_ms": 1e-6}, ("demo", "1", "DeadlineExceeded")),
        ({"timeout_ms": 1e-6, "model": "demo", "version": "1"}, ("demo", "1", "DeadlineExceeded")),
        ({"candidates": ["a"] * 201, "model": "demo"}, ("demo", "1", "InvalidRequest")),
        ({"model": "made up"}, ("", "", "NotFound")),
        ({"candidates": []}, ("", "", "InvalidRequest")),
    ],
)
def test_every_failure_is_counted_once_under_names_that_exist(
    server: Server, change: dict[str, Any], booked: tuple[str, str, str]
) -> None:
    before = outcomes(server)
    post(server, "/v1/rank", {**RANK, **change})
    after = outcomes(server)
    assert {key: count - before.get(key, 0) for key, count in after.items() if count != before.get(key)} == {booked: 1}


def test_a_version_that_goes_while_the_models_are_listed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.repository, "index", lambda: [ModelStatus("demo", "0", ModelState.READY)])
    response = httpx.get(server.url + "/v1/models")
    assert response.status_code == 200
    assert response.json()[0]["state"] == "UNLOADING"


def test_a_defect_is_a_500_without_its_traceback(
    server: Server, items: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(server.repository.get().features, "history", broken)
    before = outcomes(server).get(("demo", "1", "InternalError"), 0)
    response = post(server, "/v1/rank", {"user_id": "u", "candidates": items[:2]})
    assert response.status_code == 500
    assert outcomes(server)["demo", "1", "InternalError"] == before + 1
    assert response.json()["error"]["type"] == "InternalError"
    assert "defect" not in response.text
