"""The server's life from outside: `rankd serve` as a process, its readiness, its drain, its refusals to start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from rankd.errors import ConfigError, NotFound
from rankd.serve.lifecycle import Server, run_server
from rankd.serve.repository import ModelRepository
from rankd.serve.settings import ServeConfig
from tests.features.stores.redis_server import eventually
from tests.serve.conftest import copy_version


@contextmanager
def rankd_serve(*arguments: str, until: str = "ready; the live page") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`rankd serve` on a free port; yields the process and its address once its log says `until`."""
    command = [sys.executable, "-m", "rankd", "serve", *arguments, "--port", "0", "--store", "memory:"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            found = re.search(r"listening on (\S+)", line)
            url = found[1] if found else url
            if until in line:
                break
        yield process, url
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


@pytest.mark.parametrize("delay_s", [0.0, 0.06])
def test_sigterm_while_models_load_ends_in_peace(demo_models: Path, delay_s: float) -> None:
    with rankd_serve(str(demo_models), "--executors", "1", until="listening on") as (process, _):
        time.sleep(delay_s)
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 0
        assert process.stderr is not None
        log = process.stderr.read()
    assert "Traceback" not in log
    assert "drained and closed" in log


def test_a_stop_that_comes_first_is_not_forgotten(demo_models: Path) -> None:
    server = Server(demo_models, ServeConfig(port=0))
    server.listen()
    server.stop()  # a model folder that is refused at once does this before the event loop is up
    serving = threading.Thread(target=server.serve, daemon=True)
    serving.start()
    serving.join(10)
    assert not serving.is_alive()
    server.close()


def test_a_start_that_fails_leaves_nothing_running(
    demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(NotFound):
        Server(tmp_path, ServeConfig(port=0)).start()

    def broken(_: ModelRepository) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(ModelRepository, "start", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        Server(demo_models, ServeConfig(port=0)).start()
    eventually(lambda: set(threading.enumerate()) <= before, "gRPC's own threads end a moment later")


def test_the_command_raises_what_loading_raises_and_gives_signals_back(
    demo_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: ModelRepository) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(ModelRepository, "start", broken)
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError, match="a defect"):
        run_server(demo_models, ServeConfig(port=0))
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_readiness_comes_after_the_models(demo_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(demo_models, ServeConfig(port=0))
    gate = threading.Event()
    real = server.repository.load
    monkeypatch.setattr(server.repository, "load", lambda name: (gate.wait(20), real(name))[1])
    starting = threading.Thread(target=server.start)
    starting.start()
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                live = httpx.get(server.url + "/health/live")
                break
            except (ConfigError, httpx.ConnectError):
                time.sleep(0.02)
        assert live.status_code == 200
        for path in ("/health/ready", "/v2/health/ready"):
            assert httpx.get(server.url + path).status_code == 503
        refused = httpx.post(server.url + "/v1/rank", json={"user_id": "u", "candidates": ["a"], "model": "demo"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "Unavailable")
        gate.set()
        starting.join(30)
        assert httpx.get(server.url + "/health/ready").status_code == 200
        server.repository.begin_draining()
        assert httpx.get(server.url + "/health/ready").status_code == 503
    finally:
        gate.set()
        starting.join(30)
        server.close()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rankd", "serve", *arguments, "--store", "memory:"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


def test_a_damaged_artifact_stops_the_start(demo_models: Path, tmp_path: Path) -> None:
    place = copy_version(demo_models / "demo" / "1", tmp_path, "films", "1")
    graph = place / "engines" / "openvino" / "score.bin"
    raw = bytearray(graph.read_bytes())
    raw[100] ^= 1
    graph.write_bytes(raw)
    result = run(str(tmp_path), "--port", "0")
    assert result.returncode == 2
    assert "does not match the checksum" in result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_settings_stop_the_start(demo_models: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text("prot = 1\n")
    result = run(str(demo_models), "--config", str(config))
    assert (result.returncode, "Did you mean 'port'" in result.stderr) == (2, True)
    result = run(str(demo_models), RANKD_ENGINE__PRECISION="fp23")
    assert result.returncode == 2
    assert "fp23" in result.stderr
    result = run(str(demo_models), RANKD_PORT="70000")
    assert result.returncode == 2
    assert "$.port" in result.stderr


def test_a_taken_port_is_refused_with_advice(demo_models: Path) -> None:
    with Server(demo_models, ServeConfig(port=0)) as running:
        port = int(running.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match="choose another with --port"):
            Server(demo_models, ServeConfig(port=port)).start()
