"""Handing rank requests to their ranker and booking how they ended, for whatever transport brought them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager

from starlette.requests import ClientDisconnect

from rankd.errors import Overloaded, RankdError, Unavailable
from rankd.observe.tracing import RequestTrace
from rankd.ranker import Ranker
from rankd.serve.repository import ModelRepository
from rankd.types import RankRequest, Scores

FAILURES = 500
"""HTTP statuses from here on are errors of the server; what the caller can mend is none in traces."""


def book_failure(repository: ModelRepository, ranker: Ranker | None, error: BaseException, started: float) -> None:
    """Count a failure; without a ranker it has no model, for a label is never of the caller's making."""
    labels = (ranker.manifest.name, ranker.manifest.version) if ranker is not None else ("", "")
    repository.metrics.failed(*labels, _outcome(error), time.perf_counter() - started)


def _outcome(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError | CancelledError | ClientDisconnect):
        return "Cancelled"
    return type(error).__name__ if isinstance(error, RankdError) else "InternalError"


class Booking:
    """A rank request on its way; `ranker` is who has it, as soon as somebody does."""

    def __init__(self, repository: ModelRepository, trace: RequestTrace | None) -> None:
        self._repository, self._trace = repository, trace
        self.ranker: Ranker | None = None

    def submit(self, request: RankRequest) -> Future[Scores]:
        """Give it to the ranker that it names; raises as `ModelRepository.get` and `Ranker.submit`."""
        ranker = self.ranker = self._repository.get(request.model, request.version)
        try:
            return ranker.submit(request, self._trace)
        except Overloaded:
            raise
        except Unavailable:  # it may have been unloaded since `get`, and another version be ready
            self.ranker = self._repository.get(request.model, request.version)
            if self.ranker is ranker:
                raise
            return self.ranker.submit(request, self._trace)


@contextmanager
def booked(repository: ModelRepository, trace: RequestTrace | None = None) -> Iterator[Booking]:
    """A Booking; what the block raises is counted as a failure of its ranker, and noted in the trace."""
    started, booking = time.perf_counter(), Booking(repository, trace)
    try:
        yield booking
    except (Exception, asyncio.CancelledError) as error:
        book_failure(repository, booking.ranker, error, started)
        if trace is not None and not (isinstance(error, RankdError) and error.http_status < FAILURES):
            trace.error = _outcome(error)
        raise
