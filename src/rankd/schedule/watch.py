"""A thread that looks after something whenever its time has come. In: `look`, and when it is due next. Out: nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from rankd.schedule.waiting import NEVER

log = logging.getLogger("rankd")


class Watch:
    """Calls `look()`, without the lock, then waits as `due()` says, which is asked under the lock: the moment of the
    next look, and how many seconds to wait at most."""

    def __init__(
        self, lock: threading.Lock, look: Callable[[], None], due: Callable[[], tuple[float, float]], name: str
    ) -> None:
        self._lock, self._look, self._due = lock, look, due
        self._changed = threading.Condition(lock)
        self._until = NEVER
        self.ended = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            self.ended = True
            self._changed.notify()
        self._thread.join()

    def by(self, moment: float) -> None:
        """Under the lock: look no later than then."""
        if moment < self._until:
            self._changed.notify()

    def _work(self) -> None:
        while not self.ended:
            try:
                self._look()
            except Exception:  # whatever it is, somebody has to look again
                log.exception("looking after requests and executors failed")
            with self._lock:
                self._until, seconds = self._due()
                if not self.ended and seconds > 0:
                    self._changed.wait(seconds)
