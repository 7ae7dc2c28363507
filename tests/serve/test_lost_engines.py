"""`rankd serve --isolation processes` under load while processes of its engine are killed and stopped."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from tests.features.stores.redis_server import eventually
from tests.serve.test_rough_clients import CANDIDATES, Running, needs_proc, rankd_serve

CLIENTS, PATIENCE_S = 4, 60.0


def engines(running: Running) -> list[int]:
    """Processes of executors."""
    tasks = Path(f"/proc/{running.process.pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [pid for pid in children if b"engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def lost(running: Running) -> float:
    """Executors that were lost, as /metrics says."""
    lines = httpx.get(f"{running.url}/metrics", timeout=PATIENCE_S).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("rankd_executors_lost_total"))


@needs_proc
def test_no_request_is_lost_with_an_engine(demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKD_SCHEDULE__HANG_SECONDS", "1.0")
    statuses: list[int] = []
    ending = threading.Event()
    with rankd_serve(demo_models, tmp_path, engine=("--executors", "2", "--isolation", "processes")) as running:

        def ask(client: int) -> None:
            with httpx.Client(base_url=running.url, timeout=PATIENCE_S) as connection:
                number = 0
                while not ending.is_set():
                    number += 1
                    body = {"user_id": f"user {client} {number}", "candidates": CANDIDATES[: 1 + 37 * number % 200]}
                    statuses.append(connection.post("/v1/rank", json=body).status_code)

        clients = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            for number, how in enumerate((signal.SIGKILL, signal.SIGSTOP)):
                eventually(lambda: len(engines(running)) == 2, "both executors have a process", PATIENCE_S)
                victim, answered = engines(running)[0], len(statuses)
                os.kill(victim, how)
                eventually(lambda: lost(running) == number + 1, "the loss is noticed", PATIENCE_S)  # noqa: B023
                eventually(lambda: victim not in engines(running), "it has ended", PATIENCE_S)  # noqa: B023
                eventually(lambda: len(statuses) > answered + 20, "requests are answered", PATIENCE_S)  # noqa: B023
        finally:
            ending.set()
            for client in clients:
                client.join(PATIENCE_S)
        assert set(statuses) == {200}
        eventually(lambda: len(engines(running)) == 2, "the second one is replaced, too", PATIENCE_S)
        left = engines(running)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE_S) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in left)
