"""The /v1 JSON, byte by byte: what is written by hand is read, and what is written is what a client expects."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd import Event, RankRequest, Scores
from rankd.errors import InvalidRequest
from rankd.serve.wire import decode_events, decode_rank, encode_request, encode_scores

FULL = (
    b'{"user_id":"u","candidates":["a",7,2.0],"model":"m","version":"3",'
    b'"history":[{"item_id":8,"event":"like","time":3.0,"values":{"minutes":1}},{"item_id":"b"}],'
    b'"context":{"plan":"family","age":30},"time":1700000000,"top_k":2,"timeout_ms":50,"request_id":"r-1"}'
)


def test_every_field_of_a_rank_request() -> None:
    assert decode_rank(FULL) == RankRequest(
        user_id="u",
        candidates=("a", "7", "2"),
        model="m",
        version="3",
        history=(Event("8", "like", 3, {"minutes": 1.0}), Event("b")),
        context={"plan": "family", "age": 30.0},
        time=1_700_000_000,
        top_k=2,
        timeout_ms=50.0,
        request_id="r-1",
    )


def test_the_least_rank_request() -> None:
    first, second = (decode_rank(b'{"user_id":1,"candidates":[-1]}') for _ in range(2))
    assert (first.user_id, first.candidates, first.history) == ("1", ("-1",), None)
    assert first.request_id != second.request_id


def test_no_history_is_not_an_empty_history() -> None:
    assert decode_rank(b'{"user_id":"u","candidates":["a"],"history":[]}').history == ()


def test_events() -> None:
    body = b'{"user_id":5,"events":[{"item_id":"a","time":1}],"model":"m"}'
    assert decode_events(body) == ("m", "5", (Event("a", "", 1),))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"\xff", "not valid JSON"),
        (b'{"user_id":"u","candidates":["a"]} x', "not valid JSON"),
        (b'{"user_id":"u","candidates":["\\ud800"]}', "not valid JSON"),
        (b'{"user_id":"u","candidates":[Infinity]}', "not valid JSON"),
        (b'{"user_id":"u","candidates":[1e999]}', r"out of range.*\$.candidates\[0\]"),
        (b'{"user_id":"u","candidates":["a",""]}', r"\$.candidates\[1\]"),
        (b'{"user_id":"u","candidates":["a","%s"]}' % (b"x" * 513), r"length <= 512.*\$.candidates\[1\]"),
        (b'{"user_id":"u","candidates":[9223372036854775808]}', r"\$.candidates\[0\]"),
        (b'{"user_id":"u","candidates":["a"],"request_id":"a b"}', r"\$.request_id"),
        (b'{"user_id":"u","candidates":["a"],"request_id":"a\\r\\nset-cookie: x"}', r"\$.request_id"),
        (b'{"user_id":"u","candidates":["a"],"history":[{"item_id":"a","values":{"x":1e16}}]}', r"\$.history\[0\]"),
        (b'{"user_id":"u","candidates":["a"],"candidate":[]}', "Did you mean 'candidates'"),
        (b'{"user_id":"u","candidates":["a"],"timeout_ms":"5"}', r"\$.timeout_ms"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_place(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        decode_rank(body)


def test_the_bytes_of_an_answer() -> None:
    scores = Scores(
        model="m",
        version="3",
        candidates=("a", "ü"),
        tasks=("click", "like"),
        scores=np.asarray([[1.5, -2.0], [0.25, 0.0]], np.float32),
        unknown=("ü",),
        unknown_user=True,
        state="cached",
        request_id="r",
        timings_ms={"queue": 0.123456, "total": 1.0},
    )
    expected = (
        '{"model":"m","version":"3","request_id":"r","tasks":["click","like"],"candidates":["a","ü"],'
        '"scores":[[1.5,-2.0],[0.25,0.0]],"unknown":["ü"],"unknown_user":true,"degraded":[],"rows":{},'
        '"state":"cached","timings_ms":{"queue":0.1235,"total":1.0}}'
    )
    assert encode_scores(scores).decode() == expected


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
numbers = st.floats(-1e15, 1e15)
events = st.builds(
    Event, texts, st.sampled_from(["", "like"]), st.none() | st.integers(0, 2**40 - 1), st.dictionaries(texts, numbers)
)
requests = st.builds(
    RankRequest,
    user_id=texts,
    candidates=st.lists(texts, min_size=1, max_size=5).map(tuple),
    model=texts,
    history=st.none() | st.lists(events, max_size=3).map(tuple),
    context=st.dictionaries(texts, texts | numbers, max_size=3),
    time=st.none() | st.integers(0, 2**40 - 1),
    top_k=st.none() | st.integers(1, 1000),
    timeout_ms=st.none() | st.floats(1e-3, 1e6),
    request_id=st.just("r"),
)


@settings(deadline=None)
@given(requests)
def test_what_a_client_writes_is_what_a_server_reads(request: RankRequest) -> None:
    assert decode_rank(encode_request(request)) == request


@settings(deadline=None)
@given(
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(texts, x))
)
def test_any_other_json_is_a_typed_refusal(document: object) -> None:
    with pytest.raises(InvalidRequest):
        decode_rank(json.dumps({"user_id": document, "candidates": document}).encode())


def test_a_number_that_json_cannot_say_never_loses_its_meaning() -> None:
    for request in (
        RankRequest("u", ("a",), timeout_ms=math.nan),
        RankRequest("u", ("a",), context={"x": math.inf}),
        RankRequest("u", ("a",), history=(Event("a", values={"x": math.nan}),)),
    ):
        with pytest.raises(InvalidRequest):
            decode_rank(encode_request(request))
