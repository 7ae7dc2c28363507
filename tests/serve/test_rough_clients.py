"""`rankd serve` and rough clients, which go away, stay for ever, are slow, or ask on while it is told to end."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from rankd.serve import messages
from rankd.serve.lifecycle import Server
from tests.features.stores.redis_server import eventually
from tests.serve.test_grpc import method, slow

Address = tuple[str, int]
PATIENCE_S, DRAIN_S = 180.0, 20.0
WANTED, LEAST, OWN_FILES = 10_000, 2_000, 500
CANDIDATES = [f"item {number}" for number in range(200)]
CLIENTS, PER_SECOND, ANSWERS_BEFORE = 64, 500.0, 150
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
ANSWERED, NOT_BEGUN, REFUSED = "answered", "not begun", "refused"
WRITING_DOWN = """
import os
from rankd.cli import main
from rankd.serve import grpc_ranking, v1

def writes_down(decode):
    def decoded(given):
        request = decode(given)
        os.write(1, f"{request.request_id}\\n".encode())
        return request
    return decoded

for module in (v1, grpc_ranking):
    module.decode_rank = writes_down(module.decode_rank)
main()
"""
"""`rankd`, with the ids of the requests that its handlers have read, in full, on standard output."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server process; `accepted` is the file with the ids of the requests that it has read."""

    process: subprocess.Popen[bytes]
    http: Address
    grpc: str
    accepted: Path

    @property
    def url(self) -> str:
        """Where HTTP listens."""
        return f"http://{self.http[0]}:{self.http[1]}"

    def open_files(self) -> int:
        """File descriptors of the process."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextmanager
def rankd_serve(
    models: Path, folder: Path, drain_seconds: float = DRAIN_S, engine: Sequence[str] = ("--executors", "1")
) -> Iterator[Running]:
    """`rankd serve` on free ports, once it is ready."""
    arguments = ("serve", str(models), *engine, "--port", "0", "--store", "memory:")
    environment = {**os.environ, "RANKD_DRAIN_SECONDS": str(drain_seconds)}
    log, accepted = folder / "log", folder / "accepted"
    with log.open("wb") as err, accepted.open("wb") as out:
        command = [sys.executable, "-c", WRITING_DOWN, *arguments]
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
    try:
        eventually(lambda: "ready; the" in log.read_text() or process.poll() is not None, "it is ready", PATIENCE_S)
        http = re.search(r"listening on http://([^\s,]+):(\d+)", log.read_text())
        rpc = re.search(r"gRPC on (\S+)", log.read_text())
        assert http is not None, log.read_text()
        assert rpc is not None, log.read_text()
        yield Running(process, (http[1], int(http[2])), rpc[1], accepted)
    finally:
        process.kill()
        process.wait()


def http_request(user: str, request_id: str = "") -> bytes:
    """A whole request, as it goes over the wire."""
    body = json.dumps({"user_id": user, "candidates": CANDIDATES, "request_id": request_id}).encode()
    return b"POST /v1/rank HTTP/1.1\r\nhost: rankd\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def sent(address: Address, data: bytes) -> socket.socket:
    """A connection on which some bytes are sent."""
    connection = socket.create_connection(address, PATIENCE_S)
    connection.sendall(data)
    return connection


def answer_on(connection: socket.socket) -> tuple[int, bytes, bool]:
    """The status of an answer, its body, and whether the connection stays; 0 and what came if that is no whole one."""
    received = b""
    try:
        while more := connection.recv(1 << 16):
            received += more
            head, _, body = received.partition(b"\r\n\r\n")
            length = re.search(rb"\r\ncontent-length: (\d+)", head)
            if length is not None and len(body) == int(length[1]):
                return int(head.split()[1]), body, b"\r\nconnection: close" not in head
    except OSError:
        pass  # reset, or nothing came in time
    return 0, received, False


def leave(connection: socket.socket, in_order: bool) -> None:
    """Go away with a FIN, or as a process that is killed with unread data: with a RST."""
    if not in_order:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextmanager
def many_files() -> Iterator[int]:
    """As many file descriptors as this process may have, and those that it starts; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_requests_of_clients_that_go_away_leave_the_schedule(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gate = slow(server, monkeypatch)
    schedule = server.repository.get().schedule
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    address = host, int(port)

    def cancelled() -> float:
        metrics = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
        found = re.search(r'^rankd_schedule_total\{.*outcome="cancelled".*\} (\S+)$', metrics, re.MULTILINE)
        assert found is not None, metrics
        return float(found[1])

    def asking(user: str, request_id: str = "") -> socket.socket:
        return opened.enter_context(sent(address, http_request(user, request_id)))

    before = cancelled()
    with ExitStack() as opened:
        try:
            computed = asking("slow")
            assert begun.wait(20)
            going = [asking(f"going {number}") for number in range(10)]
            staying = asking("staying", "mine")
            eventually(lambda: schedule.unfinished == 12, "all of them wait")
            for number, one in enumerate((*going, computed)):
                leave(one, in_order=number % 2 == 0)
            eventually(lambda: cancelled() == before + 11, "they are cancelled")
            assert schedule.unfinished == 1
        finally:
            gate.set()
        status, body, _ = answer_on(staying)
    assert (status, json.loads(body)["request_id"]) == (200, "mine")
    assert cancelled() == before + 11


@needs_proc
def test_ten_thousand_idle_connections_are_in_nobodys_way(demo_models: Path, tmp_path: Path) -> None:
    with many_files() as most, ExitStack() as opened:
        count = min(WANTED, most - OWN_FILES)
        if count < LEAST:
            pytest.skip(f"a process may have {most} open files here; {LEAST + OWN_FILES} are needed")
        running = opened.enter_context(rankd_serve(demo_models, tmp_path))

        def served() -> None:
            for number in range(10):
                with sent(running.http, http_request(f"user {number}")) as connection:
                    assert answer_on(connection)[0] == 200
            with httpx.Client(base_url=running.url, timeout=10) as client:
                assert [client.get("/health/ready").status_code for _ in range(10)] == [200] * 10

        before = running.open_files()
        served()
        idle = [opened.enter_context(socket.create_connection(running.http, PATIENCE_S)) for _ in range(count)]
        eventually(lambda: running.open_files() >= count, "all of them are taken", PATIENCE_S)
        started = time.monotonic()
        served()
        assert time.monotonic() - started < 10
        assert running.open_files() >= count
        for number, one in enumerate(idle):
            leave(one, in_order=number % 2 == 0)
        eventually(lambda: running.open_files() <= before + 20, "file descriptors are given back", PATIENCE_S)
        served()


@needs_proc
def test_slow_clients_hold_up_neither_others_nor_the_end(demo_models: Path, tmp_path: Path) -> None:
    drain_seconds, little = 2.0, 6.0
    stop = threading.Event()
    with rankd_serve(demo_models, tmp_path, drain_seconds) as running, ExitStack() as opened:
        head, whole = b"POST /v1/rank HTTP/1.1\r\nhost: rankd\r\nx-slow: ", http_request("half")
        dribbling = [opened.enter_context(sent(running.http, head)) for _ in range(200)]
        for _ in range(50):
            opened.enter_context(sent(running.http, whole[: len(whole) // 2]))
        sent_bytes = [0] * len(dribbling)

        def dribble() -> None:
            while not stop.wait(0.05):
                for number, one in enumerate(dribbling):
                    with suppress(OSError):  # the server has closed it
                        sent_bytes[number] += one.send(b"a")

        slowly = threading.Thread(target=dribble)
        slowly.start()
        opened.callback(slowly.join)
        opened.callback(stop.set)
        eventually(lambda: min(sent_bytes) >= 3, "every head has grown")
        with httpx.Client(base_url=running.url, timeout=10) as client:
            for number in range(20):
                answer = client.post("/v1/rank", json={"user_id": f"user {number}", "candidates": CANDIDATES})
                assert answer.status_code == 200
        assert running.open_files() >= 250
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(drain_seconds + little) == 0


@contextmanager
def asking_over_http(running: Running) -> Iterator[Callable[[str], str]]:
    """A client that keeps its connection as long as the server does."""
    kept: list[socket.socket] = []

    def ask(request_id: str) -> str:
        try:
            if not kept:
                kept.append(socket.create_connection(running.http, PATIENCE_S))
        except ConnectionError:
            return REFUSED
        status, received = 0, b""
        with suppress(ConnectionError):
            kept[0].sendall(http_request(request_id, request_id))
            status, received, stays = answer_on(kept[0])
        if not (status and stays):
            kept.pop().close()
        if status == 200 and json.loads(received)["request_id"] == request_id:
            return ANSWERED
        return f"{status}: {received!r}" if received else NOT_BEGUN

    try:
        yield ask
    finally:
        for connection in kept:
            connection.close()


@contextmanager
def asking_over_grpc(running: Running) -> Iterator[Callable[[str], str]]:
    """A client with a channel of its own."""
    kind = messages.message("rankd.v1.RankRequest")
    ends = {grpc.StatusCode.UNAVAILABLE: REFUSED, grpc.StatusCode.CANCELLED: NOT_BEGUN}
    with grpc.insecure_channel(running.grpc, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        rank = method(channel, "rankd.v1.Ranking", "Rank")

        def ask(request_id: str) -> str:
            request = kind(user_id=request_id, candidates=CANDIDATES, request_id=request_id)
            try:
                answer = rank(request, timeout=PATIENCE_S)
            except grpc.RpcError as error:
                call: Any = error
                return ends.get(call.code(), f"{call.code()}: {call.details()}")
            return ANSWERED if answer.request_id == request_id else f"answer to {answer.request_id}"

        yield ask


def sigterm_under_load(
    running: Running, client: Callable[[Running], AbstractContextManager[Callable[[str], str]]]
) -> list[tuple[str, str]]:
    """Requests at fixed times, more than the server can take, and SIGTERM in their middle: each one's id and how it
    ended, in the order of their ends. Every other client rests between two requests, so that connections are idle too;
    a client leaves when it is refused."""
    ended: list[tuple[str, str]] = []
    numbers, started = itertools.count(), time.monotonic()

    def keep_asking(rest_s: float) -> None:
        with client(running) as ask:
            outcome = ""
            while outcome != REFUSED:
                number = next(numbers)
                time.sleep(max(started + number / PER_SECOND - time.monotonic(), 0.0))
                outcome = ask(f"r{number}")
                ended.append((f"r{number}", outcome))
                time.sleep(rest_s)

    clients = [threading.Thread(target=keep_asking, args=(0.25 * (place % 2),)) for place in range(CLIENTS)]
    for one in clients:
        one.start()
    try:
        eventually(lambda: len(ended) > ANSWERS_BEFORE, "the load is on", PATIENCE_S)
        running.process.send_signal(signal.SIGTERM)
        # It waits for what it has accepted, and not for the end of its time.
        assert running.process.wait(DRAIN_S - 5) == 0
    finally:
        running.process.kill()  # so that clients end, too
        for one in clients:
            one.join()
    return ended


def check_ends(running: Running, ended: list[tuple[str, str]]) -> None:
    """What was accepted was answered, and nothing else got a part of an answer."""
    outcomes, accepted = dict(ended), set(running.accepted.read_text().split())
    assert len(outcomes) == len(ended)
    assert {one: outcomes[one] for one in accepted if outcomes[one] != ANSWERED} == {}
    assert {one: how for one, how in ended if one not in accepted and how not in (NOT_BEGUN, REFUSED)} == {}
    kinds = [how for _, how in ended]
    assert ANSWERED in kinds[kinds.index(REFUSED) :], "nothing was in flight when the server stopped to accept"


def test_sigterm_under_load_cuts_nothing_off_over_http(demo_models: Path, tmp_path: Path) -> None:
    """Accepted is what the application has read to its last byte, which the server here writes down.

    uvicorn looks for the signal every 0.1 s and till then takes everything. Then it shuts the door and closes every
    connection without an open request, which is one from the end of its head to the end of its answer. What the kernel
    still holds of such a connection was never read: its client sees a reset before the first byte of an answer. So do
    clients whose connection was not taken yet. Open requests are read to their end and answered.
    """
    with rankd_serve(demo_models, tmp_path) as running:
        ended = sigterm_under_load(running, asking_over_http)
    check_ends(running, ended)


def test_sigterm_under_load_cuts_nothing_off_over_grpc(demo_models: Path, tmp_path: Path) -> None:
    """Accepted is an RPC whose handler has its message, which the server here writes down.

    They are taken until HTTP begins to drain. Then gRPC refuses those that come as UNAVAILABLE, and ends those that
    lie in its own queue, for which no handler has begun, as CANCELLED.
    """
    with rankd_serve(demo_models, tmp_path) as running:
        ended = sigterm_under_load(running, asking_over_grpc)
    check_ends(running, ended)
