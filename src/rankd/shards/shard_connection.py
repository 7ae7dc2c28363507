"""A client's connection, on the shard's side: it is let in, then its frames are read by a thread of its own.

In: a stream. Out: PoolJobs for `pool_queue.py`; what is about the connection itself is answered here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from rankd.errors import Overloaded, RankdError, ShardFailure, Trouble
from rankd.shards.frame_errors import error_payload
from rankd.shards.frames import TRACE_BYTES, UNLIMITED_US, Header, Kind, frame, read_header, read_payload
from rankd.shards.handshake import Ready, let_in
from rankd.shards.pool_queue import PoolJob, PoolQueue
from rankd.shards.shard_config import ShardServerConfig
from rankd.shards.shard_stats import ShardStats
from rankd.shards.streams import Stream

log = logging.getLogger("rankd")


class ShardConnection:
    """A client, from its first byte to its last."""

    def __init__(
        self,
        stream: Stream,
        ready: Ready,
        line: PoolQueue,
        stats: Callable[[], ShardStats],
        config: ShardServerConfig,
    ) -> None:
        self._stream, self._ready, self._line, self._stats, self._config = stream, ready, line, stats, config
        self._gone = False

    @property
    def gone(self) -> bool:
        """Whether nobody is there any more."""
        return self._gone

    def run(self) -> None:
        """Read until the client goes or breaks the protocol."""
        config = self._config
        try:
            self._stream.shake_hands(time.perf_counter() + config.handshake_seconds)
            let_in(self._stream, self._ready, config.security.secret, config.handshake_seconds)
            while True:
                header = read_header(self._stream, self._ready.max_request_bytes, None, config.frame_seconds)
                self._take(header, time.perf_counter())
        except RankdError as error:
            log.warning("shard: a client is let go: %s", error)
            self.answer(Kind.ERROR, 0, error_payload(error))
        except OSError as error:
            log.info("shard: a client has gone: %s", error)
        finally:
            self._gone = True
            self._stream.close()

    def answer(
        self,
        kind: Kind,
        number: int,
        payload: Sequence[memoryview] = (),
        taken_us: int = UNLIMITED_US,
        narrow: bool = False,
    ) -> None:
        """Send a frame; a client that does not take it is let go."""
        if self._gone:
            return
        try:
            answer = frame(kind, number, payload, taken_us, narrow=narrow)
            self._stream.send(answer, time.perf_counter() + self._config.answer_seconds)
        except OSError as error:
            log.info("shard: a client does not take its answer: %s", error)
            self.shut()

    def refuse(self, error: RankdError) -> None:
        """Say why the client is not let in, instead of `run`."""
        self.answer(Kind.ERROR, 0, error_payload(error))
        self._gone = True
        self._stream.close()

    def shut(self) -> None:
        """End it; `run` returns."""
        self._gone = True
        self._stream.shut()

    def _take(self, header: Header, arrived: float) -> None:
        payload = read_payload(self._stream, header, self._config.frame_seconds)
        if header.kind is Kind.POOL:
            deadline = None if header.budget_us == UNLIMITED_US else arrived + header.budget_us / 1e6
            begin = TRACE_BYTES if header.traced else 0
            trace = payload[:begin].tobytes()
            job = PoolJob(self, header.number, payload[begin:], arrived, deadline, trace, header.narrow)
            try:
                self._line.put(job)
            except Overloaded as error:
                self.answer(Kind.ERROR, header.number, error_payload(error))
        elif header.kind is Kind.PING:
            self.answer(Kind.PONG, header.number)
        elif header.kind is Kind.STATS:
            self.answer(Kind.STATS, header.number, [memoryview(msgspec.json.encode(self._stats()))])
        else:
            raise ShardFailure(f"a client does not send {header.kind.name}", Trouble.BROKEN)
