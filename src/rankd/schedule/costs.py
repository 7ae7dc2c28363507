"""What work takes, in milliseconds: measured at warm-up on this machine, corrected by every call.

In: times of the warmed shapes (`engine.warming`). Out: predictions for admission and policy, and how wrong they were.

    score(bucket, users)   one call of the engine: a table, measured; each call moves its own entry and, a little,
                           the factor of all (another load on the machine makes everything slower at once)
    prepare(resident)      a request's history, state and features: a mean for users whose state is in memory, and one
                           for those whose history has to be encoded or extended
    rows(count)            assembling candidates: so much for each
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rankd.observe.schedule_metrics import CostErrors

STEP = 0.1
"""How far one observation moves an estimate."""
FARTHEST = 4.0
"""An observation counts as at most so many times what was expected, and at least as that part of it: one page fault or
one descheduled thread is no news of the model."""
PREPARED_MS = 0.2
"""Of a request whose state is in memory, before one was seen."""
ROW_MS = 0.001


@dataclass(frozen=True, slots=True)
class Warmed:
    """What was measured at warm-up: `score` by (candidate bucket, users in the call), and `encode` of a full
    history."""

    score_ms: Mapping[tuple[int, int], float]
    encode_ms: float = 0.0


@dataclass(slots=True)
class _Estimate:
    ms: float

    def saw(self, ms: float) -> None:
        self.ms += STEP * (min(max(ms, self.ms / FARTHEST), self.ms * FARTHEST) - self.ms)


@dataclass(slots=True)
class _Errors:
    score: float = 0.0
    prepare: float = 0.0


@dataclass(slots=True)
class CostModel:
    """Predictions in milliseconds. Thread-safe: readers may see an estimate from a moment ago."""

    warmed: Warmed
    _score: dict[tuple[int, int], _Estimate] = field(init=False)
    _resident: _Estimate = field(init=False)
    _absent: _Estimate = field(init=False)
    _row: _Estimate = field(init=False)
    _slowdown: float = 1.0
    _errors: _Errors = field(default_factory=_Errors)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._score = {shape: _Estimate(max(ms, 1e-3)) for shape, ms in self.warmed.score_ms.items()}
        self._resident = _Estimate(PREPARED_MS)
        self._absent = _Estimate(PREPARED_MS + self.warmed.encode_ms)
        self._row = _Estimate(ROW_MS)

    def score(self, bucket: int, users: int = 1) -> float:
        """A call for `users` users of one candidate bucket; a shape that was not warmed costs as its users alone."""
        known = self._score.get((bucket, users))
        return known.ms if known is not None else users * self._score[bucket, 1].ms

    def calls(self, buckets: Sequence[int]) -> float:
        """Calls for one user of each of these buckets."""
        known = self._score
        return sum([known[bucket, 1].ms for bucket in buckets])

    def prepare(self, resident: bool) -> float:
        """History, state and user features of a request; `resident`: a state of the user is in memory."""
        return (self._resident if resident else self._absent).ms

    def rows(self, count: int) -> float:
        """Assembling so many candidates."""
        return self._row.ms * count

    def saw_score(self, bucket: int, users: int, rows: int, rows_ms: float, score_ms: float) -> None:
        """Book a call: `rows` candidates were assembled in rows_ms, and scored in score_ms."""
        with self._lock:
            predicted = self.score(bucket, users)
            self._errors.score += STEP * (abs(score_ms - predicted) / max(score_ms, 1e-3) - self._errors.score)
            shape = (bucket, users) if (bucket, users) in self._score else (bucket, 1)
            entry, warmed = self._score[shape], max(self.warmed.score_ms[shape], 1e-3)
            entry.saw(score_ms if shape[1] == users else score_ms / users)
            before, self._slowdown = self._slowdown, self._slowdown + STEP * STEP * (entry.ms / warmed - self._slowdown)
            for other, estimate in self._score.items():
                if other != shape:
                    estimate.ms *= self._slowdown / before
            if rows:
                self._row.saw(rows_ms / rows)

    def saw_prepare(self, resident: bool, ms: float) -> None:
        """Book a preparation."""
        with self._lock:
            estimate = self._resident if resident else self._absent
            self._errors.prepare += STEP * (abs(ms - estimate.ms) / max(ms, 1e-3) - self._errors.prepare)
            estimate.saw(ms)

    def doubt(self) -> None:
        """Somebody was sent away because of these predictions, so that nothing is learnt of it: they go back a step to
        what was measured at warm-up."""
        with self._lock:
            for shape, estimate in self._score.items():
                estimate.ms += STEP * min(self.warmed.score_ms[shape] - estimate.ms, 0.0)
            for estimate, warmed in (
                (self._resident, PREPARED_MS),
                (self._absent, PREPARED_MS + self.warmed.encode_ms),
            ):
                estimate.ms += STEP * min(warmed - estimate.ms, 0.0)

    def errors(self) -> CostErrors:
        """A snapshot."""
        return CostErrors(self._errors.score, self._errors.prepare, self._slowdown)
