"""The process of one executor: `python -m rankd.engine.processes.engine_process CALLS LEASH MEMORY`, three descriptors.

In: messages of `engine_messages.py` from the ranker that started it. Out: an answer each, outputs in the shared file.
It does what it is told, one call at a time, and ends when the ranker has: the other end of LEASH closes with that
process however it ends. An interrupt or a SIGTERM for a whole group of processes is the ranker's affair: it drains,
and needs its executors for that.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from rankd.artifact import Artifact
from rankd.engine.backend import Executor
from rankd.engine.processes import engine_messages as messages
from rankd.engine.processes.engine_messages import (
    Done,
    Encode,
    Extend,
    Failed,
    Place,
    PlacedState,
    Reply,
    Start,
    Started,
)
from rankd.engine.processes.shared_file import SharedView
from rankd.engine.targets import load_backend
from rankd.engine.thread_plan import pin
from rankd.errors import RankdError
from rankd.types import Array, UserState


class EngineProcess:
    """One executor, and the memory that its calls name."""

    def __init__(self, view: SharedView) -> None:
        self._view = view
        self._executor: Executor | None = None

    def answer(self, message: bytes) -> Reply:
        """Do what a message says; what is raised on the way is said instead."""
        try:
            request = messages.read_request(message)
            if isinstance(request, Start):
                return self._start(request)
            if self._executor is None:
                raise RuntimeError("a call came before the start")
            self._call(request, self._executor)
            return Done()
        except Exception as error:  # noqa: BLE001 - the edge of the process: the ranker raises it
            kind = type(error).__name__ if isinstance(error, RankdError) else "EngineFailure"
            text = str(error) if isinstance(error, RankdError) else f"{type(error).__name__}: {error}"
            return Failed(kind, text)

    def _start(self, request: Start) -> Started:
        if request.cpus:
            pin(frozenset(request.cpus))
        backend = load_backend(Artifact.open(Path(request.artifact)), request.config, request.state_type)
        self._executor = backend.executor()
        return Started(backend.target, backend.precision.value, backend.state_type, backend.memory_bytes())

    def _call(self, request: Encode | Extend | messages.Score, executor: Executor) -> None:
        if isinstance(request, Encode):
            executor.encode_wide = request.wide
            executor.encode(self._arrays(request.history), self._arrays(request.into))
        elif isinstance(request, Extend):
            made = executor.extend(self._state(request.state), self._arrays(request.new))
            for name, place in request.into.items():
                self._array(place)[...] = made[name]
        else:
            states = [self._state(state) for state in request.states]
            self._array(request.into)[...] = executor.score(states, self._arrays(request.candidates))

    def _state(self, state: PlacedState) -> UserState:
        return UserState(self._arrays(state.arrays), state.lengths)

    def _arrays(self, places: Mapping[str, Place]) -> dict[str, Array]:
        return {name: self._array(place) for name, place in places.items()}

    def _array(self, place: Place) -> Array:
        return self._view.array(place.offset, place.dtype, place.shape)


def main() -> None:
    """Answer until nobody asks any more."""
    calls, leash, memory = (int(argument) for argument in sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(socket.socket(fileno=leash),), daemon=True).start()
    process, connection = EngineProcess(SharedView(memory)), socket.socket(fileno=calls)
    while message := connection.recv(messages.MOST_BYTES):
        connection.send(messages.encode(process.answer(message)))


def _end_with(leash: socket.socket) -> None:
    """End this process, whatever it is doing, when the ranker's has ended."""
    leash.recv(1)
    os._exit(0)


if __name__ == "__main__":
    main()
