"""Parts of tables put on shards so that the heaviest shard is light: largest first, then moves and swaps.

In: parts with a weight (bytes, or look-ups) and their bytes. Out: which shard has which.

Parts of one table go to different shards. Without a memory limit, and with tables cut into equal parts, two shards
differ by at most the heaviest part: a table's parts go to the lightest shards, which cannot make a difference larger
than it was or than a part is. So the heaviest shard has at most the mean and one part, which is at most twice the
least possible. Moves and swaps only make it lighter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rankd.embeddings.table_spec import TablePart

ROUNDS = 200
"""Moves and swaps at most; dlrm-v2 on 64 shards ends after fewer."""
GAIN = 1e-9
"""Of the heaviest shard: what a move has to win, so that rounding does not go on for ever."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Parts that stay together: one, or all of a net. `tables` are theirs, for no shard gets two parts of one."""

    parts: tuple[TablePart, ...]
    tables: frozenset[str]
    size_bytes: int
    weight: float


@dataclass(slots=True)
class Bin:
    """A shard as it is filled."""

    pieces: list[Piece] = field(default_factory=list)
    tables: set[str] = field(default_factory=set)
    size_bytes: int = 0
    weight: float = 0.0

    def takes(self, piece: Piece, limit_bytes: float, without: Piece | None = None) -> bool:
        """Whether a piece may go here, if `without` leaves."""
        leaving = without.size_bytes if without is not None else 0
        staying = self.tables - without.tables if without is not None else self.tables
        return self.size_bytes - leaving + piece.size_bytes <= limit_bytes and staying.isdisjoint(piece.tables)

    def put(self, piece: Piece) -> None:
        """Add a piece that it takes."""
        self.pieces.append(piece)
        self.tables |= piece.tables
        self.size_bytes += piece.size_bytes
        self.weight += piece.weight

    def drop(self, piece: Piece) -> None:
        """Let go of a piece that it has."""
        self.pieces.remove(piece)
        self.tables -= piece.tables
        self.size_bytes -= piece.size_bytes
        self.weight = sum(one.weight for one in self.pieces)


def pack(pieces: Iterable[Piece], num_shards: int, limit_bytes: int | None) -> list[Bin] | None:
    """Every piece on one of `num_shards`; None if that was not found within the limit."""
    limit = float("inf") if limit_bytes is None else limit_bytes
    bins = [Bin() for _ in range(num_shards)]
    for piece in sorted(pieces, key=lambda one: (-one.weight, -one.size_bytes, min(one.tables))):
        taking = [bin_ for bin_ in bins if bin_.takes(piece, limit)]
        if not taking:
            return None
        min(taking, key=lambda bin_: (bin_.weight, bin_.size_bytes)).put(piece)
    for _ in range(ROUNDS):
        if not _improve(bins, limit):
            break
    return bins


def _improve(bins: list[Bin], limit: float) -> bool:
    """Make the heaviest shard lighter by the best one move or swap with another; False if none does."""
    heaviest = max(bins, key=lambda bin_: bin_.weight)
    best = heaviest.weight * (1 - GAIN)
    found: tuple[Bin, Piece, Piece | None] | None = None
    for other in bins:
        if other is heaviest:
            continue
        for piece in heaviest.pieces:
            for back in (None, *other.pieces):
                moved = piece.weight - (back.weight if back is not None else 0.0)
                after = max(heaviest.weight - moved, other.weight + moved)
                if after < best and other.takes(piece, limit, back) and _fits_back(heaviest, back, limit, piece):
                    best, found = after, (other, piece, back)
    if found is None:
        return False
    other, piece, back = found
    heaviest.drop(piece)
    if back is not None:
        other.drop(back)
        heaviest.put(back)
    other.put(piece)
    return True


def _fits_back(heaviest: Bin, back: Piece | None, limit: float, without: Piece) -> bool:
    return back is None or heaviest.takes(back, limit, without)
