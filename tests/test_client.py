"""The client raises what a Ranker raises."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankd import Client, Event, RankRequest
from rankd.engine.backend import EngineConfig
from rankd.errors import DeadlineExceeded, InvalidRequest, NotFound, Overloaded, Unavailable
from rankd.serve.lifecycle import Server
from rankd.serve.settings import ServeConfig


@pytest.fixture(scope="module")
def server(demo_models: Path) -> Iterator[Server]:
    with Server(demo_models, ServeConfig(port=0, engine=EngineConfig(executors=1), max_waiting=0)) as running:
        yield running


def test_errors_keep_their_class_and_words(server: Server) -> None:
    with Client(server.url) as client:
        with pytest.raises(NotFound, match="Did you mean 'demo'"):
            client.rank(RankRequest("u", ("a",), model="dem"))
        with pytest.raises(InvalidRequest, match="candidates"):
            client.rank(RankRequest("u", ()))
        with pytest.raises(InvalidRequest, match="unknown event type"):
            client.append_events("u", (Event("a", "nothing"),))
        with pytest.raises(DeadlineExceeded):
            client.rank(RankRequest("u", ("a",), timeout_ms=1e-6))


def test_a_full_line_says_when_to_come_back(server: Server) -> None:
    gate, begun = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        begun.set()
        gate.wait(20)

    server.repository.get().line.submit(hold)
    begun.wait(10)
    with Client(server.url) as client:
        with pytest.raises(Overloaded) as refused:
            client.rank(RankRequest("u", ("a",)))
        assert refused.value.retry_after_s >= 1
        gate.set()


def test_nobody_there() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unavailable, match="no answer"):
        client.models()
