"""Histories that several executors have to encode at the same time go in one call of one of them.

In: what each executor's thread asks for. Out: its state, and the pages where it lies. A history of a few hundred
tokens does not fill a GPU: its call is mostly launches, and for four users there are as many as for one. So whoever
comes while as many calls encode as there are streams waits; who goes next takes along those that wait for the same
room. Nobody waits for others to come. Worked example, one call at once, sizes 1, 2 and 4 of room 256:

    a comes, encodes alone        b, c, d come and wait
    a is done                     b encodes for itself and c;  d waits
    b is done                     d encodes alone

A call for several that fails is tried again for each alone, so that one bad request costs the others only time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from rankd.errors import EngineFailure
from rankd.types import Array

if TYPE_CHECKING:
    from rankd.engine.cuda.state_pool import PlacedState

SIZES = (1, 2, 4)
"""Of how many users a call is: what executors have graphs for."""
MOST_ROWS = 4096
"""Of a call for several users: more tokens fill a GPU by themselves. Reckoned, not measured."""
WAIT_SECONDS = 10.0
"""For calls that encode, which are milliseconds; longer only if one of them hangs."""


def sizes_of(room: int) -> tuple[int, ...]:
    """How many users' histories of a room may be in a call.

    >>> sizes_of(256), sizes_of(2048), sizes_of(8192)
    ((1, 2, 4), (1, 2), (1,))
    """
    return tuple(size for size in SIZES if size == 1 or size * room <= MOST_ROWS)


class Encoder(Protocol):
    """An executor, as far as this is about."""

    def encode_all(
        self, histories: Sequence[Mapping[str, Array]], into: Sequence[Mapping[str, Array] | None]
    ) -> list[Mapping[str, Array]]:
        """The states of several users, each B = 1, in one call."""
        ...

    def made_last(self) -> list[PlacedState]:
        """Where they lie, once."""
        ...


class _Step(Enum):
    WAITS = auto()
    TAKEN = auto()
    ALONE = auto()  # the call that took it along has failed
    DONE = auto()


@dataclass(slots=True, eq=False)
class _Asked:
    history: Mapping[str, Array]
    into: Mapping[str, Array] | None
    step: _Step = _Step.WAITS
    made: Mapping[str, Array] | None = None
    placed: PlacedState | None = None

    @property
    def room(self) -> int:
        """T."""
        room: int = self.history["history_time"].shape[2]
        return room


class EncodedTogether:
    """What waits to be encoded for one model on a GPU; `at_once` calls encode at the same time. Thread-safe."""

    def __init__(self, at_once: int, most_users: int) -> None:
        self._at_once, self._most_users = at_once, most_users
        self._changed = threading.Condition()
        self._waiting: list[_Asked] = []
        self._running = 0

    def encode(
        self, executor: Encoder, history: Mapping[str, Array], into: Mapping[str, Array] | None
    ) -> tuple[Mapping[str, Array], PlacedState]:
        """A user's state (B = 1) and where it lies on the GPU; made by this executor or by another one.

        Raises:
            EngineFailure: this history cannot be encoded, or calls that hang let nobody else.
        """
        asked = _Asked(history, into)
        with self._changed:
            self._waiting.append(asked)
            self._wait_for_turn(asked)
            taken = self._take(asked) if asked.step is _Step.WAITS else []
            self._running += bool(taken)
        if taken:
            self._lead(executor, taken)
        with self._changed:  # for as long as it takes: somebody writes into these arrays
            self._changed.wait_for(lambda: asked.step in (_Step.DONE, _Step.ALONE))
        if asked.step is _Step.ALONE:
            self._run(executor, [asked])
        assert asked.made is not None  # noqa: S101 - what is done is there
        assert asked.placed is not None  # noqa: S101
        return asked.made, asked.placed

    def _lead(self, executor: Encoder, taken: Sequence[_Asked]) -> None:
        """Encode for all; if that fails and there are others each is on its own."""
        after = _Step.DONE
        try:
            self._run(executor, taken)
        except BaseException as error:
            after = _Step.ALONE
            if len(taken) == 1 or not isinstance(error, Exception):
                raise
        finally:
            with self._changed:
                self._running -= 1
                for one in taken:
                    one.step = after
                self._changed.notify_all()

    def _run(self, executor: Encoder, taken: Sequence[_Asked]) -> None:
        made = executor.encode_all([one.history for one in taken], [one.into for one in taken])
        for one, state, placed in zip(taken, made, executor.made_last(), strict=True):
            one.made, one.placed = state, placed

    def _take(self, first: _Asked) -> list[_Asked]:
        """This one and others of its room in their order, as many as a call may have."""
        others = [one for one in self._waiting if one.room == first.room and one is not first]
        most = min(1 + len(others), self._most_users)
        size = max(size for size in sizes_of(first.room) if size <= most)
        taken = [first, *others[: size - 1]]
        for one in taken:
            self._waiting.remove(one)
            one.step = _Step.TAKEN
        return taken

    def _wait_for_turn(self, asked: _Asked) -> None:
        """Until one more call may encode, or somebody has taken this one along."""

        def may() -> bool:
            return asked.step is not _Step.WAITS or self._running < self._at_once

        if not self._changed.wait_for(may, WAIT_SECONDS):
            self._waiting.remove(asked)
            raise EngineFailure(
                f"{self._at_once} calls have been encoding histories for {WAIT_SECONDS:.0f} s; does the GPU hang?"
            )
