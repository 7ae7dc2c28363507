"""The client's side of a connection to a shard: requests go out, answers are given to those who wait, by their number.

Any thread asks; one thread runs `run`, which reads. An answer that nobody waits for any more is known by its number,
read and dropped: a late answer is never taken for another one, and the connection stays in step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rankd.errors import PayloadTooLarge, RankdError, ShardFailure, Trouble
from rankd.shards.frame_errors import read_error
from rankd.shards.frames import UNLIMITED_US, Header, Kind, frame, read_header, read_payload
from rankd.shards.handshake import Ready
from rankd.shards.shard_config import ShardClientConfig
from rankd.shards.streams import Stream
from rankd.types import Array


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of request `number`: its answer's payload, or why there is none; and how many microseconds the shard says that it
    took, None if it says nothing. A payload is (n,) uint8, but sums are (n,) float32, or in bfloat16 uint16."""

    number: int
    payload: Array | None
    error: RankdError | None = None
    taken_us: int | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked under a number, and what its outcome is given to, by the connection's thread: `then` has to be
    quick. `answer_bytes`: of its answer in float32, None if it may differ; `narrow`: from a shard that can, sums in
    bfloat16. `deadline` in seconds of `time.perf_counter`; `trace` for a shard that takes traces, empty if it is not
    traced."""

    number: int
    kind: Kind
    payload: Sequence[memoryview]
    answer_bytes: int | None
    deadline: float
    then: Callable[[Outcome], None]
    trace: bytes = b""
    narrow: bool = False


class ShardLink:
    """A connection whose handshake is done. Thread-safe."""

    def __init__(self, stream: Stream, ready: Ready, config: ShardClientConfig, shown: str) -> None:
        self._stream, self._ready, self._config, self._shown = stream, ready, config, shown
        self._lock = threading.Lock()  # guards what follows
        self._asked: dict[int, Question] = {}
        self._forgotten: set[int] = set()  # of those: nobody waits for their answers, which will still come
        self._misses = 0
        self._ended: RankdError | None = None
        self.worked = False
        """Whether an answer has come in time."""

    @property
    def ended(self) -> RankdError | None:
        """Why it is not asked any more; None if it may be."""
        return self._ended

    @property
    def contents(self) -> Mapping[str, str]:
        """The `content` of each table that the shard has parts of, as far as it says."""
        return self._ready.contents

    @property
    def load(self) -> int:
        """How many answers it owes, also those that nobody waits for any more."""
        return len(self._asked)

    def ask(self, question: Question) -> bool:
        """Send a request; False if it cannot be, then nothing will come. Its outcome comes to `then`.

        Raises:
            PayloadTooLarge: the shard does not take so much, or would answer more than is taken here.
        """
        self._check_size(question)
        with self._lock:
            if self._ended is not None:
                return False
            self._asked[question.number] = question
        now = time.perf_counter()
        budget_us = min(max(int((question.deadline - now) * 1e6), 0), UNLIMITED_US - 1)
        try:
            narrow = self._narrow(question)
            buffers = frame(question.kind, question.number, question.payload, budget_us, self._trace(question), narrow)
            self._stream.send(buffers, min(question.deadline, now + self._config.frame_seconds))
        except OSError as error:
            with self._lock:
                told = self._asked.pop(question.number, None) is None  # who reads may have told it already
            if isinstance(error, TimeoutError):
                self.forget(question.number, missed=True)
            return told
        return True

    def forget(self, number: int, missed: bool) -> None:
        """Nobody waits for an answer any more; `missed`: since it has not come by its deadline. After several misses in
        a row the connection is given up."""
        with self._lock:
            if number in self._asked:
                self._forgotten.add(number)
            self._misses += missed
            if self._misses < self._config.misses_in_a_row:
                return
        self._end(ShardFailure(f"{self._shown} missed {self._misses} deadlines in a row", Trouble.TIMEOUT))
        self._stream.shut()

    def run(self) -> RankdError:
        """Read until it ends; why it did. Whoever still waits is told."""
        try:
            self._read()
        except RankdError as error:
            self._end(error)
        except OSError as error:
            self._end(ShardFailure(f"{self._shown} cannot be reached any more: {error}"))
        finally:
            reason = self._end(ShardFailure(f"{self._shown} is not read from any more"))
            with self._lock:
                waiting = [asked for number, asked in self._asked.items() if number not in self._forgotten]
                self._asked.clear()
            self._stream.close()
            for question in waiting:
                question.then(Outcome(question.number, None, reason))
        return reason

    def shut(self) -> None:
        """End it; `run` returns."""
        self._stream.shut()

    def _end(self, reason: RankdError) -> RankdError:
        """Ask no more; the first reason is the one that counts."""
        with self._lock:
            self._ended = self._ended or reason
            return self._ended

    def _trace(self, question: Question) -> bytes:
        """The trace that is sent: none to a shard that does not take it, and none that makes a request too large."""
        if not question.trace or not self._ready.traces:
            return b""
        fits = _size(question) + len(question.trace) <= self._ready.max_request_bytes
        return question.trace if fits else b""

    def _narrow(self, question: Question) -> bool:
        return question.narrow and self._ready.narrow_sums

    def _answer_bytes(self, question: Question) -> int | None:
        if question.answer_bytes is None or not self._narrow(question):
            return question.answer_bytes
        return question.answer_bytes // 2

    def _check_size(self, question: Question) -> None:
        size = _size(question)
        if size > self._ready.max_request_bytes:
            raise PayloadTooLarge(
                f"the request to {self._shown} has {size} bytes, it takes {self._ready.max_request_bytes}: ask for "
                "fewer samples at once"
            )
        answer_bytes = self._answer_bytes(question)
        if (answer_bytes or 0) > self._config.max_answer_bytes:
            raise PayloadTooLarge(
                f"the answer of {self._shown} would have {answer_bytes} bytes, taken are "
                f"{self._config.max_answer_bytes}: ask for fewer samples at once"
            )

    def _read(self) -> None:
        config, pinged = self._config, False
        while self._ended is None or self._asked:
            try:
                idle_until = time.perf_counter() + config.heartbeat_seconds
                header = read_header(self._stream, config.max_answer_bytes, idle_until, config.frame_seconds)
            except TimeoutError:
                if pinged:
                    raise ShardFailure(f"{self._shown} gives no sign of life", Trouble.TIMEOUT) from None
                self._stream.send(frame(Kind.PING, 0), time.perf_counter() + config.heartbeat_seconds)
                pinged = True
                continue
            pinged = False
            self._take(header)

    def _take(self, header: Header) -> None:
        if header.kind in (Kind.POOLED, Kind.STATS) or (header.kind is Kind.ERROR and header.number):
            question = self._asked.get(header.number)
            self._check_answer(header, question)
            payload = read_payload(self._stream, header, self._config.frame_seconds)
            self._hand_over(header, payload)
            return
        payload = read_payload(self._stream, header, self._config.frame_seconds)
        if header.kind is Kind.ERROR:
            raise read_error(payload.data, self._shown)
        if header.kind is Kind.GOODBYE:
            self._end(ShardFailure(f"{self._shown} has said goodbye"))
        elif header.kind is not Kind.PONG:
            raise ShardFailure(f"{self._shown} sent {header.kind.name}, which is no answer", Trouble.BROKEN)

    def _check_answer(self, header: Header, question: Question | None) -> None:
        """Before memory is taken for it."""
        if question is None:
            raise ShardFailure(f"{self._shown} answers {header.number}, which was not asked", Trouble.BROKEN)
        if header.kind is Kind.ERROR:
            return
        expected, answer_bytes = (
            Kind.POOLED if question.kind is Kind.POOL else question.kind,
            self._answer_bytes(question),
        )
        narrow = self._narrow(question)
        if header.kind is not expected or header.narrow != narrow or answer_bytes not in (None, header.length):
            raise ShardFailure(
                f"{self._shown} sent {header.kind.name} of {header.length} bytes{_format(header.narrow)}, expected was "
                f"{expected.name} of {answer_bytes}{_format(narrow)}",
                Trouble.BROKEN,
            )

    def _hand_over(self, header: Header, payload: Array) -> None:
        error = read_error(payload.data, self._shown) if header.kind is Kind.ERROR else None
        if header.kind is Kind.POOLED:
            payload = payload.view("<u2" if header.narrow else "<f4")
        with self._lock:
            question = self._asked.pop(header.number, None)
            forgotten = header.number in self._forgotten
            self._forgotten.discard(header.number)
            if question is None or forgotten:  # None: it could not be sent whole, and who asked knows
                return
            if error is None:
                self._misses, self.worked = 0, True
        taken_us = None if header.budget_us == UNLIMITED_US else header.budget_us
        question.then(Outcome(header.number, None if error else payload, error, taken_us))


def _format(narrow: bool) -> str:
    return " in bfloat16" if narrow else ""


def _size(question: Question) -> int:
    return sum(view.nbytes for view in question.payload)
