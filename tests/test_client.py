"""The client raises what a Ranker raises."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from rankd import Client, Event, RankRequest
from rankd.engine.backend import EngineConfig
from rankd.errors import DeadlineExceeded, InvalidRequest, NotFound, Overloaded, RankdError, Unavailable
from rankd.features.reading.version_features import Fetch
from rankd.schedule.schedule_config import ScheduleConfig
from rankd.serve.lifecycle import Server
from rankd.serve.settings import ServeConfig
from rankd.types import UserHistory


@pytest.fixture(scope="module")
def server(demo_models: Path) -> Iterator[Server]:
    with Server(
        demo_models,
        ServeConfig(port=0, engine=EngineConfig(executors=1), schedule=ScheduleConfig(max_waiting_candidates=1)),
    ) as running:
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


def test_a_full_line_says_when_to_come_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, begun = threading.Event(), threading.Event()
    ranker = server.repository.get()
    history = ranker.features.history

    def slow_history(fetch: Fetch) -> UserHistory | None:
        if fetch.user_id == "slow":
            begun.set()
            gate.wait(20)
        return history(fetch)

    monkeypatch.setattr(ranker.features, "history", slow_history)
    ranker.submit(RankRequest("slow", ("a",)))
    assert begun.wait(10)
    ranker.submit(RankRequest("waits", ("a",)))
    with Client(server.url) as client:
        with pytest.raises(Overloaded) as refused:
            client.rank(RankRequest("u", ("a",)))
        assert refused.value.retry_after_s >= 1
        gate.set()


def test_nobody_there() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unavailable, match="no answer"):
        client.models()


@pytest.mark.parametrize("url", ["http://[::1", "localhost:8000", "http://", "ftp://x", ""])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InvalidRequest, match="give one such as http"):
        Client(url)


@pytest.fixture
def stranger() -> Iterator[str]:
    """A server of something else: HTML for what is got, an HTML error for what is posted."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>\nhello</html>")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(501)
            self.end_headers()
            self.wfile.write(b"<html>\n\nnot here\n</html>\n")

        def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - the name of the base class
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_server_of_something_else(stranger: str) -> None:
    with Client(stranger) as client:
        with pytest.raises(RankdError, match="does not answer as rankd does"):
            client.models()
        with pytest.raises(RankdError, match="HTTP 501") as refused:
            client.rank(RankRequest("u", ("a",)))
    assert "\n" not in str(refused.value)
