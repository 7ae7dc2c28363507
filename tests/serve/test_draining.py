"""Draining: HTTP and gRPC at the same time; and what a client may send before anybody listens to it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from rankd.serve import messages
from tests.serve.test_rough_clients import http_request, rankd_serve, sent


def test_http_and_grpc_drain_at_the_same_time(demo_models: Path, tmp_path: Path) -> None:
    gone, drain_seconds = threading.Event(), 4.0

    def nothing() -> Iterator[Any]:
        gone.wait(60)
        yield from ()

    whole = http_request("half")
    with rankd_serve(demo_models, tmp_path, drain_seconds) as running, grpc.insecure_channel(running.grpc) as channel:
        asked, given, _ = messages.methods("inference.GRPCInferenceService")["ModelStreamInfer"]
        stream = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer", asked.SerializeToString, given.FromString
        )(nothing())
        with sent(running.http, whole[:-5]):
            time.sleep(0.5)
            running.process.send_signal(signal.SIGTERM)
            try:
                assert running.process.wait(drain_seconds + 3) == 0
            finally:
                gone.set()
                stream.cancel()


def test_a_head_without_end_is_cut(demo_models: Path, tmp_path: Path) -> None:
    with rankd_serve(demo_models, tmp_path, 4.0) as running, sent(running.http, b"GET / HTTP/1.1\r\nx-a: ") as client:
        client.settimeout(20)
        answer = b""
        with suppress(OSError):  # it may be cut while we send
            for _ in range(400):
                client.sendall(b"a" * 1024)
        with suppress(OSError):
            answer = client.recv(4096)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
        with sent(running.http, http_request("after")) as other:
            other.settimeout(20)
            assert other.recv(64).startswith(b"HTTP/1.1 200")
