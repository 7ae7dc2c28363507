"""Booking how rank requests ended, for whatever transport brought them."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import CancelledError

from starlette.requests import ClientDisconnect

from rankd.errors import RankdError
from rankd.ranker import Ranker
from rankd.serve.repository import ModelRepository


def book_failure(repository: ModelRepository, ranker: Ranker | None, error: BaseException, started: float) -> None:
    """Count a failure; without a ranker it has no model, for a label is never of the caller's making."""
    labels = (ranker.manifest.name, ranker.manifest.version) if ranker is not None else ("", "")
    if isinstance(error, asyncio.CancelledError | CancelledError | ClientDisconnect):
        outcome = "Cancelled"
    else:
        outcome = type(error).__name__ if isinstance(error, RankdError) else "InternalError"
    repository.metrics.failed(*labels, outcome, time.perf_counter() - started)
