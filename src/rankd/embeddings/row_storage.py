"""Rows of float32 as a table keeps them, and back. In: (n, D) float32. Out: (n, row_bytes) uint8, a record a row.

Integers are rounded to nearest between the least and the largest number of their row, as row-wise quantization
commonly is: number = scale * integer + offset. A record is the integers, then scale and offset, float32 each; of int4
the even column of a pair is in the lower half of its byte.

Worked example, int4, the row 1.0 2.25 4.0: scale 0.2 and offset 1.0, integers 0 6 15, so the bytes 0x60 0x0f and then
scale and offset; read again 1.0 2.2 4.0. The largest error is half a scale.
"""

from __future__ import annotations

import numpy as np

from rankd.embeddings.table_spec import ROW_BYTES, VALUE_BITS, TableStorage
from rankd.errors import BuildError
from rankd.types import Array, Float32Array

SCALED = (TableStorage.INT8, TableStorage.INT4)
"""Storages with scale and offset."""
_PAIR_BITS = 4


def pack_rows(numbers: Float32Array, storage: TableStorage) -> Array:
    """Records (n, row_bytes) uint8 of rows (n, D).

    Raises:
        BuildError: numbers that are not finite, or too large for the storage.
    """
    if not np.isfinite(numbers).all():
        raise BuildError(f"row {_first(~np.isfinite(numbers))} of the block is not finite; tables hold finite numbers")
    if storage is TableStorage.FP32:
        return np.ascontiguousarray(numbers, np.float32).view(np.uint8)
    if storage is TableStorage.FP16:
        largest = np.finfo(np.float16).max
        if (over := np.abs(numbers) > largest).any():
            raise BuildError(f"row {_first(over)} of the block has a number above {largest}; keep the table as fp32")
        return np.ascontiguousarray(numbers, np.float16).view(np.uint8)
    levels = (1 << VALUE_BITS[storage]) - 1
    least, most = (pick(numbers, axis=1).astype(np.float64) for pick in (np.min, np.max))
    if (wide := most - least > np.finfo(np.float32).max).any():
        raise BuildError(f"row {int(np.argmax(wide))} of the block is wider than float32; keep the table as fp32")
    exact = (most - least) / levels
    scale = exact.astype(np.float32)
    scale = np.where(scale < exact, np.nextafter(scale, np.float32(np.inf)), scale)  # so that the largest is reached
    divisor = np.where(scale > 0, scale, 1).astype(np.float64)
    integers = np.rint((numbers - least[:, None]) / divisor[:, None]).astype(np.uint8)
    if storage is TableStorage.INT4:
        integers = np.pad(integers, ((0, 0), (0, numbers.shape[1] % 2)))
        integers = integers[:, ::2] | integers[:, 1::2] << _PAIR_BITS
    scales = np.stack([scale, least.astype(np.float32)], axis=1).view(np.uint8)
    return np.concatenate([integers, scales], axis=1)


def unpack_rows(records: Array, storage: TableStorage, dim: int) -> Float32Array:
    """Rows (n, dim) float32 of records (n, row_bytes) uint8."""
    records = np.ascontiguousarray(records)
    if storage not in SCALED:
        kind = np.float32 if storage is TableStorage.FP32 else np.float16
        return records.view(kind).astype(np.float32)
    integers, scales = np.split(records, [-ROW_BYTES[storage]], axis=1)
    if storage is TableStorage.INT4:
        integers = np.stack([integers & 15, integers >> _PAIR_BITS], axis=2)
        integers = integers.reshape(len(records), 2 * integers.shape[1])[:, :dim]
    scale, offset = np.split(np.ascontiguousarray(scales).view(np.float32), 2, axis=1)
    unpacked: Float32Array = integers.astype(np.float32) * scale + offset
    return unpacked


def _first(wrong: Array) -> int:
    """The first row with a True."""
    return int(np.argmax(wrong.any(axis=1)))
