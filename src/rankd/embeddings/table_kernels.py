"""Pooled look-up in many tables, compiled by numba. In: arrays that `local_tables.py` has checked. Out: sums.

Importing this file imports numba and compiles what follows (2 s), or reads the machine code that an earlier process
kept.
"""

from __future__ import annotations

from collections.abc import Callable

from rankd.embeddings.row_sums import sum_of_rows
from rankd.embeddings.table_layout import (
    ADDRESS,
    COLUMN,
    DIM,
    LAST_LINE,
    LINES,
    ROWS,
    STORAGE,
    STORAGES,
    STRIDE,
)
from rankd.embeddings.table_spec import VALUE_BITS, TableStorage
from rankd.machine_code import kernel, part, read, types, written
from rankd.types import Float32Array, Int64Array

LANES = (128, 64, 32, 16)
"""Columns that are summed at once, the most first: the usual widths take one pass over the ids; 100 takes three, of 64,
of 32, and of 4 under a mask. 128 are eight registers of AVX-512."""
_FLOAT_BYTES, _ID_BYTES, _BYTE_BITS = 4, 8, 8
_FP32, _FP16, _INT8, _INT4 = (STORAGES.index(one) for one in TableStorage)
_Sum = Callable[[Int64Array, int, int, int, int, int], None]


def _sum_of_bag(storage: TableStorage) -> _Sum:
    """The sum of a bag of a storage, all columns."""
    bits = VALUE_BITS[storage]
    most, many, some, few = LANES
    sum_most, sum_many, sum_some, sum_few = (sum_of_rows(storage, lanes, masked=False) for lanes in LANES)
    sum_rest = sum_of_rows(storage, few, masked=True)

    @part
    def sum_bag(tables: Int64Array, table: int, ids: int, count: int, following: int, out: int) -> None:
        rows, stride, dim = tables[table, ADDRESS], tables[table, STRIDE], tables[table, DIM]
        lines, last = tables[table, LINES], tables[table, LAST_LINE]
        scales = rows + (dim * bits + _BYTE_BITS - 1) // _BYTE_BITS
        column = 0
        while column < dim:
            at, to, left = rows + column * bits // _BYTE_BITS, out + column * _FLOAT_BYTES, dim - column
            if left >= most:
                sum_most(at, stride, scales, ids, count, following, lines, last, to, left)
                column += most
            elif left >= many:
                sum_many(at, stride, scales, ids, count, following, lines, last, to, left)
                column += many
            elif left >= some:
                sum_some(at, stride, scales, ids, count, following, lines, last, to, left)
                column += some
            elif left >= few:
                sum_few(at, stride, scales, ids, count, following, lines, last, to, left)
                column += few
            else:
                sum_rest(at, stride, scales, ids, count, following, lines, last, to, left)
                column = dim
            lines = 0  # the first pass has asked for the whole row

    return sum_bag


_sum_fp32, _sum_fp16, _sum_int8, _sum_int4 = (_sum_of_bag(storage) for storage in TableStorage)


@kernel(
    types.int64(
        read(types.int64, 2, "C"),
        read(types.int64, 1, "C"),
        read(types.int64, 1, "C"),
        types.int64,
        types.int64,
        written(types.float32, 2),
    )
)
def sum_bags(tables: Int64Array, offsets: Int64Array, ids: Int64Array, first: int, last: int, out: Float32Array) -> int:
    """Bags first..last - 1 into out (B, W): bag f * B + b is of sample b in table f.

    Returns the place in `ids` of the first id that its table does not have, -1 if there is none. Sums before it are
    written.

    Args:
        tables: (F, fields of `table_layout.py`) int64.
        offsets, ids: of `JaggedIds`, checked.
    """
    samples, width = out.shape
    line_bytes = width * _FLOAT_BYTES
    for bag in range(first, last):
        table = bag // samples
        start, end, rows, storage = offsets[bag], offsets[bag + 1], tables[table, ROWS], tables[table, STORAGE]
        for place in range(start, end):
            if ids[place] < 0 or ids[place] >= rows:
                return place
        following = offsets[min((table + 1) * samples, last)] - start
        here = ids.ctypes.data + start * _ID_BYTES
        sums = out.ctypes.data + bag % samples * line_bytes + tables[table, COLUMN] * _FLOAT_BYTES
        if storage == _FP32:
            _sum_fp32(tables, table, here, end - start, following, sums)
        elif storage == _FP16:
            _sum_fp16(tables, table, here, end - start, following, sums)
        elif storage == _INT8:
            _sum_int8(tables, table, here, end - start, following, sums)
        elif storage == _INT4:
            _sum_int4(tables, table, here, end - start, following, sums)
    return -1
