"""Traces over gRPC. A unary RPC's trace ends when the RPC has ended, so after its answer has been sent; of a stream
each request has one of its own, which ends when its answer has been taken.

The trailing metadata of a traced unary RPC says its trace's id (`x-trace-id`), as an error's does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from rankd.observe.tracing import TRACE_HEADER, RequestTrace, Traces


class TracedRpcs:
    """Traces of RPCs; none where there are no `traces`."""

    def __init__(self, traces: Traces | None) -> None:
        self._traces = traces

    def begin(self, method: str, context: grpc.ServicerContext) -> RequestTrace | None:
        """A unary RPC has come; its trace if it is to have one, which ends by itself."""
        traces, trace = self._traces, self._begin(method, context)
        if traces is None or trace is None:
            return None

        def end() -> None:
            trace.attributes["rpc.grpc.status_code"] = _code(context)
            traces.end(trace)

        add_trailing(context, TRACE_HEADER, trace.shown_id)
        if not context.add_callback(end):  # it is over already: its client has gone
            end()
        return trace

    @contextmanager
    def of_stream(self, method: str, context: grpc.ServicerContext) -> Iterator[RequestTrace | None]:
        """The trace of a block that answers one request of a stream."""
        trace = self._begin(method, context)
        try:
            yield trace
        finally:
            if self._traces is not None and trace is not None:
                self._traces.end(trace)

    def _begin(self, method: str, context: grpc.ServicerContext) -> RequestTrace | None:
        if self._traces is None:
            return None
        wanted = ("traceparent", "tracestate")
        headers = {str(k): str(v) for k, v in context.invocation_metadata() if k in wanted}
        trace = self._traces.begin(method, headers)
        if trace is not None:
            trace.attributes |= {"rpc.system": "grpc", "rpc.method": method}
        return trace


def add_trailing(context: grpc.ServicerContext, name: str, value: str) -> None:
    """Say something more behind an answer or an error."""
    context.set_trailing_metadata((*(context.trailing_metadata() or ()), (name, value)))


def shown_trace(context: grpc.ServicerContext) -> str:
    """Words for the log on an RPC that is traced; none on another one."""
    said = {name: value for name, value in context.trailing_metadata() or () if isinstance(value, str)}
    return f" (trace {said[TRACE_HEADER]})" if TRACE_HEADER in said else ""


def _code(context: grpc.ServicerContext) -> int:
    """The number of the status that an RPC ended with."""
    code: grpc.StatusCode | None = context.code()  # type: ignore[attr-defined]  # its published types leave it out
    number: int = (code or grpc.StatusCode.OK).value[0]
    return number
