"""What work takes, in milliseconds: measured at warm-up on this machine, corrected by every call.

In: times of the warmed shapes (`engine.warming`). Out: predictions for admission and policy, and how wrong they were.

    score(bucket, users)   one call of the engine: a table, measured; each call moves its own entry and, a little,
                           the factor of all (another load on the machine makes everything slower at once)
    prepare(resident, T)   a request's history, state and features: a mean for users whose state is in memory; for those
                           whose history has to be encoded or extended one for each history bucket, and one over all,
                           for requests whose history is in a store, so that its length is not known when they come
    rows(count)            assembling candidates: so much for each

All of that is for a call that is alone on its device. Where executors share one (`shared_speed.py`), it takes longer
beside others: `speed.contention(n)` times, with n under way. What a call was seen to take is divided by that before it
is learnt, or predictions would swing with the load: of two at once that get 1.2 times as much done, a call seen to take
10 ms would have taken 10 / (2 / 1.2) = 6 ms alone, and is booked as that.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rankd.observe.schedule_metrics import CostErrors
from rankd.schedule.shared_speed import Speed

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
    """What was measured at warm-up: `score` by (candidate bucket, users in the call), and `encode` of a history that
    fills a history bucket, by that (empty: there is no state); `wide_encode_ms` of the longest one, on the threads of
    all executors. `speed` is what executors that share a device get done at once (`Backend.speed`)."""

    score_ms: Mapping[tuple[int, int], float]
    encode_ms: Mapping[int, float] = field(default_factory=dict)
    wide_encode_ms: float = math.inf
    speed: tuple[float, ...] | None = None

    @property
    def most_encode_ms(self) -> float:
        """Of the longest history."""
        return max(self.encode_ms.values(), default=0.0)


@dataclass(slots=True)
class _Estimate:
    ms: float

    def saw(self, ms: float) -> None:
        self.ms = moved(self.ms, ms)


@dataclass(slots=True)
class _Errors:
    score: float = 0.0
    prepare: float = 0.0


class CostModel:
    """Predictions in milliseconds. Thread-safe: readers may see an estimate from a moment ago.

    What a call takes is its own estimate times the slowdown of all, so that one observation moves both in no time that
    depends on how many shapes there are.
    """

    def __init__(self, warmed: Warmed) -> None:
        self.warmed, self.speed = warmed, Speed(warmed.speed)
        self._floor = {shape: max(ms, 1e-3) for shape, ms in warmed.score_ms.items()}
        self._own = dict(self._floor)  # by (bucket, users), without the slowdown
        self._resident = _Estimate(PREPARED_MS)
        self._absent = _Estimate(PREPARED_MS + warmed.most_encode_ms)
        self._rooms = sorted(warmed.encode_ms)
        self._encoded = {room: _Estimate(PREPARED_MS + ms) for room, ms in warmed.encode_ms.items()}
        self._row = _Estimate(ROW_MS)
        self._slowdown = 1.0
        self._errors = _Errors()
        self._lock = threading.Lock()

    def score(self, bucket: int, users: int = 1) -> float:
        """A call for `users` users of one candidate bucket; a shape that was not warmed costs as its users alone."""
        known = self._own.get((bucket, users))
        return self._slowdown * (known if known is not None else users * self._own[bucket, 1])

    def calls(self, buckets: Sequence[int]) -> float:
        """Calls for one user of each of these buckets."""
        own = self._own
        return self._slowdown * sum([own[bucket, 1] for bucket in buckets])

    def prepare(self, resident: bool, tokens: int | None = None) -> float:
        """History, state and user features of a request; `resident`: a state of the user is in memory. `tokens`: the
        events of its history, where that is known."""
        return self._prepared(resident, tokens).ms

    def rows(self, count: int) -> float:
        """Assembling so many candidates."""
        return self._row.ms * count

    def together_ms(self, bucket: int, users: int, calls: int, idle: int, busy: int) -> float:
        """So many calls like this one, on `idle` executors beside `busy` ones, until all are done (`Speed.beside`)."""
        at_once = min(calls, idle)
        return calls / at_once * self.score(bucket, users) * self.speed.beside(busy, at_once)

    def saw_score(
        self, bucket: int, users: int, rows: int, rows_ms: float, score_ms: float, contention: float = 1.0
    ) -> None:
        """Book a call: `rows` candidates were assembled in rows_ms, and scored in score_ms, `contention` times as long
        as that takes alone."""
        score_ms /= contention
        with self._lock:
            predicted = self.score(bucket, users)
            self._errors.score += STEP * (abs(score_ms - predicted) / max(score_ms, 1e-3) - self._errors.score)
            shape = (bucket, users) if (bucket, users) in self._own else (bucket, 1)
            own_ms = moved(self.score(*shape), score_ms if shape[1] == users else score_ms / users)
            self._slowdown += STEP * STEP * (own_ms / self._floor[shape] - self._slowdown)
            self._own[shape] = own_ms / self._slowdown
            if rows:
                self._row.saw(rows_ms / rows)

    def saw_prepare(self, resident: bool, tokens: int | None, ms: float, contention: float = 1.0) -> None:
        """Book a preparation, `contention` times as long as alone; a state that is in memory is no work of the
        device, and was not slowed down by others on it."""
        ms /= 1.0 if resident else contention
        with self._lock:
            estimate = self._prepared(resident, tokens)
            self._errors.prepare += STEP * (abs(ms - estimate.ms) / max(ms, 1e-3) - self._errors.prepare)
            estimate.saw(ms)

    def doubt(self) -> None:
        """Somebody was sent away because of these predictions, so that nothing is learnt of it: they go back a step to
        what was measured at warm-up."""
        with self._lock:
            for shape, warmed in self._floor.items():
                self._own[shape] += STEP * min(warmed / self._slowdown - self._own[shape], 0.0)
            encoded = [(self._encoded[room], ms) for room, ms in self.warmed.encode_ms.items()]
            for estimate, ms in ((self._resident, 0.0), (self._absent, self.warmed.most_encode_ms), *encoded):
                estimate.ms += STEP * min(PREPARED_MS + ms - estimate.ms, 0.0)

    def errors(self) -> CostErrors:
        """A snapshot."""
        return CostErrors(self._errors.score, self._errors.prepare, self._slowdown)

    def _prepared(self, resident: bool, tokens: int | None) -> _Estimate:
        if resident:
            return self._resident
        if tokens is None or not self._rooms:
            return self._absent
        return self._encoded[self._rooms[min(bisect_left(self._rooms, tokens), len(self._rooms) - 1)]]


def moved(before_ms: float, seen_ms: float) -> float:
    """An estimate after an observation."""
    return before_ms + STEP * (min(max(seen_ms, before_ms / FARTHEST), before_ms * FARTHEST) - before_ms)
