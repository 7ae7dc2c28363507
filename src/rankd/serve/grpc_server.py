"""The gRPC server: the Open Inference Protocol and rankd's own service, on the same path as HTTP.

In: messages. Out: messages, or a status with the error's code and words; an overloaded server also says when to come
back (`retry-after-ms` in the trailing metadata). The deadline of an RPC is a request's `timeout_ms`, whichever is
earlier; an RPC that is cancelled leaves the schedule at once. A thread serves an RPC from its first byte to its last:
`CALLS` at once, of which `RANKING` may wait for scores; more are refused with RESOURCE_EXHAUSTED. Who asks whether the
server is ready is answered by one of the others, however many requests wait.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import grpc

from rankd.errors import ConfigError, Overloaded, RankdError
from rankd.observe.tracing import RequestTrace
from rankd.serve import grpc_inference, grpc_ranking
from rankd.serve.booking import book_failure, booked
from rankd.serve.grpc_inference import Information
from rankd.serve.messages import message, methods
from rankd.serve.repository import ModelRepository
from rankd.serve.settings import ServeConfig
from rankd.serve.traced_rpcs import TracedRpcs, add_trailing, shown_trace
from rankd.types import RankRequest, Scores

log = logging.getLogger("rankd")
CALLS, RANKING = 128, 112
FULL_S = 0.1
"""After which to try again where RANKING wait: one of them is answered sooner."""
MOST_WORDS = 1000
"""Of an error: a status travels in metadata, whose size is limited."""
FOREVER_S = 1e9
Handler = Callable[[Any, grpc.ServicerContext], Any]


class GrpcServer:
    """A server over a repository, which is started and closed by whoever runs it. `port` is where it listens."""

    def __init__(self, repository: ModelRepository, config: ServeConfig, port: int) -> None:
        """Bind the address.

        Raises:
            ConfigError: it is taken, or not ours.
        """
        self._repository, self._traces = repository, TracedRpcs(repository.traces)
        self._threads = ThreadPoolExecutor(CALLS, "rankd-grpc")
        self._room = threading.BoundedSemaphore(RANKING)
        options = [
            ("grpc.max_receive_message_length", config.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ]
        self._server = grpc.server(self._threads, options=options, maximum_concurrent_rpcs=CALLS)
        self._server.add_generic_rpc_handlers((self._inference(), self._ranking()))
        host = f"[{config.host}]" if ":" in config.host else config.host
        try:
            self.port = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            self._threads.shutdown()
            raise ConfigError(
                f"cannot listen on {host}:{port} for gRPC: {error}; choose another with grpc_port, 0 takes a free one"
            ) from error

    def start(self) -> None:
        """Answer."""
        self._server.start()

    def drain(self, grace_s: float) -> None:
        """Take no more from now on, and give those that are being answered so long."""
        self._server.stop(grace_s)

    def close(self, grace_s: float) -> None:
        """Take no more, give those that are being answered so long, and end. `drain` may have come before."""
        self._server.stop(grace_s).wait()
        self._threads.shutdown()

    def _inference(self) -> Any:
        information = Information(self._repository)
        handlers: dict[str, Handler] = {"ModelInfer": self._infer, "ModelStreamInfer": self._stream}
        for name in methods(grpc_inference.SERVICE):
            if name not in handlers:
                handlers[name] = partial(_answered, getattr(information, _snake(name)), name)
        return _generic(grpc_inference.SERVICE, handlers)

    def _ranking(self) -> Any:
        append = partial(grpc_ranking.append_events, self._repository)
        events = partial(_answered, append, "AppendEvents", service=grpc_ranking.SERVICE)
        return _generic(grpc_ranking.SERVICE, {"Rank": self._rank, "AppendEvents": events})

    def _infer(self, request: Any, context: grpc.ServicerContext) -> Any:
        trace = self._traces.begin(f"{grpc_inference.SERVICE}/ModelInfer", context)

        def infer() -> Any:
            with self._a_place():
                return self._infer_one(request, context, _Cancelling(context), trace)

        return _guarded(infer, context)

    def _infer_one(
        self, request: Any, context: grpc.ServicerContext, cancelling: _Cancelling, trace: RequestTrace | None
    ) -> Any:
        header, decoded = self._decoded(grpc_inference.decode_infer, request)
        return grpc_inference.encode_infer(self._rank_with(decoded, context, cancelling, trace), header)

    def _stream(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """One after the other; an error is an answer, and the stream goes on. It has its place as long as it lives."""
        answer, cancelling = message("inference.ModelStreamInferResponse"), _Cancelling(context)
        with ExitStack() as held:
            _guarded(lambda: held.enter_context(self._a_place()), context)
            for request in requests:
                with self._traces.of_stream(f"{grpc_inference.SERVICE}/ModelStreamInfer", context) as trace:
                    try:
                        yield answer(infer_response=self._infer_one(request, context, cancelling, trace))
                    except RankdError as error:
                        yield answer(error_message=str(error))
                    except CancelledError:
                        return

    def _rank(self, request: Any, context: grpc.ServicerContext) -> Any:
        trace = self._traces.begin(f"{grpc_ranking.SERVICE}/Rank", context)

        def rank() -> Any:
            with self._a_place():
                decoded = self._decoded(grpc_ranking.decode_rank, request)
                return grpc_ranking.encode_scores(self._rank_with(decoded, context, _Cancelling(context), trace))

        return _guarded(rank, context)

    @contextmanager
    def _a_place(self) -> Iterator[None]:
        """One of those who may wait for scores.

        Raises:
            Overloaded: all are taken.
        """
        if not self._room.acquire(blocking=False):
            raise Overloaded(
                f"{RANKING} RPCs are waiting for scores, and no more are taken: try again in {FULL_S} s", FULL_S
            )
        try:
            yield
        finally:
            self._room.release()

    def _decoded(self, decode: Callable[[Any], Any], request: Any) -> Any:
        started = time.perf_counter()
        try:
            return decode(request)
        except RankdError as error:
            book_failure(self._repository, None, error, started)
            raise

    def _rank_with(
        self, request: RankRequest, context: grpc.ServicerContext, cancelling: _Cancelling, trace: RequestTrace | None
    ) -> Scores:
        """Rank within what is left of the RPC's time, and book how it ended."""
        left_s, own = context.time_remaining(), request.timeout_ms
        # One without a deadline has 300 billion years. What is wrong by itself is for the ranker to refuse.
        if left_s is not None and left_s < FOREVER_S and (own is None or own > left_s * 1e3):
            request = replace(request, timeout_ms=max(left_s * 1e3, 1e-3))
        with booked(self._repository, trace) as booking:
            scores = cancelling.result(booking.submit(request))
        self._repository.metrics.succeeded(scores)
        if trace is not None:
            trace.answered(scores)
        return scores


class _Cancelling:
    """Cancels what an RPC waits for when it ends before that. A stream has one for all its requests: gRPC keeps what it
    is to call, and what that holds, until the RPC is over."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._future: Future[Scores] | None = None
        self._gone = not context.add_callback(self._end)

    def result(self, future: Future[Scores]) -> Scores:
        """The scores."""
        self._future = future
        if self._gone:
            future.cancel()
        try:
            return future.result()
        finally:
            self._future = None

    def _end(self) -> None:
        self._gone = True
        future = self._future
        if future is not None:
            future.cancel()


def _answered(
    ask: Callable[[Any], dict[str, Any]],
    method: str,
    request: Any,
    context: grpc.ServicerContext,
    service: str = grpc_inference.SERVICE,
) -> Any:
    """A method that gives the fields of its response."""
    return _guarded(lambda: methods(service)[method][1](**ask(request)), context)


def _guarded(answer: Callable[[], Any], context: grpc.ServicerContext) -> Any:
    """An answer, or the status that its error becomes."""
    try:
        return answer()
    except RankdError as error:
        if isinstance(error, Overloaded):
            add_trailing(context, "retry-after-ms", str(int(error.retry_after_s * 1e3) + 1))
        context.abort(getattr(grpc.StatusCode, error.grpc_code), str(error)[:MOST_WORDS])
    except CancelledError:
        context.abort(grpc.StatusCode.CANCELLED, "the request was cancelled")
    except Exception:
        log.exception("an RPC failed%s", shown_trace(context))
        context.abort(grpc.StatusCode.INTERNAL, "the server failed on this request; its log says why")


def _generic(service: str, handlers: dict[str, Handler]) -> Any:
    made = {}
    for name, (asked, given, streams) in methods(service).items():
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        made[name] = make(handlers[name], asked.FromString, given.SerializeToString)
    return grpc.method_handlers_generic_handler(service, made)


def _snake(name: str) -> str:
    """ModelReady -> model_ready."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
