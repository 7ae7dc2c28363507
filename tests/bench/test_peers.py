"""Peers by name, their forms on the wire, and what their handlers do with a batch."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rankd.bench.load import HEAD_END, Answer
from rankd.bench.peers.peer_plan import PeerPlan
from rankd.bench.peers.peer_process import Kind, Peer, decode_answer, encode_question, parse_peer
from rankd.bench.peers.peer_worker import PeerWorker
from rankd.bench.synthetic_model import build_model
from rankd.bench.workload import read_workload
from rankd.errors import ConfigError, EngineFailure
from rankd.ranker import Ranker
from rankd.types import RankRequest

from .test_serving import TINY

REQUEST = RankRequest(user_id="ann", candidates=("x", "yy"))


def test_names_of_peers() -> None:
    assert parse_peer("mosec") == Peer(Kind.MOSEC)
    assert parse_peer("mosec+states") == Peer(Kind.MOSEC, states=True)
    assert parse_peer(f"mosec={sys.executable}") == Peer(Kind.MOSEC, python=sys.executable)
    assert parse_peer("mosec+states").name == "mosec+states"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mosek", "Did you mean 'mosec'"),
        ("mosec+state", "there is mosec, litserve"),
        ("pytriton", "--peer pytriton=/path/to/python"),
        ("mosec=/no/such/python", "cannot be run"),
        ("mosec=/usr/bin/false", "cannot import what it needs"),
    ],
)
def test_peers_that_are_not_there(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_peer(text)


def test_forms_on_the_wire() -> None:
    for kind in (Kind.MOSEC, Kind.LITSERVE, Kind.RAY):
        head, _, body = encode_question(kind, REQUEST).partition(HEAD_END)
        assert f"content-length: {len(body)}".encode() in head
        assert msgspec.json.decode(body) == {"user_id": "ann", "candidates": ["x", "yy"]}
    question = encode_question(Kind.PYTRITON, REQUEST)
    assert question.startswith(b"POST /v2/models/rank/infer ")
    raw = b'{"user_id":"ann","candidates":["x","yy"]}'
    assert question.endswith(len(raw).to_bytes(4, "little") + raw)


def test_scores_from_answers() -> None:
    scores = np.arange(4, dtype="<f4").reshape(2, 2)
    plain = Answer(200, b"HTTP/1.1 200 OK", scores.tobytes())
    assert (decode_answer(Kind.MOSEC, plain, 2) == scores).all()
    head = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 2\r\ncontent-length: 22"
    tensor = Answer(200, head, b"{}" + (16).to_bytes(4, "little") + scores.tobytes())
    assert (decode_answer(Kind.PYTRITON, tensor, 2) == scores).all()
    with pytest.raises(EngineFailure, match="mosec answered 503"):
        decode_answer(Kind.MOSEC, Answer(503, b"", b"busy"), 2)
    with pytest.raises(EngineFailure, match="no Inference-Header-Content-Length"):
        decode_answer(Kind.PYTRITON, plain, 2)


@pytest.mark.parametrize("states", [False, True])
def test_batches_give_the_scores_of_single_requests(tmp_path: Path, states: bool) -> None:
    workload = tmp_path / "tiny.toml"
    workload.write_text(TINY)
    path = build_model(read_workload(workload), tmp_path / "models")
    with Ranker.load(path) as ranker:
        items, users = ranker.catalogue.ids.items, ranker.catalogue.ids.users
        asked = [RankRequest(users[n % 3], items[n : n + size]) for n, size in enumerate((3, 8, 1, 5, 8, 2))]
        expected = [ranker.rank(request).scores for request in asked]
    worker = PeerWorker(PeerPlan(str(path), 0, 1, 4, 0, states))
    bodies = [msgspec.json.encode({"user_id": one.user_id, "candidates": one.candidates}) for one in asked]
    for start, end in ((0, 4), (4, 6), (0, 1), (1, 4)):
        answers = worker.answer(bodies[start:end])
        for answer, scores in zip(answers, expected[start:end], strict=True):
            assert np.frombuffer(answer, "<f4").reshape(scores.shape) == pytest.approx(scores, abs=1e-4)
