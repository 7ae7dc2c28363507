"""What an embedding table is, and what a part of one is: said in models, in plans and on the wire.

Worked example, a table of 7 rows split by modulus 3:

    remainder 0: rows 0, 3, 6    remainder 1: rows 1, 4    remainder 2: rows 2, 5
    row 6 is row 2 of its part
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]


class TableStorage(Enum):
    """How the numbers of a row are kept. The integer ones have a scale and an offset for each row."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"


VALUE_BITS = {TableStorage.FP32: 32, TableStorage.FP16: 16, TableStorage.INT8: 8, TableStorage.INT4: 4}
ROW_BYTES = {TableStorage.FP32: 0, TableStorage.FP16: 0, TableStorage.INT8: 8, TableStorage.INT4: 8}
"""Of a row beside its numbers: scale and offset, float32 each."""


class TableSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of `rows` rows of `dim` numbers."""

    name: str
    rows: Count
    dim: Count
    storage: TableStorage = TableStorage.FP32

    @property
    def row_bytes(self) -> int:
        """Of one row as it is kept; a row begins at a whole byte."""
        return -(-self.dim * VALUE_BITS[self.storage] // 8) + ROW_BYTES[self.storage]

    @property
    def size_bytes(self) -> int:
        """Of all rows."""
        return self.rows * self.row_bytes


class TablePart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rows r of a table with r % modulus == remainder, in their order; all of them with modulus 1."""

    table: str
    modulus: Count = 1
    remainder: Annotated[int, Meta(ge=0)] = 0

    def rows_of(self, spec: TableSpec) -> int:
        """How many rows of the table it has."""
        return max(-(-(spec.rows - self.remainder) // self.modulus), 0)
