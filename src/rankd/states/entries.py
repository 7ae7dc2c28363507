"""What `cache.py` knows of a user: the state that is wanted, the one that is kept, and who computes it. In and out:
`cache.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rankd.engine.backend import Executor
from rankd.states.arena import Slab
from rankd.states.fingerprints import of_tokens
from rankd.states.lending import Tokens, TokenTables
from rankd.states.spill import SpilledHeader, id_bytes
from rankd.types import UserState


@dataclass(frozen=True, slots=True)
class Wanted:
    """A history whose state is asked for: its tokens, and the tables beside the graph that they are looked up in."""

    tokens: Tokens
    tables: TokenTables

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens of each block are real."""
        return tuple(self.tokens["history_length"][0].tolist())

    @property
    def room(self) -> int:
        """For how many tokens a block it has to have room."""
        return int(self.tokens["history_item"].shape[2])

    def mark(self, lengths: tuple[int, ...]) -> bytes:
        """The fingerprint of the first `lengths[n]` tokens of each block n."""
        return of_tokens(self.tokens, lengths, self.tables.contents)


@dataclass(slots=True)
class Entry:
    """A kept state. `readers` hold it; a `retired` one leaves its slab when the last of them is done."""

    user: str
    slab: Slab
    room: int
    lengths: tuple[int, ...]
    history_mark: bytes = b""
    tokens_mark: bytes = b""
    state: UserState | None = None  # over the slab's own memory, where nothing has to be converted
    readers: int = 0
    retired: bool = False

    def header(self, size_bytes: int) -> SpilledHeader:
        """What is written to disk before its arrays, which take so many bytes."""
        user = id_bytes(self.user)
        return SpilledHeader(user, self.history_mark, self.tokens_mark, self.lengths, self.room, size_bytes)

    def growth(self, wanted: Wanted) -> int | None:
        """By how many tokens the longest-grown block grew; None if the history is not a continuation."""
        lengths = wanted.lengths
        if any(new < old for new, old in zip(lengths, self.lengths, strict=True)):
            return None
        if wanted.mark(self.lengths) != self.tokens_mark:
            return None
        return max(new - old for new, old in zip(lengths, self.lengths, strict=True))


@dataclass(slots=True, eq=False)
class Claim:
    """The right of an executor to compute a user's state; `called` are told when it is done. Of one that was taken away
    `left` is the entry that it may still read and write, and holds until it comes back."""

    executor: Executor
    called: list[Callable[[], None]] = field(default_factory=list)
    left: Entry | None = None
