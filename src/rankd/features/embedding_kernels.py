"""Ids of embedded features from packed columns, compiled by numba: what `embedded.py` asks the tables for."""

from __future__ import annotations

from rankd.machine_code import kernel, read, types, written
from rankd.types import Array, Int32Array, Int64Array


@kernel(
    types.int64(
        read(types.int32, 1),
        read(types.int32, 2),
        read(types.int64, 2),
        written(types.int64, 1),
        written(types.int64, 1),
    )
)
def write_ids(rows: Int32Array, codes: Array, columns: Int64Array, offsets: Int64Array, ids: Int64Array) -> int:
    """Write ids and offsets (`embeddings.jagged`) of n samples in F features; returns how many ids there are.

    rows (n,) are the samples' own rows, codes (n, G) their columns. A feature is (first, last, offset) of `columns`:
    the codes first..last - 1, the code `offset` being row 1 of the table; or the row itself where first is -1. Zeros
    are left out. `offsets` has room for F * n + 1, `ids` for n times the widths.
    """
    count, place = 0, 0
    offsets[0] = 0
    for feature in range(columns.shape[0]):
        first, last, offset = columns[feature, 0], columns[feature, 1], columns[feature, 2]
        for sample in range(rows.shape[0]):
            if first < 0:
                if rows[sample] > 0:
                    ids[count] = rows[sample]
                    count += 1
            else:
                for column in range(first, last):
                    code = codes[sample, column]
                    if code > 0:
                        ids[count] = code - offset + 1
                        count += 1
            place += 1
            offsets[place] = count
    return count
