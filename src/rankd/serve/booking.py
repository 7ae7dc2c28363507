"""Handing rank requests to their ranker and booking how they ended, for whatever transport brought them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager

from starlette.requests import ClientDisconnect

from rankd.errors import Overloaded, RankdError, Unavailable
from rankd.ranker import Ranker
from rankd.serve.repository import ModelRepository
from rankd.types import RankRequest, Scores


def book_failure(repository: ModelRepository, ranker: Ranker | None, error: BaseException, started: float) -> None:
    """Count a failure; without a ranker it has no model, for a label is never of the caller's making."""
    labels = (ranker.manifest.name, ranker.manifest.version) if ranker is not None else ("", "")
    if isinstance(error, asyncio.CancelledError | CancelledError | ClientDisconnect):
        outcome = "Cancelled"
    else:
        outcome = type(error).__name__ if isinstance(error, RankdError) else "InternalError"
    repository.metrics.failed(*labels, outcome, time.perf_counter() - started)


class Booking:
    """A rank request on its way; `ranker` is who has it, as soon as somebody does."""

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository
        self.ranker: Ranker | None = None

    def submit(self, request: RankRequest) -> Future[Scores]:
        """Give it to the ranker that it names; raises as `ModelRepository.get` and `Ranker.submit`."""
        ranker = self.ranker = self._repository.get(request.model, request.version)
        try:
            return ranker.submit(request)
        except Overloaded:
            raise
        except Unavailable:  # it may have been unloaded since `get`, and another version be ready
            self.ranker = self._repository.get(request.model, request.version)
            if self.ranker is ranker:
                raise
            return self.ranker.submit(request)


@contextmanager
def booked(repository: ModelRepository) -> Iterator[Booking]:
    """A Booking; what the block raises is counted as a failure of its ranker."""
    started, booking = time.perf_counter(), Booking(repository)
    try:
        yield booking
    except (Exception, asyncio.CancelledError) as error:
        book_failure(repository, booking.ranker, error, started)
        raise
