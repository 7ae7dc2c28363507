"""A target whose executors are processes of their own: each compiles the artifact for itself, on its own cpus.

In: an artifact, the configuration of an engine. Out: executors, and the memory that they share with this process. A
crash takes one executor and the call that it was at; one that hangs can be ended. What it costs (docs/log.md) is a copy
of the weights for each, though the kernel shares what is mapped from disk, a process, and two messages a call.
"""

from __future__ import annotations

import threading
from functools import partial

import msgspec

from rankd.artifact import Artifact
from rankd.engine.backend import EngineConfig, GpuStates, Isolation, Pinning, Precision, StateType, plan_threads
from rankd.engine.processes.engine_messages import Failed, Start, Started
from rankd.engine.processes.process_executor import EngineConnection, ProcessExecutor, raised
from rankd.engine.processes.shared_file import SharedFile
from rankd.engine.thread_plan import Cpus
from rankd.errors import EngineFailure
from rankd.types import Allocate


class ProcessBackend:
    """Processes that are started with the same artifact and configuration, all at once."""

    def __init__(self, artifact: Artifact, config: EngineConfig, state_type: StateType | None) -> None:
        self.plan = plan_threads(config)
        self.num_executors = self.plan.num_executors
        self._manifest, self._made, self._lock = artifact.manifest, 0, threading.Lock()
        self._closed = False
        self._memory = SharedFile()
        self.host_memory: Allocate | None = self._memory.allocate
        self.gpu_states: GpuStates | None = None
        self.speed: tuple[float, ...] | None = None  # of processes on one GPU it is not measured
        wide = config.wide_threads(self.num_executors)
        own = msgspec.structs.replace(
            config, isolation=Isolation.THREADS, executors=1, pinning=Pinning.OFF, encode_threads=wide,
            gpu_state_mib=0, calls_in_flight=1,
        )  # fmt: skip
        self._start = partial(Start, str(artifact.path.resolve()), own, state_type)
        self._connections: list[EngineConnection] = []
        try:
            starting = [self._begin(cpus) for cpus in self.plan.cpus]
            started = [_finish(connection) for connection in starting]
        except BaseException:
            self.close()
            raise
        self._ready, first = starting, started[0]
        self.target, self.precision, self.state_type = first.target, Precision(first.precision), first.state_type
        self._memory_bytes = sum(one.memory_bytes for one in started)

    def executor(self) -> ProcessExecutor:
        """One of those that were started, or another one.

        Raises:
            EngineFailure: it could not be started.
        """
        with self._lock:
            number, self._made = self._made, self._made + 1
            connection = self._ready[number] if number < len(self._ready) else None
        if connection is None:
            connection = self._begin(self.plan.cpus[number % self.num_executors])
            try:
                _finish(connection)
            except BaseException:
                connection.kill()
                raise
        return ProcessExecutor(connection, self._memory, self._manifest, self.state_type)

    def memory_bytes(self) -> int:
        """Bytes of weights in all processes."""
        return self._memory_bytes

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._closed = True
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.kill()
        self._memory.close()

    def _begin(self, cpus: Cpus | None) -> EngineConnection:
        with self._lock:
            if self._closed:
                raise EngineFailure("this model is closed, and starts no engine any more")
            connection = EngineConnection(self._memory)
            self._connections = [one for one in self._connections if one.alive] + [connection]
        connection.send(self._start(tuple(sorted(cpus or ()))))
        return connection


def _finish(connection: EngineConnection) -> Started:
    reply = connection.receive()
    if isinstance(reply, Failed):
        raise raised(reply)
    if not isinstance(reply, Started):
        raise EngineFailure(f"the engine process {connection.pid} answered its start with {reply}")
    return reply
