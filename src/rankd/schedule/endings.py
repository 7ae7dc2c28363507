"""Ending requests: answering their Futures, which their owners may have cancelled, and giving back what they held."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from rankd.errors import DeadlineExceeded
from rankd.schedule.ledger import Job

log = logging.getLogger("rankd")
Item = TypeVar("Item")
Result = TypeVar("Result")


def answer(future: Future[Result], result: Result) -> None:
    """Give the result, unless it was cancelled."""
    if future.set_running_or_notify_cancel():
        future.set_result(result)


def fail(future: Future[Result], error: Exception) -> None:
    """Give an error, unless it was cancelled."""
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def guarded(call: Callable[[], object]) -> None:
    """Call, and log what is raised: it must end neither this thread nor the requests that come after."""
    try:
        call()
    except Exception:  # whatever it is
        log.exception("what a request held could not be given back")


def too_late(job: Job[Item], now: float) -> DeadlineExceeded:
    """What a request is told whose time is over."""
    waited_ms = (now - job.accepted) * 1e3
    return DeadlineExceeded(
        f"timeout_ms passed, or could not be kept any more, {waited_ms:.0f} ms after the request came: {job.done} of "
        f"{job.asked.rows} candidates were scored"
    )
