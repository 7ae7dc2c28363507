"""What the calls of a look-up note in the trace of its request, on both sides of the connection.

Here each call is a span below the look-up, also one that is sent to a second replica. Its ids go with it, so that what
the shard exports is below it: the shard's queue, look-up and write. `rankd.shard_ms` is what the shard says that it
took (an older one does not), `rankd.network_ms` what is left of the call: the wire, and both connections' threads.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass

from rankd.observe.tracing import Attribute, RequestTrace, SpanKind, SpanNote, new_span_id, open_span
from rankd.shards.shard_link import Outcome
from rankd.shards.shard_stats import Ending

_IDS = struct.Struct(">QQQ")
_LOW = 2**64 - 1


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that is under way."""

    span_id: int
    begin: float
    about: dict[str, Attribute]


class CallTraces:
    """The calls of one look-up; nothing is noted where its request is not traced. Not thread-safe."""

    def __init__(self) -> None:
        self._span = open_span()
        self._calls: dict[int, _Call] = {}

    def serialised(self, begin: float, end: float) -> None:
        """The payloads of all calls were made."""
        if self._span is not None:
            self._note(SpanNote("serialise", begin, end, parent_id=self._span.span_id))

    def begin(self, number: int, shard: str, num_bytes: int, tried: int) -> bytes:
        """A call with so many bytes is sent, after so many others for the same; the trace that goes with it."""
        if self._span is None:
            return b""
        about: dict[str, Attribute] = {"rankd.shard": shard, "rankd.tried_before": tried}
        about["rankd.request_bytes"] = num_bytes
        call = self._calls[number] = _Call(new_span_id(), time.perf_counter(), about)
        return pack_trace(self._span.trace.trace_id, call.span_id)

    def end(self, outcome: Outcome) -> None:
        """A call is answered, or has failed."""
        if (call := self._calls.pop(outcome.number, None)) is None:
            return
        ended, about = time.perf_counter(), call.about
        if outcome.payload is not None:
            about["rankd.answer_bytes"] = outcome.payload.nbytes
        if outcome.taken_us is not None:
            about["rankd.shard_ms"] = outcome.taken_us / 1e3
            about["rankd.network_ms"] = max((ended - call.begin) * 1e3 - outcome.taken_us / 1e3, 0.0)
        self._close(call, ended, "" if outcome.error is None else type(outcome.error).__name__)

    def drop(self, number: int) -> None:
        """A call that was begun could not be sent to anybody."""
        self._calls.pop(number, None)

    def close(self) -> None:
        """Nobody waits any more for those that are still under way."""
        for call in self._calls.values():
            self._close(call, time.perf_counter(), "Forgotten")
        self._calls.clear()

    def _close(self, call: _Call, ended: float, error: str) -> None:
        if self._span is not None:
            parent_id = self._span.span_id
            note = SpanNote(
                "shard call", call.begin, ended, call.about, SpanKind.CLIENT, parent_id, call.span_id, error
            )
            self._note(note)

    def _note(self, note: SpanNote) -> None:
        if self._span is not None:
            self._span.trace.notes.append(note)


def pack_trace(trace_id: int, span_id: int) -> bytes:
    """The 24 bytes that go before a POOL: both ids, big end first."""
    return _IDS.pack(trace_id >> 64, trace_id & _LOW, span_id)


def shard_trace(packed: bytes, arrived: float, begun: float, done: float, ending: Ending) -> RequestTrace:
    """The trace of a call that a shard has answered, now, from the ids that came with it."""
    high, low, parent_id = _IDS.unpack(packed)
    trace = RequestTrace("shard", high << 64 | low, arrived, parent_id)
    trace.attributes["rankd.ending"] = ending.value
    trace.error = "" if ending in (Ending.ANSWERED, Ending.INVALID) else ending.value
    sent = time.perf_counter()
    spans = ("queue", arrived, begun), ("look-up", begun, done), ("write", done, sent)
    trace.notes += [SpanNote(name, begin, end) for name, begin, end in spans]
    return trace
