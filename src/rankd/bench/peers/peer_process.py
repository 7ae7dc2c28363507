"""A peer as a contestant: its program in a process of its own, requests in its form, scores from its answers."""

from __future__ import annotations

import importlib.util
import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

import msgspec
import numpy as np

from rankd.bench.load import Answer, http_request
from rankd.bench.peers.peer_plan import PeerPlan
from rankd.bench.server_process import ServerProcess, free_port
from rankd.bench.wire_forms import JSON_LENGTH, encode_bytes
from rankd.errors import ConfigError, EngineFailure, nearest
from rankd.types import Float32Array, RankRequest

PYTRITON_MODEL = "rank"


class Kind(Enum):
    """A peer, by the name of its program."""

    MOSEC = "mosec"
    LITSERVE = "litserve"
    RAY = "ray"
    PYTRITON = "pytriton"


PATHS = {Kind.MOSEC: "/inference", Kind.LITSERVE: "/predict", Kind.RAY: "/inference"}
PACKAGES = {Kind.MOSEC: "mosec", Kind.LITSERVE: "litserve", Kind.RAY: "ray.serve", Kind.PYTRITON: "pytriton"}
GRACE_SECONDS = 20.0
STATES = "+states"


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer, whether its workers keep users' states, and the interpreter that has it (and rankd) installed."""

    kind: Kind
    states: bool = False
    python: str = sys.executable

    @property
    def name(self) -> str:
        """Of the contestant."""
        return self.kind.value + (STATES if self.states else "")


def parse_peer(text: str) -> Peer:
    """ "mosec", or "pytriton=/path/to/python" where another interpreter has it.

    Raises:
        ConfigError: no such peer, or it is not installed.
    """
    given, _, python = text.partition("=")
    name, names = given.removesuffix(STATES), [kind.value for kind in Kind]
    if name not in names:
        raise ConfigError(f"--peer {text}: there is {', '.join(names)}.{nearest(name, names)}")
    peer = Peer(Kind(name), given.endswith(STATES), python or sys.executable)
    if not python and importlib.util.find_spec(PACKAGES[peer.kind].partition(".")[0]) is None:
        raise ConfigError(
            f"--peer {text}: {PACKAGES[peer.kind]} is not installed; pip install 'rankd[peers]', or name the "
            f"interpreter that has it beside rankd: --peer {text}=/path/to/python"
        )
    _check_interpreter(text, peer)
    return peer


def encode_question(kind: Kind, request: RankRequest) -> bytes:
    """A whole HTTP request in a peer's form."""
    body = msgspec.json.encode({"user_id": request.user_id, "candidates": request.candidates})
    if kind is not Kind.PYTRITON:
        return http_request(PATHS[kind], body, {"content-type": "application/json"}, host="127.0.0.1")
    tensor = struct.pack("<I", len(body)) + body
    return encode_bytes(PYTRITON_MODEL, {"request": tensor}, {"request": (1, 1)})


def decode_answer(kind: Kind, answer: Answer, candidates: int) -> Float32Array:
    """The scores (C, K) of an answer.

    Raises:
        EngineFailure: the peer answered with an error.
    """
    if answer.status != 200:
        raise EngineFailure(f"{kind.value} answered {answer.status}: {answer.body[:500]!r}")
    body = answer.body
    if kind is Kind.PYTRITON:
        length = JSON_LENGTH.search(answer.head)
        if length is None:
            raise EngineFailure(f"{kind.value}: the answer has no Inference-Header-Content-Length: {body[:500]!r}")
        body = body[int(length[1]) + 4 :]
    return np.frombuffer(body, "<f4").reshape(candidates, -1)


class PeerServer(ServerProcess):
    """A peer around a version folder. It is ready when it has answered `probe`."""

    def __init__(self, peer: Peer, model: str, workers: int, batch: int, wait_ms: int, probe: bytes) -> None:
        self.peer, self._probe = peer, probe
        plan = PeerPlan(model, free_port(), workers, batch, wait_ms, peer.states)
        super().__init__((f"rankd.bench.peers.{peer.kind.value}_server",), plan.variables(), peer.python)
        self.host, self.port = plan.host, plan.port

    def is_ready(self) -> bool:
        """Whether it answers a request."""
        try:
            return self.exchange(self._probe).status == 200
        except OSError:
            return False

    def close(self) -> None:
        """End it, and what it started."""
        family = _descendants(self._process.pid) if self._process is not None else []
        super().close()
        deadline = time.monotonic() + GRACE_SECONDS
        while (family := [pid for pid in family if _lives(pid)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _check_interpreter(text: str, peer: Peer) -> None:
    code = f"import rankd.bench.peers.peer_worker, {PACKAGES[peer.kind]}"
    try:
        done = subprocess.run([peer.python, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as error:
        raise ConfigError(f"--peer {text}: {peer.python} cannot be run: {error}") from error
    if done.returncode:
        raise ConfigError(f"--peer {text}: {peer.python} cannot import what it needs: {done.stderr[-500:]}")


def _descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc") if os.path.isdir("/proc/self") else ():
        if entry.name.isdigit():
            with suppress(OSError), open(f"/proc/{entry.name}/stat") as stat:
                parent = int(stat.read().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        born = children.get(todo.pop(), [])
        found += born
        todo += born
    return found


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
