"""Which requests are taken: a limit on candidates and on predicted work that wait, and on promises that cannot be kept.

In: `Waiting`, of all who wait for the same cores, and what a request would cost. Out: nothing, or Overloaded with the
time after which to try again, or DeadlineExceeded where that would not help: its time is too short even if nobody else
were there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rankd.errors import DeadlineExceeded, Overloaded
from rankd.schedule.waiting import Backlog, Waiting, backlog_of

LATE_SHARE = 0.005
MARGIN_STEP, MOST_MARGIN = 0.04, 0.5
CLOSE = 0.6
"""A request that is predicted to need more of its time than this tells whether the margin is right."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of what a model lets wait: candidates, and predicted work, as the milliseconds that all executors take for it
    (`Rules.speed`). `margin` is the one to begin with (`Margin`)."""

    candidates: int
    work_ms: float
    margin: float = 0.1


@dataclass(slots=True)
class Margin:
    """What is added to predictions, as a part of them, before they are held against a deadline: as little as makes
    LATE_SHARE late of those that were let in though it was close. Too little breaks promises, too much refuses requests
    that could have been answered."""

    value: float

    def kept(self) -> None:
        """One of those was in time."""
        self.value = max(self.value - MARGIN_STEP * LATE_SHARE, 0.0)

    def missed(self) -> None:
        """One was late."""
        self.value = min(self.value + MARGIN_STEP * (1 - LATE_SHARE), MOST_MARGIN)


@dataclass(frozen=True, slots=True)
class Wish:
    """A request that wants to come in at `now`, at this `place` in the order: its candidates, its work, how soon it
    can be done alone, and its deadline (seconds, NEVER if there is none)."""

    now: float
    place: float
    rows: int
    work_ms: float
    alone_ms: float
    deadline: float


def check(waitings: Sequence[Waiting], limits: Limits, margin: float, speed: float, wish: Wish) -> bool:
    """Let a request come in, or refuse it. `speed` is how much all executors get done, in units of one alone.

    Returns:
        Whether it is close: it is predicted to need most of its time.

    Raises:
        Overloaded: too much waits, or it cannot be done by its deadline behind those that come before it, or one that
            was let in could not be done by its own.
        DeadlineExceeded: it could not be in time if it were alone.
    """
    left_ms = max(wish.deadline - wish.now, 0.0) * 1e3
    if wish.alone_ms > left_ms:
        raise DeadlineExceeded(
            f"this request takes {wish.alone_ms:.1f} ms even if it is alone, and its time is over in {left_ms:.1f} ms: "
            "allow more time, or ask for fewer candidates"
        )
    count = sum(waiting.count for waiting in waitings)
    if not count:
        return wish.alone_ms > CLOSE * left_ms
    factor = (1 + margin) / speed
    backlog = backlog_of(waitings, wish.place, factor, wish.now)
    _check_limits(backlog, count, limits, speed, wish)
    return _check_deadlines(backlog, count, margin, factor, wish, left_ms)


def _check_limits(backlog: Backlog, count: int, limits: Limits, speed: float, wish: Wish) -> None:
    queued_ms, rows = backlog.work_ms / speed, backlog.rows
    if queued_ms <= limits.work_ms and rows + wish.rows <= limits.candidates:
        return
    share = min((rows + wish.rows - limits.candidates) / max(rows, 1), 1.0)
    after_s = max(queued_ms - limits.work_ms, share * queued_ms, wish.alone_ms) / 1e3
    raise Overloaded(
        f"{count} requests with {rows} candidates, {queued_ms:.0f} ms of work, are waiting; allowed are "
        f"{limits.candidates} candidates and {limits.work_ms:g} ms: try again in {after_s:.2f} s",
        retry_after_s=after_s,
    )


def _check_deadlines(backlog: Backlog, count: int, margin: float, factor: float, wish: Wish, left_ms: float) -> bool:
    needed_ms = backlog.ahead_ms + wish.alone_ms * (1 + margin)
    if needed_ms > left_ms:
        after_s = (needed_ms - left_ms) / 1e3
        raise Overloaded(
            f"this request would be answered in {needed_ms:.0f} ms, and its time is over in {left_ms:.0f} ms: "
            f"try again in {after_s:.2f} s, or allow more time",
            retry_after_s=after_s,
        )
    own_ms = wish.work_ms * factor
    if backlog.spare_ms < own_ms:  # who is late already is not helped by refusing others
        after_s = (own_ms - backlog.spare_ms) / 1e3
        raise Overloaded(
            f"{count} requests are waiting, and with this one some of them would be late: try again in {after_s:.2f} s",
            retry_after_s=after_s,
        )
    return needed_ms > CLOSE * left_ms
