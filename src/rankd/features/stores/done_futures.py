"""Futures that are done when they are made: how a local store answers."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TypeVar

from rankd.features.stores.feature_store import StoreFailure

T = TypeVar("T")


def answered(result: T) -> Future[T]:
    """A Future that has its result."""
    future: Future[T] = Future()
    future.set_result(result)
    return future


def refused(failure: StoreFailure) -> Future[T]:
    """A Future that has failed."""
    future: Future[T] = Future()
    future.set_exception(failure)
    return future
