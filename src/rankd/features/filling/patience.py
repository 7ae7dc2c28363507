"""Asking a store again while it is in trouble that may pass: for work without a deadline, such as filling it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from rankd.features.stores.feature_store import StoreFailure, Trouble

T = TypeVar("T")

PASSING = frozenset({Trouble.DOWN, Trouble.TIMEOUT})
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0


class Patience:
    """Repeats what failed, with growing pauses, for up to `seconds` from its first failure.

    What is asked has to be repeatable: a store that timed out may have done it all the same.
    """

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.seconds, self.clock, self.sleep = seconds, clock, sleep

    def attempt(self, act: Callable[[], T]) -> T:
        """What `act` returns, in the end.

        Raises:
            StoreFailure: of a kind that does not pass, or it did not pass in time.
        """
        began, pause = None, FIRST_PAUSE_S
        while True:
            try:
                return act()
            except StoreFailure as failure:
                began = self.clock() if began is None else began
                if failure.trouble not in PASSING or self.clock() + pause > began + self.seconds:
                    raise
            self.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def answer(self, asked: Future[T], ask: Callable[[], Future[T]]) -> T:
        """The result of a Future; if it failed, of asking again.

        Raises:
            StoreFailure: as `attempt`.
        """
        try:
            return asked.result()
        except StoreFailure:
            return self.attempt(lambda: ask().result())
