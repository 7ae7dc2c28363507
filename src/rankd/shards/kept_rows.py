"""Rows of tables on shards that are kept in this process too: a snapshot, which never changes.

In: rows as shards gave them, one by one. Out: which rows those are, as the router asks it, and sums of them. Rows are
kept in the storage of their table: packed again they are the integers that they were, and scale and offset differ in
the last bit at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rankd.embeddings.local_tables import LocalTables
from rankd.embeddings.row_storage import pack_rows
from rankd.embeddings.table_file import Table
from rankd.embeddings.table_spec import TablePart, TableSpec
from rankd.shards.pool_frames import read_pool
from rankd.shards.routing import KeptIndex, RoutedCall, Router
from rankd.shards.shard_layout import ServedNet, ServedPart
from rankd.types import Array, Float32Array, Int64Array

INDEX_BYTES = 64
"""Of a row, at most, beside its own bytes: two numbers in a hash table that is a quarter to half full."""


@dataclass(frozen=True, slots=True)
class SomeRows:
    """Rows (n,) of a table, ascending, and their records (n, row_bytes) as the table's storage has them."""

    spec: TableSpec
    rows: Int64Array
    records: Array

    @property
    def size_bytes(self) -> int:
        """With what it takes to find them."""
        return len(self.rows) * (self.spec.row_bytes + INDEX_BYTES)


def pack(spec: TableSpec, rows: Int64Array, values: Float32Array) -> SomeRows:
    """Rows of a table with their numbers (n, dim).

    Raises:
        BuildError: numbers that no table has.
    """
    return SomeRows(spec, rows, pack_rows(values, spec.storage))


class KeptRows:
    """Rows of any tables of a layout. `generation` says of which connections they came: rows of others may differ."""

    def __init__(self, router: Router, some: Mapping[str, SomeRows], generation: int) -> None:
        self.some, self.generation = some, generation
        self.index: KeptIndex = router.index_of({name: one.rows for name, one in some.items()})
        specs = [(one.spec, one.records) for one in some.values()]
        self._tables = LocalTables(
            Table(TableSpec(spec.name, len(records), spec.dim, spec.storage), TablePart(spec.name), records)
            for spec, records in specs
        )
        parts = tuple(ServedPart(TablePart(spec.name), spec.rows, spec.dim) for spec in router.specs)
        self._nets = (ServedNet("kept", parts),)

    @property
    def size_bytes(self) -> int:
        """Of all rows."""
        return sum(one.size_bytes for one in self.some.values())

    def answer(self, call: RoutedCall) -> Float32Array:
        """The sums that a shard would send."""
        blocks = read_pool(call.payload, self._nets, call.answer_bytes).blocks
        sums = [self._tables.pool(block).reshape(-1) for block in blocks]
        return np.concatenate(sums)
