"""An executor whose engine is in another process: it says where arrays lie, waits, and reads the outputs.

In: the arrays of a call. Out: what the engine made of them. Arrays in the shared file (states, staging) are named where
they lie; any other is copied there first. While the process computes this thread waits outside of the interpreter.

A process that ends, for whatever reason, is an `EngineFailure` of the call that it was at, and of every later one.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from rankd import errors
from rankd.artifact import Manifest
from rankd.engine.backend import StateType
from rankd.engine.processes import engine_messages as messages
from rankd.engine.processes.engine_messages import Encode, Extend, Failed, Place, PlacedState, Reply, Request, Score
from rankd.engine.processes.shared_file import SharedFile
from rankd.engine.state_arrays import dtype_of, empty_state, shape_of
from rankd.errors import EngineFailure, RankdError
from rankd.types import Array, Bytes, Float32Array, UserState

log = logging.getLogger("rankd")
MODULE = "rankd.engine.processes.engine_process"
END_SECONDS = 5.0
"""Until a process that was killed is taken for gone."""
SCRATCH_BYTES = 1 << 20


class EngineConnection:
    """A process, and the way to it. One thread asks at a time; any thread may `kill`.

    It is started at once; the first thing to ask is `Start`.
    """

    def __init__(self, memory: SharedFile) -> None:
        self._calls, calls = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._leash, leash = socket.socketpair()
        with calls, leash:
            descriptors = (calls.fileno(), leash.fileno(), memory.descriptor)
            search = os.pathsep.join(place or os.getcwd() for place in sys.path)
            self._process = subprocess.Popen(  # noqa: S603 - ourselves
                [sys.executable, "-m", MODULE, *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=2,  # what an engine prints is no output of ours
                env={**os.environ, "PYTHONPATH": search},
            )
        self._ending = threading.Lock()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it was not killed by `kill`."""
        return self._calls.fileno() >= 0

    def send(self, request: Request) -> None:
        """Say something.

        Raises:
            EngineFailure: the process has ended.
        """
        try:
            self._calls.send(messages.encode(request))
        except OSError as error:
            raise self._ended() from error

    def receive(self) -> Reply:
        """Wait for the answer.

        Raises:
            EngineFailure: the process has ended.
        """
        try:
            message = self._calls.recv(messages.MOST_BYTES)
        except OSError as error:
            raise self._ended() from error
        if not message:
            raise self._ended()
        return messages.read_reply(message)

    def kill(self) -> None:
        """End the process, whatever it is doing; who waits for its answer gets an error."""
        with self._ending:
            if self._calls.fileno() < 0:
                return
            self._process.kill()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:  # held up in the kernel: it ends when it comes back from there
                log.warning("the engine process %d was killed and has not ended yet", self.pid)
            self._calls.shutdown(socket.SHUT_RDWR)
            self._calls.close()
            self._leash.close()

    def _ended(self) -> EngineFailure:
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return EngineFailure(f"the engine process {self.pid} does not answer any more")
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        return EngineFailure(f"the engine process {self.pid} ended {how}")


class ProcessExecutor:
    """See `Executor`. `connection` was started with the artifact of `manifest`."""

    encode_wide = False

    def __init__(
        self, connection: EngineConnection, memory: SharedFile, manifest: Manifest, state_type: StateType
    ) -> None:
        self._connection, self._memory = connection, memory
        self._specs, self._split, self._state_type = manifest.state, manifest.split, state_type
        self._num_tasks = len(manifest.schema.tasks)
        self._scratch = _Scratch(memory)

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._connection.pid

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """The state of a history; for a model without one, the history itself."""
        if not self._split:
            return history
        self._scratch.reset()
        if into is None:
            into = empty_state(self._specs, history["history_item"].shape[2], self._state_type)
        shared = {name: self._shared(array) for name, array in into.items()}
        places = {name: self._place(array) for name, array in shared.items()}
        self._ask(Encode(self._inputs(history), places, self.encode_wide))
        for name, array in into.items():
            if shared[name] is not array:
                array[...] = shared[name]
        return into

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        """What A new events a block add to a state."""
        self._scratch.reset()
        tokens = new["history_item"].shape[2]
        made = {
            spec.name: self._scratch.array(dtype_of(spec, self._state_type), shape_of(spec, tokens))
            for spec in self._specs
        }
        into = {name: self._place(array) for name, array in made.items()}
        self._ask(Extend(self._state(state), self._inputs(new), into))
        return made

    def keep(self, mark: bytes) -> None:
        """The process keeps none: a state travels with each call."""

    def score(self, states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        """Logits (B, C, K) of all candidate rows, padding included; a copy."""
        self._scratch.reset()
        shape = (*candidates["candidate_item"].shape, self._num_tasks)
        logits: Float32Array = self._scratch.array(np.dtype(np.float32), shape)
        placed = tuple(self._state(state) for state in states)
        self._ask(Score(placed, self._inputs(candidates), self._place(logits)))
        return logits.copy()

    def close(self) -> None:
        """End the process; a call that is under way fails."""
        self._connection.kill()

    def _ask(self, request: Request) -> None:
        self._connection.send(request)
        reply = self._connection.receive()
        if isinstance(reply, Failed):
            raise raised(reply)

    def _state(self, state: UserState) -> PlacedState:
        return PlacedState(self._inputs(state.arrays), state.lengths)

    def _inputs(self, arrays: Mapping[str, Array]) -> dict[str, Place]:
        places = {}
        for name, array in arrays.items():
            offset = self._memory.offset_of(array) if array.flags.c_contiguous else None
            if offset is None:
                copied = self._scratch.array(array.dtype, array.shape)
                copied[...] = array
                places[name] = self._place(copied)
            else:
                places[name] = Place(offset, array.dtype.str, array.shape)
        return places

    def _shared(self, array: Array) -> Array:
        """An output's array if it lies in the file, else one of its shape that does."""
        if array.flags.c_contiguous and self._memory.offset_of(array) is not None:
            return array
        return self._scratch.array(array.dtype, array.shape)

    def _place(self, array: Array) -> Place:
        offset = self._memory.offset_of(array)
        if offset is None:
            raise EngineFailure(f"an array of shape {array.shape} is not in the memory that the engine process shares")
        return Place(offset, array.dtype.str, array.shape)


class _Scratch:
    """Memory of the shared file for the arrays of one call; it grows to what the largest call needed."""

    def __init__(self, memory: SharedFile) -> None:
        self._allocate = memory.allocate
        self._memory: Bytes = memory.allocate(SCRATCH_BYTES)
        self._used = 0
        self._outgrown: list[Bytes] = []

    def reset(self) -> None:
        """The next call begins: nobody reads the arrays of the one before any more."""
        self._used, self._outgrown = 0, []

    def array(self, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
        """An array of no particular content."""
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if self._used + size > self._memory.nbytes:
            self._outgrown.append(self._memory)
            self._memory, self._used = self._allocate(2 * max(self._memory.nbytes, size)), 0
        start, self._used = self._used, -(-(self._used + size) // 64) * 64
        array: Array = self._memory[start : start + size].view(dtype).reshape(shape)
        return array


def raised(reply: Failed) -> RankdError:
    """The error that was raised in the process."""
    kind = getattr(errors, reply.kind, EngineFailure)
    error: RankdError = kind(reply.message)
    return error
