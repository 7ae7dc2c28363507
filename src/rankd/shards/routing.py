"""Ids of a request -> what each shard is asked, and from its answers to sums.

In: JaggedIds over whole tables; several, of other numbers of samples (a user's ids are those of one sample), are asked
together. Out: Routed, with a call for each shard and net that has any of the rows. `routing_kernels.py` has the loops.

Worked example, a table of 7 rows split by 2, samples [6, 3] and [4]:

    remainder 0, on shard a    rows 6 and 4 -> its rows 3 and 2    counts 1, 1
    remainder 1, on shard b    row 3        -> its row 1           counts 1, 0

What several samples have in common travels once (`routing_kernels.py` says when), and so does its sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.errors import InvalidRequest, nearest
from rankd.shards.pool_frames import id_type
from rankd.shards.shard_layout import ShardLayout
from rankd.types import Array, Float32Array, Int32Array, Int64Array

KEPT = -1
"""In place of a shard: the rows that are kept in this process."""
KEPT_ID_BYTES = 4


@dataclass(frozen=True, slots=True)
class RoutedCall:
    """What one shard is asked in one net: the pieces first..end - 1. `answer_bytes`: of its sums."""

    shard: int
    net: int
    payload: memoryview
    answer_bytes: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class KeptIndex:
    """Which rows are kept in this process: `tables` as the router has them, and the hash tables `rows` (H, 2)."""

    tables: Int64Array
    rows: Int64Array


class Routed:
    """All calls of a request, and how their answers become sums. `kept`: what of it is looked up in this process."""

    def __init__(
        self,
        asked: Sequence[JaggedIds],
        dims: Sequence[int],
        calls: Sequence[RoutedCall],
        pieces: Int64Array,
        bags_of: Int32Array,
    ) -> None:
        from rankd.shards import answer_kernels, routing_kernels

        self.asked, self._dims = tuple(asked), dims
        self.calls = tuple(call for call in calls if call.shard != KEPT)
        self.kept = next((call for call in calls if call.shard == KEPT), None)
        self._pieces, self._bags_of = pieces, bags_of
        self._fields, self._kernels = routing_kernels, answer_kernels
        self.tables = tuple(name for one in self.asked for name in one.tables)

    def positions(self, call: RoutedCall) -> list[int]:
        """Which of the `tables` asked a call is for."""
        found: list[int] = self._pieces[call.first : call.end, self._fields.POSITION].tolist()
        return found

    def num_ids(self, call: RoutedCall) -> int:
        """How many rows a call is for."""
        return int(self._pieces[call.first : call.end, self._fields.IDS].sum())

    def has_ids(self, position: int) -> tuple[int, Array]:
        """The place among `asked` of a table's question, and which of its samples (B,) have ids."""
        place, table = next(one for number, one in enumerate(self._places()) if number == position)
        asked = self.asked[place]
        samples = asked.num_samples
        return place, np.diff(asked.offsets[table * samples : (table + 1) * samples + 1]) > 0

    def room(self) -> tuple[list[Float32Array], list[Int64Array]]:
        """Arrays (B, W) for the sums of each question, and the columns of its tables, side by side."""
        into, columns, first = list[Float32Array](), list[Int64Array](), 0
        for asked in self.asked:
            ends = np.cumsum([0, *self._dims[first : first + len(asked.tables)]])
            into.append(np.empty((asked.num_samples, int(ends[-1])), np.float32))
            columns.append(np.stack([ends[:-1], ends[1:]], axis=1))
            first += len(asked.tables)
        return into, columns

    def add_up(
        self,
        answers: Sequence[Array | None],
        into: Sequence[Float32Array],
        columns: Sequence[Int64Array],
        kept_answer: Array | None = None,
    ) -> None:
        """Write the sums of each of `asked` into its `into` (B, W), those of its f-th table into the columns from
        columns[f, 0] up to columns[f, 1]; zeros for a table of which an answer, one for each of `calls` and for `kept`
        if there is that, is not there. Answers are float32, or bfloat16 as uint16."""
        fields, pieces = self._fields, self._pieces
        addresses, narrow = np.zeros(len(pieces), np.int64), np.zeros(len(pieces), np.bool_)
        for call, answer in zip(self.calls, answers, strict=True):
            if answer is not None:
                addresses[call.first : call.end] = answer.ctypes.data
                narrow[call.first : call.end] = answer.dtype == np.uint16
        if self.kept is not None and kept_answer is not None:
            addresses[self.kept.first : self.kept.end] = kept_answer.ctypes.data
        order = np.lexsort((pieces[:, fields.REMAINDER], pieces[:, fields.POSITION]))
        if not addresses.all():
            lost = np.unique(pieces[addresses == 0, fields.POSITION])
            order = order[~np.isin(pieces[order, fields.POSITION], lost)]
        pieces, addresses, narrow = pieces[order], addresses[order], narrow[order]
        firsts = np.searchsorted(pieces[:, fields.POSITION], np.arange(len(self.tables) + 1))
        first = 0
        for asked, out, where in zip(self.asked, into, columns, strict=True):
            own = firsts[first : first + len(asked.tables) + 1]
            self._kernels.add_up(pieces, own, addresses, narrow, self._bags_of, where, out)
            first += len(asked.tables)

    def _places(self) -> Iterator[tuple[int, int]]:
        for place, asked in enumerate(self.asked):
            for table in range(len(asked.tables)):
                yield place, table


class Router:
    """Knows where each row of a layout is. The first of a process compiles the loops (kept on disk for the next one).

    Raises:
        ConfigError: the layout does not hold together.
    """

    def __init__(self, layout: ShardLayout) -> None:
        # Imported here: it brings numba, which takes half a second.
        from rankd.shards import routing_kernels as fields

        layout.check()
        self._fields = fields
        self.specs = [spec for net in layout.nets for spec in net.tables]
        self._numbers = {spec.name: number for number, spec in enumerate(self.specs)}
        nets = [layout.served_by(shard) for shard in layout.shards]
        self._called = [(shard, net) for shard, served in enumerate(nets) for net in range(len(served))]
        self.moduli = [1] * len(self.specs)
        found: dict[tuple[str, int], list[int]] = {}
        for call, (shard, net) in enumerate(self._called):
            for number, served in enumerate(nets[shard][net].parts):
                part = served.part
                self.moduli[self._numbers[part.table]] = part.modulus
                id_bytes = id_type(served.rows).itemsize
                found[part.table, part.remainder] = [call, net, number, id_bytes, served.dim]
        places, tables = list[list[int]](), list[list[int]]()
        for number, (spec, modulus) in enumerate(zip(self.specs, self.moduli, strict=True)):
            tables.append([spec.rows, modulus, len(places), 0, -1])
            places += [found[spec.name, remainder] for remainder in range(modulus)]
            places.append([len(self._called), 0, number, KEPT_ID_BYTES, spec.dim])
        self._places = np.asarray(places, np.int64).reshape(-1, fields.PLACE_FIELDS)
        self._nothing_kept = KeptIndex(
            np.asarray(tables, np.int64).reshape(-1, fields.TABLE_FIELDS), np.zeros((0, 2), np.int64)
        )

    def index_of(self, rows: Mapping[str, Int64Array]) -> KeptIndex:
        """What `route` has to know of rows, each table's once, that are kept in this process; of n rows of a table the
        first is row 0 of those kept, and so on."""
        fields, tables = self._fields, self._nothing_kept.tables.copy()
        sizes = {name: 1 << (2 * len(some) - 1).bit_length() for name, some in rows.items() if len(some)}
        index, begin = np.full((sum(sizes.values()), 2), -1, np.int64), 0
        for name, size in sizes.items():
            table = tables[self._numbers[name]]
            table[fields.KEPT_AT], table[fields.KEPT_MASK] = begin, size - 1
            fields.index_rows(np.ascontiguousarray(rows[name]), index[begin : begin + size])
            begin += size
        return KeptIndex(tables, index)

    def route(self, asked: Sequence[JaggedIds], kept: KeptIndex | None = None) -> Routed:
        """What is asked of whom, by shard and net.

        Raises:
            InvalidRequest: an unknown table, offsets that do not fit, or an id outside of its table.
        """
        numbers = [self._numbers_of(one) for one in asked]
        for one in asked:
            one.check()
        fields, index = self._fields, kept or self._nothing_kept
        places = [sum(self.moduli[number] + 1 for number in some.tolist()) for some in numbers]
        cells = [many * (one.num_samples + 1) for many, one in zip(places, asked, strict=True)]
        rows, starts = np.empty(sum(len(one.ids) for one in asked), np.int64), np.empty(sum(cells), np.int64)
        bags, sent = np.empty(sum(cells), np.int32), np.empty(sum(cells), np.int32)
        pieces = np.empty((sum(places), fields.PIECE_FIELDS), np.int64)
        count, position, rows_at = 0, 0, 0
        for one, some, cells_at in zip(asked, numbers, accumulate([0, *cells]), strict=False):
            ids, own = np.ascontiguousarray(one.ids), rows[rows_at : rows_at + len(one.ids)]
            where = (index.tables, index.rows, position, rows_at, cells_at)
            split = fields.split(
                some, np.ascontiguousarray(one.offsets), ids, *where, own, starts, bags, sent, pieces[count:]
            )
            if split < 0:
                raise self._outside(one, -1 - split)
            count, position, rows_at = count + split, position + len(some), rows_at + len(ids)
        pieces = pieces[:count]
        called = self._places[pieces[:, fields.PLACE], fields.CALLED]
        pieces = pieces[np.lexsort((pieces[:, fields.SAMPLES], called))]
        dims = [self.specs[number].dim for some in numbers for number in some.tolist()]
        return Routed(asked, dims, self._calls(pieces, rows, starts, sent), pieces, bags)

    def _calls(self, pieces: Int64Array, rows: Int64Array, starts: Int64Array, sent: Int32Array) -> list[RoutedCall]:
        fields = self._fields
        calls = np.empty((len(self._called) + 1, fields.CALL_FIELDS), np.int64)
        calls = calls[: fields.lay_out(pieces, self._places, calls)]
        payloads = np.empty(int(calls[-1, fields.BYTES_END]) if len(calls) else 0, np.uint8)
        fields.write_payloads(pieces, self._places, calls, rows, starts, sent, payloads)
        found = []
        for call, first, end, begin, last, numbers in calls.tolist():
            shard, net = self._called[call] if call < len(self._called) else (KEPT, 0)
            found.append(RoutedCall(shard, net, payloads[begin:last].data, 4 * numbers, first, end))
        return found

    def _numbers_of(self, asked: JaggedIds) -> Int64Array:
        try:
            return np.asarray([self._numbers[name] for name in asked.tables], np.int64)
        except KeyError as error:
            name = str(error.args[0])
            raise InvalidRequest(f"there is no table '{name}'.{nearest(name, self._numbers)}") from None

    def _outside(self, asked: JaggedIds, place: int) -> InvalidRequest:
        bag = int(np.searchsorted(asked.offsets, place, side="right")) - 1
        name = asked.tables[bag // asked.num_samples]
        rows = self.specs[self._numbers[name]].rows
        return InvalidRequest(f"table '{name}' has rows 0 to {rows - 1}; row {asked.ids[place]} was asked")
