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
from rankd.serve.elastic_model import ElasticModel
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
        self._elastic: ElasticModel | None = None
        self.ranker: Ranker | None = None

    def submit(self, request: RankRequest) -> Future[Scores]:
        """Give it to the ranker that it names, or where it names no version of an elastic model to the one that is to
        answer now; raises as `ModelRepository.get` and `Ranker.submit`."""
        ranker = self.ranker = self._repository.get(request.model, request.version)
        elastic = self._elastic = None if request.version else self._repository.elastic.of(ranker)
        try:
            if elastic is not None:
                ranker = self.ranker = elastic.choose(request, ranker)
            return ranker.submit(request, self._trace)
        except Overloaded:
            lighter = None if elastic is None else elastic.refused(request, ranker)
            if lighter is None:
                raise
            self.ranker = lighter
            return lighter.submit(request, self._trace)
        except Unavailable:  # it may have been unloaded since `get`, and another version be ready
            self.ranker = self._repository.get(request.model, request.version)
            if self.ranker is ranker:
                raise
            return self.ranker.submit(request, self._trace)

    def answered(self) -> None:
        """The scores are there."""
        if self._elastic is not None and self.ranker is not None:
            self._elastic.answered(self.ranker)


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
    booking.answered()
