"""The work of a shard: requests of all connections wait in one bounded line, and a few threads pool.

In: PoolJob. Out: a POOLED or ERROR frame on the job's connection, as soon as it is done: in order of completion, for
frames are numbered, and a short request need not wait for a long one that came before on the same connection.

Whoever reads does not pool: several requests of one connection are worked on at once, and while they are, their time in
the line is known, pings are answered and goodbyes said. To hand a request over takes 5 % of a small call.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rankd.embeddings.pooling import Pooling
from rankd.errors import DeadlineExceeded, EngineFailure, InvalidRequest, Overloaded, RankdError
from rankd.observe.tracing import Traces
from rankd.shards.call_traces import shard_trace
from rankd.shards.frame_errors import RETRY_AFTER_S, error_payload
from rankd.shards.frames import UNLIMITED_US, Kind
from rankd.shards.pool_frames import read_pool
from rankd.shards.shard_config import ShardServerConfig
from rankd.shards.shard_layout import ServedNet
from rankd.shards.shard_stats import Ending, ShardTally
from rankd.types import Array, Float32Array

CLOSE_S = 2.0

log = logging.getLogger("rankd")


class Asker(Protocol):
    """The connection that a request came on."""

    @property
    def gone(self) -> bool:
        """Whether nobody is there any more."""
        ...

    def answer(self, kind: Kind, number: int, payload: Sequence[memoryview], taken_us: int, narrow: bool) -> None:
        """Send a frame, and how long it took; nothing if nobody is there any more. `narrow`: its sums are bfloat16."""
        ...


@dataclass(frozen=True, slots=True)
class PoolJob:
    """A request, with the time when its header had come and its deadline (seconds of `time.perf_counter`), and the
    trace that came with it, empty if it is not traced. `narrow`: its sums are wanted in bfloat16."""

    asker: Asker
    number: int
    payload: Array
    arrived: float
    deadline: float | None
    trace: bytes = b""
    narrow: bool = False


class PoolQueue:
    """Requests that wait, and the threads that pool."""

    def __init__(
        self,
        pooling: Pooling,
        nets: tuple[ServedNet, ...],
        config: ShardServerConfig,
        tally: ShardTally,
        traces: Traces | None = None,
    ) -> None:
        # Imported here, not by the first request: it brings numba, which takes half a second.
        from rankd.shards.answer_kernels import narrow_sums

        self._pooling, self._nets, self._config, self._tally, self._traces = pooling, nets, config, tally, traces
        self._narrow_sums = narrow_sums
        self._jobs: queue.SimpleQueue[PoolJob | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the two counts
        self._waiting = self._waiting_bytes = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"shard-pool-{number}", daemon=True)
            for number in range(config.workers)
        ]

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return self._waiting

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Do what is in the line, then end. A look-up that hangs is not waited for."""
        for _ in self._threads:
            self._jobs.put(None)
        until = time.perf_counter() + CLOSE_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(until - time.perf_counter(), 0.0))

    def put(self, job: PoolJob) -> None:
        """Stand in the line.

        Raises:
            Overloaded: it is full.
        """
        config = self._config
        with self._lock:
            if (
                self._waiting >= config.max_waiting
                or self._waiting_bytes + job.payload.nbytes > config.max_waiting_bytes
            ):
                self._tally.ended(Ending.FULL)
                raise Overloaded(
                    f"{self._waiting} requests of {self._waiting_bytes} bytes are waiting; allowed are "
                    f"{config.max_waiting} and {config.max_waiting_bytes} bytes: ask another replica, or later",
                    RETRY_AFTER_S,
                )
            self._waiting += 1
            self._waiting_bytes += job.payload.nbytes
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                self._waiting -= 1
                self._waiting_bytes -= job.payload.nbytes
            begun = time.perf_counter()
            ending, answer = self._served(job, begun)
            # Counted before it is sent: who has an answer finds it in the counts.
            done = time.perf_counter()
            self._tally.ended(ending, begun - job.arrived, done - begun)
            taken_us = min(int((done - job.arrived) * 1e6), UNLIMITED_US - 1)
            answered = ending is Ending.ANSWERED
            kind, narrow = Kind.POOLED if answered else Kind.ERROR, answered and job.narrow
            job.asker.answer(kind, job.number, answer, taken_us, narrow)
            if job.trace and self._traces is not None:
                self._traces.end(shard_trace(job.trace, job.arrived, begun, done, ending))

    def _served(self, job: PoolJob, now: float) -> tuple[Ending, list[memoryview]]:
        """How a request ended, and the payload that says so."""
        if job.asker.gone:
            return Ending.GONE, []
        try:
            if job.deadline is not None and now >= job.deadline:
                raise DeadlineExceeded(
                    f"the request waited {(now - job.arrived) * 1e3:.1f} ms, and its time is over: allow more, or ask "
                    "for less at once"
                )
            return Ending.ANSWERED, self._pooled(job)
        except RankdError as error:
            return _ending_of(error), error_payload(error)
        except Exception as error:  # the edge: a worker has to go on, whatever a table does
            log.exception("shard: a request failed")
            return Ending.FAILED, error_payload(EngineFailure(f"the look-up failed: {type(error).__name__}: {error}"))

    def _pooled(self, job: PoolJob) -> list[memoryview]:
        request = read_pool(job.payload.data, self._nets, self._config.max_answer_bytes, job.narrow)
        answer = []
        for asked in request.blocks:
            sums: Array = np.ascontiguousarray(self._pooling.pool(asked), "<f4")
            self._tally.pooled(len(asked.ids), asked.num_samples * len(asked.tables))
            if job.narrow:
                sums = self._narrowed(sums)
            if sums.nbytes:
                answer.append(sums.data.cast("B"))
        return answer

    def _narrowed(self, sums: Float32Array) -> Array:
        """In bfloat16, as uint16."""
        halves = np.empty(sums.size, "<u2")
        self._narrow_sums(sums.reshape(-1).view(np.uint32), halves)
        return halves


def _ending_of(error: RankdError) -> Ending:
    if isinstance(error, DeadlineExceeded):
        return Ending.LATE
    return Ending.INVALID if isinstance(error, InvalidRequest) else Ending.FAILED
