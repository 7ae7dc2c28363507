"""Sums that are on their way: whoever asked waits here, for all shards at once, until the deadline.

In: the calls that `sharded_pooling.py` has sent. Out: `Pooled`. One thread, that which calls `result`, owns everything
here; connections put outcomes into its inbox. So a hedge or a second try goes out while somebody waits, not before.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.pooling import Pooled
from rankd.errors import DeadlineExceeded, InvalidRequest, RankdError, Unavailable
from rankd.shards.call_traces import CallTraces
from rankd.shards.client_counts import ClientCounts, Counted
from rankd.shards.frames import Kind
from rankd.shards.pool_frames import pool_payload
from rankd.shards.routing import RoutedCall, TablePlace
from rankd.shards.shard_client import NUMBERS, ShardClient
from rankd.shards.shard_link import Outcome, Question, ShardLink
from rankd.types import Array, Float32Array

MOST_REPLICAS = 3
"""Asked for one call: a request that breaks whoever reads it should not be shown to all."""


@dataclass(slots=True)
class PoolCall:
    """A call to one shard, and where it stands. `attempts`: by number, those that may still be answered."""

    client: ShardClient
    routed: RoutedCall
    payload: list[memoryview]
    begun: float = 0.0
    hedge_at: float = math.inf
    asked: list[ShardLink] = field(default_factory=list)
    attempts: dict[int, ShardLink] = field(default_factory=dict)
    answer: Array | None = None
    error: RankdError | None = None


class Pending:
    """Made by `ShardedPooling.begin`, which has sent the calls. Times are seconds of `time.perf_counter`."""

    def __init__(
        self,
        asked: JaggedIds,
        places: Sequence[TablePlace],
        defaults: Mapping[str, Float32Array],
        deadline: float,
        counts: ClientCounts,
    ) -> None:
        self._asked, self._places, self._defaults = asked, places, defaults
        self._deadline, self._counts = deadline, counts
        self._inbox: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._calls: list[PoolCall] = []
        self._waiting: dict[int, PoolCall] = {}
        self._traces = CallTraces()

    def send(self, client: ShardClient, routed: RoutedCall) -> None:
        """Ask a shard; `begin` does it for each.

        Raises:
            PayloadTooLarge: more than the shard takes.
        """
        started = time.perf_counter()
        call = PoolCall(client, routed, pool_payload(routed.net, routed.asked()), time.perf_counter())
        self._traces.serialised(client.name, started, call.begun)
        self._calls.append(call)
        self._counts.add(Counted.CALLS)
        if self._try(call):
            patience_s = min(client.hedging.delay_s, (self._deadline - call.begun) / 2)
            call.hedge_at = call.begun + patience_s
        else:
            call.error = client.failure()

    def result(self, deadline: float | None = None) -> Pooled:
        """The sums, by the deadline given to `begin` or an earlier one. To be called once.

        Raises:
            InvalidRequest: a shard says so.
            DeadlineExceeded: a table without a default was not there in time.
            Unavailable: a table without a default could not be had.
        """
        until = self._deadline if deadline is None else min(deadline, self._deadline)
        try:
            while self._waiting:
                wake = min(until, min(call.hedge_at for call in self._waiting.values()))
                try:
                    outcome = self._inbox.get(timeout=max(wake - time.perf_counter(), 0.0))
                except queue.Empty:
                    if time.perf_counter() >= until:
                        break
                    self._hedge()
                else:
                    self._take(outcome)
        finally:
            missed = time.perf_counter() >= until
            for number, call in self._waiting.items():
                call.attempts[number].forget(number, missed)
            self._traces.close()
        return self._assembled()

    def _try(self, call: PoolCall) -> bool:
        """Send a call to a replica that was not asked yet; whether there was one."""
        if len(call.asked) >= MOST_REPLICAS:
            return False
        number = next(NUMBERS)
        routed = call.routed
        trace = self._traces.begin(number, call.client.name, call.payload, len(call.asked))
        question = Question(number, Kind.POOL, call.payload, routed.answer_bytes, self._deadline, self._inbox, trace)
        link = call.client.ask(question, call.asked)
        if link is None:
            self._traces.drop(number)
            return False
        call.asked.append(link)
        call.attempts[number] = link
        self._waiting[number] = call
        return True

    def _hedge(self) -> None:
        now = time.perf_counter()
        for call in {id(call): call for call in self._waiting.values()}.values():
            if call.hedge_at <= now:
                call.hedge_at = math.inf
                others = call.client.replicas_up > len(call.asked)
                if others and call.client.hedging.allowed() and self._try(call):
                    self._counts.add(Counted.HEDGED)

    def _take(self, outcome: Outcome) -> None:
        self._traces.end(outcome)
        call = self._waiting.pop(outcome.number, None)
        if call is None:
            return
        del call.attempts[outcome.number]
        if outcome.payload is not None:
            call.answer = outcome.payload
            call.client.hedging.answered(time.perf_counter() - call.begun)
            for number, link in call.attempts.items():
                link.forget(number, missed=False)
                del self._waiting[number]
            call.attempts.clear()
            return
        call.error = outcome.error
        if isinstance(outcome.error, InvalidRequest):
            raise outcome.error
        if not call.attempts and self._try(call):
            self._counts.add(Counted.RETRIED)

    def _assembled(self) -> Pooled:
        samples, widths = self._asked.num_samples, [place.dim for place in self._places]
        ends = np.cumsum([0, *widths]).tolist()
        values = np.zeros((samples, ends[-1]), np.float32)
        sums: list[list[tuple[int, Float32Array]]] = [[] for _ in self._places]
        lost: dict[int, PoolCall] = {}
        for call in self._calls:
            if call.answer is None:
                for _, pieces in call.routed.blocks():
                    lost.update((piece.position, call) for piece in pieces)
                continue
            for position, remainder, piece in _pieces(call.routed, call.answer):
                sums[position].append((remainder, piece))
        self._check_lost(lost)
        for position, parts in enumerate(sums):
            columns = values[:, ends[position] : ends[position + 1]]
            if position in lost:
                columns[self._has_ids(position)] = self._defaults[self._asked.tables[position]]
                continue
            for _, piece in sorted(parts, key=lambda part: part[0]):  # one order, whoever came first
                columns += piece
        degraded = tuple(self._asked.tables[position] for position in sorted(lost))
        self._counts.add(Counted.DEGRADED_TABLES, len(degraded))
        return Pooled(values, degraded)

    def _has_ids(self, position: int) -> Array:
        samples = self._asked.num_samples
        return np.diff(self._asked.offsets[position * samples : (position + 1) * samples + 1]) > 0

    def _check_lost(self, lost: Mapping[int, PoolCall]) -> None:
        calls = {self._asked.tables[position]: call for position, call in sorted(lost.items())}
        missing = [table for table in calls if table not in self._defaults]
        if not missing:
            return
        self._counts.add(Counted.FAILED)
        errors = [calls[table].error for table in missing]
        what = f"{len(missing)} tables ({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''})"
        hint = "give them defaults if an answer without them is better than none"
        for error in errors:
            if error is not None and not isinstance(error, DeadlineExceeded):
                raise Unavailable(f"{what} could not be had: {error}; {hint}") from error
        shards = sorted({calls[table].client.name for table in missing})
        raise DeadlineExceeded(
            f"{what} of the shards {', '.join(shards)} were not there in time: allow more, or {hint}"
        )


def _pieces(routed: RoutedCall, answer: Array) -> list[tuple[int, int, Float32Array]]:
    """Position, remainder and sums (B or 1, dim) of each part in an answer."""
    numbers: Float32Array = answer.view("<f4")
    found, begin = [], 0
    for samples, pieces in routed.blocks():
        width = sum(piece.dim for piece in pieces)
        block = numbers[begin : begin + samples * width].reshape(samples, width)
        begin += samples * width
        column = 0
        for piece in pieces:
            found.append((piece.position, piece.remainder, block[:, column : column + piece.dim]))
            column += piece.dim
    return found
