"""What the scheduler is asked to do, and whom it asks: requests come as `Asked`, and `Served` knows how to work on
them.

`ranker.py` serves real requests; tests and the simulation serve made-up ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from rankd.schedule.policy import Priority
from rankd.types import Float32Array

Item = TypeVar("Item")
Result = TypeVar("Result")
Contra = TypeVar("Contra", contravariant=True)
Co = TypeVar("Co", covariant=True)
Seat = TypeVar("Seat", contravariant=True)

When = Callable[[Callable[[], None]], None]
"""Calls what it is given once, when something is there; from any thread, or before it returns."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the schedule has to know of a request: how many candidates, whether its user's state is in memory, until
    when (seconds of the schedule's clock; None: no matter), how urgent it is, and how many events its history has
    (None: it is in a store)."""

    rows: int
    resident: bool = False
    deadline: float | None = None
    priority: Priority = Priority.INTERACTIVE
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Part(Generic[Item]):
    """The candidates first..first + count - 1 of a request."""

    item: Item
    first: int
    count: int


class Served(Protocol[Item, Co, Seat]):
    """How requests are worked on: on executors' threads, but for `abandon`, `let_go` and `drop`, of any thread. Of
    one request one thread does something at a time, except `assemble` and `score`, which several executors do for
    parts of the same request."""

    def prepare(self, item: Item, executor: Seat, alone: bool, wide: bool) -> When | None:
        """Have the history and the state of a request; a When if that has to wait for something, after which it is
        called again. `alone`: an executor was lost over this request, so nothing may be waited for or shared. `wide`:
        it may use the threads of all executors.

        Raises:
            RankdError: of this request.
        """
        ...

    def assemble(self, part: Part[Item], bucket: int, place: int, executor: Seat) -> None:
        """Write a part's inputs where `score` reads them: `place` of the executor's buffers of the bucket.

        Raises:
            RankdError: of this request.
        """
        ...

    def score(self, parts: Sequence[Part[Item]], bucket: int, executor: Seat) -> Sequence[Float32Array]:
        """Logits (count, K) of each part, in one call of the engine."""
        ...

    def take(self, part: Part[Item], logits: Float32Array) -> None:
        """Put a part's logits to the others."""
        ...

    def finish(self, item: Item) -> Co:
        """The answer, now that all parts are there."""
        ...

    def abandon(self, item: Item, executor: Seat) -> None:
        """The executor that was preparing a request hangs: have nobody else wait for what it was making."""
        ...

    def let_go(self, executor: Seat) -> None:
        """An executor is lost, since it failed or hangs, and is not used any more."""
        ...

    def drop(self, item: Item) -> None:
        """Give back what is held for a request: once for each that was submitted, when nobody works on it any more."""
        ...
