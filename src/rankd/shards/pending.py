"""Sums that are on their way from all shards of a request, until the deadline.

In: the calls of a `Routed`. Out: sums. Nobody has to wait: `when_there` calls when the last answer has come or the time
is over, and then `add_up` takes no longer than adding up. Answers are taken on their connections' threads; what has its
time (a hedge, a second try, the deadline) is done by the alarm's. A lock guards where the calls stand; nothing is sent
under it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rankd.embeddings.pooling import Pooled
from rankd.errors import DeadlineExceeded, InvalidRequest, RankdError, Unavailable
from rankd.gate import Alarm
from rankd.shards.call_traces import CallTraces
from rankd.shards.client_counts import ClientCounts, Counted
from rankd.shards.frames import Kind
from rankd.shards.kept_rows import KeptRows
from rankd.shards.routing import Routed, RoutedCall
from rankd.shards.shard_client import NUMBERS, ShardClient
from rankd.shards.shard_link import Outcome, Question, ShardLink
from rankd.types import Array, Float32Array, Int64Array

log = logging.getLogger("rankd")
LOOK_S = 0.1
"""Between two looks of the alarm."""
MOST_REPLICAS = 3
"""Asked for one call: a request that breaks whoever reads it should not be shown to all."""
Forget = tuple[ShardLink, int]
"""Where an answer is not waited for any more, and its number."""


@dataclass(slots=True, eq=False)
class PoolCall:
    """A call to one shard, and where it stands. `attempts`: by number, those that may still be answered (None: it is
    being sent). `again`: it is to be tried with another replica; `failed`: there is none."""

    client: ShardClient
    routed: RoutedCall
    begun: float
    hedge_at: float = math.inf
    again: bool = False
    failed: bool = False
    asked: list[ShardLink] = field(default_factory=list)
    attempts: dict[int, ShardLink | None] = field(default_factory=dict)
    answer: Array | None = None
    error: RankdError | None = None


class Pending:
    """Made by `ShardedPooling.begin`, which sends. Times are seconds of `time.perf_counter`. Thread-safe, but for
    `add_up` and `result`, one of which is to be called once."""

    def __init__(
        self,
        routed: Routed,
        defaults: Mapping[str, Float32Array],
        deadline: float,
        counts: ClientCounts,
        alarm: Alarm,
        kept: KeptRows | None = None,
        narrow: bool = False,
    ) -> None:
        self._routed, self._defaults, self._deadline = routed, defaults, deadline
        self._counts, self._alarm, self._kept, self._narrow = counts, alarm, kept, narrow
        self._calls: list[PoolCall] = []
        self._waiting: dict[int, PoolCall] = {}
        self._left = 0
        self._over = False
        self._refused: InvalidRequest | None = None
        self._then: list[Callable[[], None]] = []
        self._traces = CallTraces()
        self._lock = threading.Lock()  # guards everything above
        self._there = threading.Event()

    def send(self, clients: Sequence[ShardClient], begun: float) -> None:
        """Ask all shards, by their places in the layout; `begin` does it, which has routed since `begun`.

        Raises:
            PayloadTooLarge: more than a shard takes.
        """
        calls = [PoolCall(clients[one.shard], one, time.perf_counter()) for one in self._routed.calls]
        self._traces.serialised(begun, time.perf_counter())
        self._calls, self._left = calls, len(calls)
        if not calls:
            self._end(missed=False)
            return
        self._counts.add(Counted.CALLS, len(calls))
        for call in calls:
            try:
                sent = self._try(call)
            except RankdError:
                self._end(missed=False)
                raise
            if not sent:
                self._failed(call, call.client.failure())
            elif call.client.has_another(call.asked):
                patience_s = min(call.client.hedging.delay_s, (self._deadline - call.begun) / 2)
                call.hedge_at = call.begun + patience_s
        self._set_alarm()

    def when_there(self, then: Callable[[], None]) -> None:
        """Call `then` once, when `add_up` need not wait: from any thread, or now."""
        with self._lock:
            if not self._over:
                self._then.append(then)
                return
        then()

    def there(self) -> bool:
        """Whether `add_up` need not wait."""
        return self._over

    def forget(self) -> None:
        """Nobody wants the sums any more."""
        self._end(missed=time.perf_counter() >= self._deadline)

    def add_up(
        self, into: Sequence[Float32Array], columns: Sequence[Int64Array], deadline: float | None = None
    ) -> tuple[str, ...]:
        """Wait until all is there, at most until the deadline given to `begin` or an earlier one; write the sums of
        each question into its array, as `Routed.add_up`. Names the tables that could not be had, whose defaults are
        there.

        Raises:
            InvalidRequest: a shard says so.
            DeadlineExceeded: a table without a default was not there in time.
            Unavailable: a table without a default could not be had.
        """
        until = self._deadline if deadline is None else min(deadline, self._deadline)
        if not self._there.wait(max(until - time.perf_counter(), 0.0)):
            self._end(missed=True)
        if self._refused is not None:
            raise self._refused
        tables = self._routed.tables
        lost: dict[int, PoolCall] = {}
        for call in self._calls:
            if call.answer is None:
                lost.update(dict.fromkeys(self._routed.positions(call.routed), call))
        self._check_lost({tables[place]: call for place, call in sorted(lost.items())})
        here = self._routed.kept
        kept_answer = self._kept.answer(here) if self._kept is not None and here is not None else None
        self._routed.add_up([call.answer for call in self._calls], into, columns, kept_answer)
        ends = np.concatenate([np.zeros((0, 2), np.int64), *columns])
        for place in lost:
            number, has_ids = self._routed.has_ids(place)
            into[number][has_ids, ends[place, 0] : ends[place, 1]] = self._defaults[tables[place]]
        self._counts.add(Counted.DEGRADED_TABLES, len(lost))
        return tuple(tables[place] for place in sorted(lost))

    def result(self, deadline: float | None = None) -> list[Pooled]:
        """As `add_up`, in arrays made for it: of each question its sums, and which of its tables are not there."""
        into, columns = self._routed.room()
        lost = self.add_up(into, columns, deadline)
        return [
            Pooled(values, tuple(name for name in asked.tables if name in lost))
            for values, asked in zip(into, self._routed.asked, strict=True)
        ]

    def call(self) -> None:
        """The alarm's: something has its time."""
        if time.perf_counter() >= self._deadline:
            self._end(missed=True)
            return
        again, late = list[PoolCall](), list[PoolCall]()
        with self._lock:
            now = time.perf_counter()
            for call in self._calls:
                if call.again:
                    call.again = False
                    again.append(call)
                elif call.hedge_at <= now:
                    call.hedge_at = math.inf
                    if call.attempts:
                        late.append(call)
        try:
            for call in again:
                self._try_again(call)
            for call in late:
                self._hedge(call)
        finally:
            self._set_alarm()

    def over(self) -> bool:
        """Whether the alarm is not needed any more."""
        return self._over

    def _set_alarm(self) -> None:
        if not self._over:
            soon = time.perf_counter() + LOOK_S  # what is over by then is let go, with all that it holds
            hedges = (call.hedge_at for call in self._calls if call.answer is None)
            self._alarm.at(min([self._deadline, soon, *hedges]), self)

    def _try(self, call: PoolCall) -> bool:
        """Send a call to a replica that was not asked yet; whether there was one. Not one that has its answer: the
        alarm hedges what was late when it looked, and an answer may have come since.

        Raises:
            PayloadTooLarge: no shard takes so much.
        """
        number, routed = next(NUMBERS), call.routed
        with self._lock:
            if self._over or call.answer is not None or len(call.asked) >= MOST_REPLICAS:
                return False
            self._waiting[number], call.attempts[number] = call, None
            call.again = False
            trace = self._traces.begin(number, call.client.name, routed.payload.nbytes, len(call.asked))
        size, deadline = routed.answer_bytes, self._deadline
        question = Question(number, Kind.POOL, [routed.payload], size, deadline, self._take, trace, self._narrow)
        link = None
        try:
            link = call.client.ask(question, call.asked)
        finally:
            waited_for = self._sent(call, number, link)
        if link is not None and not waited_for:  # answered or given up while it was sent
            link.forget(number, missed=False)
        return link is not None

    def _sent(self, call: PoolCall, number: int, link: ShardLink | None) -> bool:
        """An attempt was sent, or could not be (None); whether it is still waited for."""
        with self._lock:
            if link is not None:
                call.asked.append(link)
            waited_for = number in self._waiting
            if waited_for and link is not None:
                call.attempts[number] = link
            elif waited_for:
                del self._waiting[number], call.attempts[number]
                self._traces.drop(number)
        return waited_for

    def _hedge(self, call: PoolCall) -> None:
        if not call.client.has_another(call.asked) or not call.client.hedging.allowed():
            return
        try:
            sent = self._try(call)
        except RankdError as refused:
            log.info("a hedge was not sent: %s", refused)
            sent = False
        if sent:
            self._counts.add(Counted.HEDGED)
            return
        with self._lock:  # the first one may have failed while there seemed to be a second
            alone, error = not call.attempts and not call.again, call.error
        if alone and error is not None:
            self._failed(call, error)

    def _try_again(self, call: PoolCall) -> None:
        try:
            sent = self._try(call)
        except RankdError as error:
            self._failed(call, error)
            return
        if sent:
            self._counts.add(Counted.RETRIED)
        else:
            self._failed(call, call.error or call.client.failure())

    def _take(self, outcome: Outcome) -> None:
        """On a connection's thread."""
        needless: list[Forget] = []
        with self._lock:
            self._traces.end(outcome)
            call = self._waiting.pop(outcome.number, None)
            if call is None:
                return
            del call.attempts[outcome.number]
            if outcome.payload is not None:
                call.answer = outcome.payload
                needless = self._given_up(call)
                self._left -= not call.failed
            else:
                call.error = outcome.error
            if isinstance(outcome.error, InvalidRequest):
                self._refused = outcome.error
            ended = self._refused is not None or not self._left
            alone = not call.attempts and call.answer is None
            again = call.again = alone and call.client.has_another(call.asked)
        for link, number in needless:
            link.forget(number, missed=False)
        if outcome.payload is not None:
            call.client.hedging.answered(time.perf_counter() - call.begun)
        if ended:
            self._end(missed=False)
        elif again:
            self._alarm.at(time.perf_counter(), self)  # sending may take a while, and answers come on this thread
        elif alone and call.error is not None:
            self._failed(call, call.error)

    def _failed(self, call: PoolCall, error: RankdError) -> None:
        """There is nobody left to ask."""
        with self._lock:
            if call.attempts or call.answer is not None:
                return  # another attempt was sent meanwhile
            if not call.failed:
                call.failed, call.error = True, error
                self._left -= 1
            ended = not self._left
        if ended:
            self._end(missed=False)

    def _given_up(self, call: PoolCall) -> list[Forget]:
        """Under the lock: wait for none of a call's answers any more; those that were being asked for."""
        for number in call.attempts:
            del self._waiting[number]
        given_up = [(link, number) for number, link in call.attempts.items() if link is not None]
        call.attempts.clear()
        return given_up

    def _end(self, missed: bool) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
            given_up = [one for call in self._calls for one in self._given_up(call)]
            self._traces.close()
            then, self._then = self._then, []
        for link, number in given_up:
            link.forget(number, missed)
        self._there.set()
        for one in then:
            try:
                one()
            except Exception:  # the connection's thread goes on for all others
                log.exception("a request could not be woken")

    def _check_lost(self, calls: Mapping[str, PoolCall]) -> None:
        missing = [table for table in calls if table not in self._defaults]
        if not missing:
            return
        self._counts.add(Counted.FAILED)
        errors = [calls[table].error for table in missing]
        what = f"{len(missing)} tables ({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''})"
        hint = "give them defaults if an answer without them is better than none"
        for error in errors:
            if error is not None and not isinstance(error, DeadlineExceeded):
                raise Unavailable(f"{what} could not be had: {error}; {hint}") from error
        shards = sorted({calls[table].client.name for table in missing})
        raise DeadlineExceeded(
            f"{what} of the shards {', '.join(shards)} were not there in time: allow more, or {hint}"
        )
