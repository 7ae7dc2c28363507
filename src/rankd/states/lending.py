"""What the request path knows of user states: whoever keeps them lends one for as long as it is read.

`cache.py` keeps states; `NoStates` here computes every one of them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Protocol

import numpy as np

from rankd.engine.backend import Executor
from rankd.observe.state_metrics import StateCounts
from rankd.types import Array, UserHistory, UserState

Tokens = Mapping[str, Array]


class Origin(Enum):
    """Where a state came from."""

    CACHED = "cached"  # in memory, made of this very history
    RESTORED = "restored"  # on disk, made of this very history
    EXTENDED = "extended"  # kept, and the new events appended
    ENCODED = "encoded"  # the whole history computed


@dataclass(frozen=True, slots=True)
class HeldState:
    """A state that stays as it is until it is given back."""

    state: UserState
    origin: Origin


class StateBusy(Exception):
    """Somebody else computes the user's state right now."""


class TokenTables(Protocol):
    """Tables beside the graph that tokens of a history are looked up in."""

    @property
    def contents(self) -> bytes:
        """A fingerprint of their rows: a state is of these and of no others."""
        ...

    def write(self, tokens: Tokens, first: Sequence[int]) -> bool:
        """Write what was looked up of `tokens`, which are the history's from `first[n]` on in block n; whether it is as
        `contents` have it, so that a state of it may be kept. Whatever it raises leaves nothing behind."""
        ...


class NoTables:
    """There are none: the graph has them all."""

    contents = b""

    def write(self, tokens: Tokens, first: Sequence[int]) -> bool:
        """Nothing, which is as it should be."""
        return True


NO_TABLES = NoTables()


class States(Protocol):
    """Whatever lends states."""

    def held(
        self,
        user: str,
        history: UserHistory,
        tokens: Callable[[], Tokens],
        executor: Executor,
        deadline: float | None = None,
        wait: bool = True,
        tables: TokenTables = NO_TABLES,
    ) -> AbstractContextManager[HeldState]:
        """The state of a user's history while the block runs; see `StateCache.held`."""
        ...

    def kept_tokens(self, user: str, history: UserHistory, tokens: Tokens, tables: TokenTables) -> tuple[int, ...]:
        """How many tokens of each block `held` would not have to compute: of a kept state. It may be otherwise when it
        is called."""
        ...

    def has(self, user: str) -> bool:
        """Whether a state of the user is in memory, of whatever history."""
        ...

    def when_free(self, user: str, then: Callable[[], None]) -> bool:
        """Whether somebody computes the user's state right now, so that `held` would wait; then `then` is called when
        they have done it."""
        ...

    def abandon(self, user: str, executor: Executor) -> None:
        """An executor hangs. If it computes the user's state nobody waits for it any more, and what it makes is
        nobody's."""
        ...

    def extend_up_to(self, most_new: Mapping[int, int]) -> None:
        """How many new tokens a block are worth appending to a state, by its room; more are encoded anew."""
        ...

    def counts(self) -> StateCounts:
        """A snapshot."""
        ...

    def close(self) -> None:
        """Nothing is asked for after this."""
        ...


def of_its_own(made: Mapping[str, Array], tokens: Tokens) -> dict[str, Array]:
    """A state whose arrays are none of the executor's inputs, which its next call overwrites: some engines hand parts
    of a history through, and the state of a model that has none is its history."""
    inputs = tokens.values()
    return {
        name: array.copy() if any(np.may_share_memory(array, one) for one in inputs) else array
        for name, array in made.items()
    }


def nothing_of(tokens: Tokens) -> tuple[int, ...]:
    """No token of any block."""
    return (0,) * int(tokens["history_length"].shape[1])


class NoStates:
    """Keeps nothing: every history is encoded, every time."""

    def __init__(self) -> None:
        self._encoded = count()
        self._number = 0

    @contextmanager
    def held(
        self,
        user: str,
        history: UserHistory,
        tokens: Callable[[], Tokens],
        executor: Executor,
        deadline: float | None = None,
        wait: bool = True,
        tables: TokenTables = NO_TABLES,
    ) -> Iterator[HeldState]:
        """The state, computed now."""
        made = tokens()
        tables.write(made, nothing_of(made))
        state = UserState(of_its_own(executor.encode(made), made), tuple(made["history_length"][0].tolist()))
        self._number = next(self._encoded) + 1
        yield HeldState(state, Origin.ENCODED)

    def kept_tokens(self, user: str, history: UserHistory, tokens: Tokens, tables: TokenTables) -> tuple[int, ...]:
        """None."""
        return nothing_of(tokens)

    def has(self, user: str) -> bool:
        """Never."""
        return False

    def when_free(self, user: str, then: Callable[[], None]) -> bool:
        """Never: everybody computes for himself."""
        return False

    def abandon(self, user: str, executor: Executor) -> None:
        """Nobody waits."""

    def extend_up_to(self, most_new: Mapping[int, int]) -> None:
        """There is nothing to extend."""

    def counts(self) -> StateCounts:
        """Nothing is ever found."""
        return StateCounts({Origin.ENCODED.value: self._number}, unkept=self._number)

    def close(self) -> None:
        """Nothing to keep."""
