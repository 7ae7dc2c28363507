"""New events of several users, whole histories or what is behind a state, go in one call of one executor.

In: what each executor's thread asks for. Out: what comes of it, and the pages where it lies. A few hundred tokens do
not fill a GPU: their call is mostly launches, and for four users there are as many as for one. So whoever comes while
as many calls are under way as there are streams waits; who goes next takes along those that wait for the same room.
Nobody waits for others to come. Histories and extensions have a line of their own each: these are short, and would wait
for those. Worked example, one call at once, sizes 1, 2 and 4 of room 256:

    a comes, is encoded alone     b, c, d come and wait
    a is done                     b is encoded, and c with it;  d waits
    b is done                     d is encoded alone

A call for several that fails is tried again for each alone, so that one bad request costs the others only time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from rankd.errors import EngineFailure
from rankd.types import Array, UserState

if TYPE_CHECKING:
    from rankd.engine.cuda.state_pool import PlacedState

SIZES = (1, 2, 4)
"""Of how many users a call is: what executors have graphs for."""
MOST_ROWS = 4096
"""Of a call for several users: more tokens fill a GPU by themselves. Reckoned, not measured."""
WAIT_SECONDS = 10.0
"""For calls of the same line, which are milliseconds; longer only if one of them hangs."""


def sizes_of(room: int) -> tuple[int, ...]:
    """Of how many users a call may be whose events have a room.

    >>> sizes_of(256), sizes_of(2048), sizes_of(8192)
    ((1, 2, 4), (1, 2), (1,))
    """
    return tuple(size for size in SIZES if size == 1 or size * room <= MOST_ROWS)


@dataclass(frozen=True, slots=True, eq=False)
class NewEvents:
    """Of one user (B = 1): a history, whose state goes `into` arrays of the caller if they are given; or what came
    after a state `known`."""

    events: Mapping[str, Array]
    into: Mapping[str, Array] | None = None
    known: UserState | None = None

    @property
    def room(self) -> int:
        """T, or A."""
        room: int = self.events["history_time"].shape[2]
        return room


class Computer(Protocol):
    """An executor, as far as this is about."""

    def compute_all(self, users: Sequence[NewEvents]) -> list[Mapping[str, Array]]:
        """What comes of them, in one call: states of histories, or what states grow by; all users ask for the same."""
        ...

    def made_last(self) -> list[PlacedState]:
        """Where the states lie, once."""
        ...


class _Step(Enum):
    WAITS = auto()
    TAKEN = auto()
    ALONE = auto()  # the call that took it along has failed
    DONE = auto()


@dataclass(slots=True, eq=False)
class _Asked:
    user: NewEvents
    step: _Step = _Step.WAITS
    made: Mapping[str, Array] | None = None
    placed: PlacedState | None = None


@dataclass(slots=True, eq=False)
class _Line:
    """Who waits, in their order, and how many calls are under way."""

    waiting: list[_Asked] = field(default_factory=list)
    running: int = 0


class EventsTogether:
    """What waits to be computed for one model on a GPU; of each line `at_once` calls are under way. Thread-safe."""

    def __init__(self, at_once: int, most_users: int) -> None:
        self._at_once, self._most_users = at_once, most_users
        self._changed = threading.Condition()
        self._histories, self._extensions = _Line(), _Line()

    def compute(self, executor: Computer, user: NewEvents) -> tuple[Mapping[str, Array], PlacedState]:
        """What comes of a user's new events, and where its state lies on the GPU; by this executor or another one.

        Raises:
            EngineFailure: these events cannot be computed, or calls that hang let nobody else.
        """
        asked, line = _Asked(user), self._histories if user.known is None else self._extensions
        with self._changed:
            line.waiting.append(asked)
            self._wait_for_turn(asked, line)
            taken = self._take(asked, line) if asked.step is _Step.WAITS else []
            line.running += bool(taken)
        if taken:
            self._lead(executor, taken, line)
        with self._changed:  # for as long as it takes: somebody reads and writes these arrays
            self._changed.wait_for(lambda: asked.step in (_Step.DONE, _Step.ALONE))
        if asked.step is _Step.ALONE:
            self._run(executor, [asked])
        assert asked.made is not None  # noqa: S101 - what is done is there
        assert asked.placed is not None  # noqa: S101
        return asked.made, asked.placed

    def _lead(self, executor: Computer, taken: Sequence[_Asked], line: _Line) -> None:
        """Compute for all; if that fails and there are others each is on its own."""
        after = _Step.DONE
        try:
            self._run(executor, taken)
        except BaseException as error:
            after = _Step.ALONE
            if len(taken) == 1 or not isinstance(error, Exception):
                raise
        finally:
            with self._changed:
                line.running -= 1
                for one in taken:
                    one.step = after
                self._changed.notify_all()

    def _run(self, executor: Computer, taken: Sequence[_Asked]) -> None:
        made = executor.compute_all([one.user for one in taken])
        for one, arrays, placed in zip(taken, made, executor.made_last(), strict=True):
            one.made, one.placed = arrays, placed

    def _take(self, first: _Asked, line: _Line) -> list[_Asked]:
        """This one and others of its room in their order, as many as a call may have."""
        others = [one for one in line.waiting if one.user.room == first.user.room and one is not first]
        most = min(1 + len(others), self._most_users)
        size = max(size for size in sizes_of(first.user.room) if size <= most)
        taken = [first, *others[: size - 1]]
        for one in taken:
            line.waiting.remove(one)
            one.step = _Step.TAKEN
        return taken

    def _wait_for_turn(self, asked: _Asked, line: _Line) -> None:
        """Until one more call may begin, or somebody has taken this one along."""

        def may() -> bool:
            return asked.step is not _Step.WAITS or line.running < self._at_once

        if not self._changed.wait_for(may, WAIT_SECONDS):
            line.waiting.remove(asked)
            raise EngineFailure(
                f"{self._at_once} calls have been computing new events for {WAIT_SECONDS:.0f} s; does the GPU hang?"
            )
