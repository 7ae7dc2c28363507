"""When a call that is not answered is sent to a second replica: later than most answers come, and not too often.

Pure bookkeeping of times in seconds. The delay is a quantile of how long recent calls of a shard took, from the first
sending to the first answer. So it takes care of itself: when all replicas become slow, answers to hedged calls take
longer than the delay, the quantile moves up, and calls that are merely slow are no longer doubled. What the quantile
has not learned yet the budget bounds: each call brings a share of a hedge.
"""

from __future__ import annotations

import math
import threading
from collections import deque

import numpy as np

RECENT = 256
RENEWED_EVERY = 32
BURST = 32.0
"""Hedges that may come at once: what a replica that stops answering costs until it is not asked any more."""


class Hedging:
    """The delay and the budget of one shard's calls. Thread-safe."""

    def __init__(self, quantile: float, least_s: float, share: float) -> None:
        self._quantile, self._least_s, self._share = quantile, least_s, share
        self._lock = threading.Lock()
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._since = 0
        self._budget = BURST
        self._delay_s = math.inf

    @property
    def delay_s(self) -> float:
        """After which a call is hedged; infinite until enough answers have come."""
        return self._delay_s

    def answered(self, took_s: float) -> None:
        """A call was answered."""
        with self._lock:
            self._recent.append(took_s)
            self._budget = min(self._budget + self._share, BURST)
            self._since += 1
            if self._since >= RENEWED_EVERY:
                self._since = 0
                self._delay_s = max(float(np.quantile(self._recent, self._quantile)), self._least_s)

    def allowed(self) -> bool:
        """Take a hedge out of the budget; whether there was one."""
        with self._lock:
            if self._share == 0.0 or self._budget < 1.0:
                return False
            self._budget -= 1.0
            return True
