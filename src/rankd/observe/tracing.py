"""What a traced request notes on its way. `span_export.py` makes spans of it when the answer has left.

In: the laps of its stage clock, and notes of what happened within them. Out: `SpanNote`s, a tree. A request that is not
traced has None in place of its trace and notes nothing. Times are seconds of `time.perf_counter`.

    POST /v1/rank ── read, queue, features, encode, features, score, order, write
                                              |                 |
                                              look-up           score call, one for each call of the engine
                                              |
                                              serialise, shard call ── in the shard: queue, look-up, write
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated, Protocol

import msgspec

from rankd.observe.clocks import StageClock
from rankd.types import RankRequest, Scores

Attribute = str | int | float | bool
Attributes = Mapping[str, Attribute]
TRACE_HEADER = "x-trace-id"
"""Of answers to traced requests: 32 hexadecimal digits."""


class TracingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Spans for an OpenTelemetry collector, over OTLP/HTTP (extra `tracing`).

    `endpoint` is the collector's base address ("http://localhost:4318"). `sample_ratio` is the share of requests that
    are traced; where a caller has decided (`traceparent`) it is as the caller says. `service_name` names this process.
    What is left out is as the OTEL_* variables say, or the SDK's default. On a stop spans have `flush_seconds` to be
    sent.
    """

    enabled: bool = False
    endpoint: str = ""
    sample_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    service_name: str = ""
    flush_seconds: Annotated[float, msgspec.Meta(gt=0)] = 5.0


class SpanKind(Enum):
    """Which side of a call a span is."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"


def new_span_id() -> int:
    """A random one of 64 bits, never 0."""
    return random.getrandbits(64) or 1


@dataclass(frozen=True, slots=True)
class SpanNote:
    """Something that happened from `begin` to `end`. `parent_id` 0: the lap that it happened in, or else the
    request."""

    name: str
    begin: float
    end: float
    attributes: Attributes = field(default_factory=dict)
    kind: SpanKind = SpanKind.INTERNAL
    parent_id: int = 0
    span_id: int = field(default_factory=new_span_id)
    error: str = ""


@dataclass(slots=True, eq=False)
class RequestTrace:
    """A traced request, or a call in a shard. `parent_id` 0: nobody called it in this trace. Any thread may note."""

    name: str
    trace_id: int
    started: float
    parent_id: int = 0
    trace_state: str = ""
    clock: StageClock | None = None
    notes: list[SpanNote] = field(default_factory=list)
    attributes: dict[str, Attribute] = field(default_factory=dict)
    error: str = ""
    span_id: int = field(default_factory=new_span_id)

    @property
    def shown_id(self) -> str:
        """The trace's id as people and collectors write it."""
        return f"{self.trace_id:032x}"

    def submitted(self, request: RankRequest, clock: StageClock) -> None:
        """A ranker has the request, and times it with this clock, which keeps its laps."""
        self.clock = clock
        self.attributes["rankd.candidates"] = len(request.candidates)
        if request.request_id:
            self.attributes["rankd.request_id"] = request.request_id

    def answered(self, scores: Scores) -> None:
        """Say what was answered."""
        self.attributes |= {"rankd.model": scores.model, "rankd.version": scores.version, "rankd.state": scores.state}
        if scores.degraded:
            self.attributes["rankd.degraded"] = ",".join(scores.degraded)

    def spans(self, ended: float) -> list[SpanNote]:
        """Everything below the request, which ended now: its laps, then what was noted."""
        laps = self._laps(ended)
        notes = [replace(note, parent_id=note.parent_id or self._parent_of(note, laps)) for note in tuple(self.notes)]
        return [*laps, *notes]

    def _laps(self, ended: float) -> list[SpanNote]:
        if self.clock is None:
            return []
        laps = self.clock.laps
        last = laps[-1].end if laps else self.clock.started
        stages = ("read", self.started, self.clock.started), *laps, ("write", last, ended)
        return [SpanNote(stage, begin, end, parent_id=self.span_id) for stage, begin, end in stages]

    def _parent_of(self, note: SpanNote, laps: list[SpanNote]) -> int:
        within = (lap.span_id for lap in laps if lap.begin <= note.begin and note.end <= lap.end)
        return next(within, self.span_id)


class Traces(Protocol):
    """Decides which requests are traced, and takes them when they are over. Thread-safe."""

    def begin(self, name: str, headers: Mapping[str, str]) -> RequestTrace | None:
        """A request has come, with these headers (lower case); its trace if it is to have one."""
        ...

    def end(self, trace: RequestTrace) -> None:
        """A request is over, and its answer has left. Waits for nobody."""
        ...

    def close(self) -> None:
        """Send what is left, for a limited time."""
        ...


def open_traces(config: TracingConfig, service: str) -> Traces | None:
    """Traces as configured; None if nothing is. `service` is the name where neither configuration nor environment has
    one.

    Raises:
        MissingExtra: the packages of tracing are not installed.
    """
    if not config.enabled:
        return None
    from rankd.observe.span_export import ExportedTraces

    return ExportedTraces(config, service)


@dataclass(frozen=True, slots=True)
class OpenSpan:
    """A span that has begun, so that others can be below it."""

    trace: RequestTrace
    name: str
    begin: float
    span_id: int

    def end(self) -> None:
        """Note it."""
        self.trace.notes.append(SpanNote(self.name, self.begin, time.perf_counter(), span_id=self.span_id))


_OPEN: ContextVar[OpenSpan | None] = ContextVar("rankd_open_span", default=None)
"""Look-ups go through interfaces that know no requests (`TableSource`): what they note finds its parent here."""


def open_span() -> OpenSpan | None:
    """The span of the `opened` block that this thread is in, if any."""
    return _OPEN.get()


@contextmanager
def opened(trace: RequestTrace | None, name: str) -> Iterator[OpenSpan | None]:
    """A span, of a traced request. What is begun in this block is below it, also what ends later; whoever knows when it
    is over ends it."""
    if trace is None:
        yield None
        return
    span = OpenSpan(trace, name, time.perf_counter(), new_span_id())
    token = _OPEN.set(span)
    try:
        yield span
    finally:
        _OPEN.reset(token)
