"""Ids of a request -> what each shard is asked: whose rows are where, and what need not travel twice.

In: JaggedIds over whole tables. Out: RoutedCalls, one for each shard and net that has any of the rows.

Worked example, a table of 7 rows split by 2, samples [6, 3] and [4]:

    remainder 0, on shard a    rows 6 and 4 -> its rows 3 and 2    counts 1, 1
    remainder 1, on shard b    row 3        -> its row 1           counts 1, 0

Where all samples have the same ids in a table (a user's, when the samples are candidates) they travel as one sample,
and so does the sum. Other repetitions are sent as they are: to find them takes a sort, many times what their 2 or 4
bytes take to send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.errors import InvalidRequest, nearest
from rankd.shards.pool_frames import Block, PartIds, id_type
from rankd.shards.shard_layout import ShardLayout
from rankd.types import Int64Array


@dataclass(frozen=True, slots=True)
class PartPlace:
    """Where a part is: the shard's place in the layout, the net's in what the shard serves, the part's in the net."""

    shard: int
    net: int
    part: int
    id_type: np.dtype[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class TablePlace:
    """Where a table is; `parts` by remainder."""

    name: str
    rows: int
    dim: int
    parts: tuple[PartPlace, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the table at `position` of those asked: its place in the order of addition is `remainder`."""

    position: int
    remainder: int
    dim: int
    ids: PartIds


@dataclass(slots=True)
class RoutedCall:
    """What one shard is asked in one net: `same` for all samples together, `each` for each of `num_samples`."""

    shard: int
    net: int
    num_samples: int
    same: list[Piece] = field(default_factory=list)
    each: list[Piece] = field(default_factory=list)

    def blocks(self) -> list[tuple[int, list[Piece]]]:
        """Samples and pieces of each block, in the order in which they are sent and answered."""
        return [(samples, pieces) for samples, pieces in ((1, self.same), (self.num_samples, self.each)) if pieces]

    def asked(self) -> list[Block]:
        """As they are sent."""
        return [Block(samples, [piece.ids for piece in pieces]) for samples, pieces in self.blocks()]

    @property
    def answer_bytes(self) -> int:
        """Of its sums."""
        return 4 * sum(samples * piece.dim for samples, pieces in self.blocks() for piece in pieces)


class Router:
    """Knows where each row of a layout is.

    Raises:
        ConfigError: the layout does not hold together.
    """

    def __init__(self, layout: ShardLayout) -> None:
        layout.check()
        found: dict[str, dict[int, PartPlace]] = {spec.name: {} for net in layout.nets for spec in net.tables}
        for shard, described in enumerate(layout.shards):
            for number, net in enumerate(layout.served_by(described)):
                for place, served in enumerate(net.parts):
                    part = PartPlace(shard, number, place, id_type(served.rows))
                    found[served.part.table][served.part.remainder] = part
        self._tables = {
            spec.name: TablePlace(
                spec.name, spec.rows, spec.dim, tuple(found[spec.name][n] for n in range(len(found[spec.name])))
            )
            for net in layout.nets
            for spec in net.tables
        }

    def places(self, asked: JaggedIds) -> list[TablePlace]:
        """Where the tables asked are.

        Raises:
            InvalidRequest: an unknown table.
        """
        try:
            return [self._tables[name] for name in asked.tables]
        except KeyError as error:
            name = str(error.args[0])
            raise InvalidRequest(f"there is no table '{name}'.{nearest(name, self._tables)}") from None

    def route(self, asked: JaggedIds, places: Sequence[TablePlace]) -> list[RoutedCall]:
        """What is asked of whom, by shard and net.

        Raises:
            InvalidRequest: offsets that do not fit, or an id outside of its table.
        """
        asked.check()
        samples = asked.num_samples
        if not samples:
            return []
        counts = np.diff(asked.offsets).reshape(len(places), samples)
        least, most = counts.min(axis=1).tolist(), counts.max(axis=1).tolist()
        ends = asked.offsets[::samples].tolist()
        calls: dict[tuple[int, int], RoutedCall] = {}
        for position, table in enumerate(places):
            ids = asked.ids[ends[position] : ends[position + 1]]
            if not len(ids):
                continue
            _check_ids(ids, table)
            each = most[position] if least[position] == most[position] else None
            same = each is not None and _same_for_all(ids, each)
            ids, number = (ids[:each], counts[position, :1]) if same else (ids, counts[position])
            for remainder, piece_ids in _split(ids, number, each, table):
                part = table.parts[remainder]
                call = calls.setdefault((part.shard, part.net), RoutedCall(part.shard, part.net, samples))
                (call.same if same else call.each).append(Piece(position, remainder, table.dim, piece_ids))
        return [calls[key] for key in sorted(calls)]


def _check_ids(ids: Int64Array, table: TablePlace) -> None:
    most = int(ids.view(np.uint64).max())  # a negative one is larger than any row
    if most >= table.rows:
        wrong = ids[(ids < 0) | (ids >= table.rows)]
        raise InvalidRequest(f"table '{table.name}' has rows 0 to {table.rows - 1}; row {wrong[0]} was asked")


def _same_for_all(ids: Int64Array, each: int) -> bool:
    """Whether all samples, which have `each` ids, have the same ones."""
    first = ids[:each]
    if (first != ids[-each:]).any():  # mostly seen here already
        return False
    return bool((ids.reshape(-1, each) == first).all())


def _split(ids: Int64Array, counts: Int64Array, each: int | None, table: TablePlace) -> list[tuple[int, PartIds]]:
    """The ids of each part that has any, by remainder; `each`: the only number in `counts` (B,), if there is one."""
    modulus = len(table.parts)
    if modulus == 1:
        part = table.parts[0]
        return [(0, PartIds(part.part, counts if each is None else None, ids.astype(part.id_type)))]
    rows = ids // modulus
    remainders = ids - rows * modulus  # a third of the time of `np.divmod`
    rows = rows[np.argsort(remainders.astype(np.uint16 if modulus <= 1 << 16 else np.int64), kind="stable")]
    samples = len(counts)
    cells = remainders * samples + np.repeat(np.arange(samples), counts)
    found = np.bincount(cells, minlength=modulus * samples).reshape(modulus, samples)
    begin, pieces = 0, []
    for remainder, number in enumerate(found.sum(axis=1).tolist()):
        if number:
            part, number_of = table.parts[remainder], found[remainder] if samples > 1 else None
            pieces.append((remainder, PartIds(part.part, number_of, rows[begin : begin + number].astype(part.id_type))))
            begin += number
    return pieces
