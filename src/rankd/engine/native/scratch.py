"""The memory that a call works in, kept from call to call; it grows with the largest shape, not with their number.

In: a packed model and a shape. Out: addresses (`layout.Scratch`), and the logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rankd.engine.native.layout import FFN_ROWS, PAD, Scratch
from rankd.engine.native.weight_panels import Packed, aligned
from rankd.errors import ConfigError


class Workplace:
    """One thread's memory."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._memory = ScratchMemory(packed, 1, 32)

    def memory(self, rows: int, columns: int) -> ScratchMemory:
        """Memory for at least so many rows (tokens, or candidates x N) and columns (keys).

        Raises:
            ConfigError: more columns than the relative bias has distances for.
        """
        most = self._packed.sizes.distances - 17
        if columns > most:
            raise ConfigError(f"{columns} history tokens in one block; this model's bias reaches {most}")
        held = self._memory
        if rows > held.rows or columns + 1 > held.columns:
            wider = (max(columns + 1, held.columns) + 31) // 32 * 32
            self._memory = ScratchMemory(self._packed, max(rows, held.rows), wider)
        return self._memory


class ScratchMemory:
    """Memory of one shape; `layout.Scratch` says what lies where."""

    def __init__(self, packed: Packed, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        sz = packed.sizes
        channels, widest, bf16 = sz.blocks * sz.width, max(sz.width, sz.gate, sz.hidden), np.uint16
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "tokens": ((rows, sz.width), np.float32),
            "normed": ((max(rows, FFN_ROWS), sz.width + PAD // 2), bf16),
            "qkv": ((rows, 3 * sz.width + PAD // 2), bf16),
            "attended": ((rows, sz.width + PAD // 2), bf16),
            "hidden": ((FFN_ROWS, sz.ffn + PAD // 2), bf16),
            "wide": ((rows, max(channels, sz.hidden) + PAD // 2), bf16),
            "inner": ((rows, widest + PAD // 2), bf16),
            "keys": ((columns, sz.head_room), bf16),
            "values": ((columns, sz.head_room), bf16),
            "scores": ((12, columns + PAD // 4), np.float32),
            "powers": ((12, columns + PAD // 2), bf16),
            "factors": ((2, 16), np.float32),
            "bias": ((columns,), np.float32),
            "buckets": ((rows, columns), np.uint8),
            "user": ((sz.width,), np.float32),
            "mixed": ((sz.width,), np.float32),
            "key_rows": ((columns,), np.int64),
            "value_rows": ((columns,), np.int64),
            "nothing": ((sz.width,), bf16),
            "times": ((columns,), np.int32),
            "features": ((rows, sz.numeric), bf16),
            "line": ((max(sz.numeric, sz.blocks, 16),), np.float32),
            "logits": ((rows, 32), np.float32),
        }
        self._arrays = {name: aligned(shape, dtype) for name, (shape, dtype) in shapes.items()}
        addresses = {name: array.ctypes.data for name, array in self._arrays.items()}
        self.scratch = Scratch(**addresses, columns=columns)
        self.logits = self._arrays["logits"]
