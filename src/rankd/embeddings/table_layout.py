"""What the loops know of a table, as a line of int64: where its rows lie, and where its sums go.

In: a `Table`. Out: the line that `table_kernels.py` reads.
"""

from __future__ import annotations

import math

from rankd.embeddings.table_file import Table
from rankd.embeddings.table_spec import TableStorage

FIELDS = 8
ADDRESS, STRIDE, ROWS, DIM, STORAGE, LINES, LAST_LINE, COLUMN = range(FIELDS)
"""The address of row 0 and bytes from row to row; how many rows of how many numbers; the place in STORAGES; cache lines
that a row touches at most, and where in a row the last of them is asked for; the first column of the table's sums."""
STORAGES = tuple(TableStorage)
LINE_BYTES = 64


def layout(table: Table) -> list[int]:
    """The fields of a table; its column is 0."""
    spec, (stride, _) = table.spec, table.records.strides
    address, row_bytes = int(table.records.ctypes.data), spec.row_bytes
    # Rows begin at a multiple of this within a cache line: one of 40 bytes at 32 touches two lines.
    step = math.gcd(LINE_BYTES, stride, address)
    lines = -(-(LINE_BYTES - step + row_bytes) // LINE_BYTES)
    return [address, stride, len(table.records), spec.dim, STORAGES.index(spec.storage), lines, row_bytes - 1, 0]
