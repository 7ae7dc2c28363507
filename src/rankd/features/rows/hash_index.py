"""Hashes to numbers, whole requests at a time: item hashes to item rows, hashes of categories to codes.

In: 64-bit hashes (`store_keys.hash_id`), whose low bits must differ as much as the others. Out: int32 numbers.
Next: `decoding_kernels.py`, which holds the loops.
"""

from __future__ import annotations

import numpy as np

from rankd.types import Array, Int32Array


class HashIndex:
    """Which number belongs to a key; never changed once it is made, so any thread may read it.

    `keys` (n,) uint64 and `values` (n,) int32. Key 0 means nothing: it is passed over and never found. The first index
    of a process compiles its loops (seconds; kept on disk for the next process).

    Raises:
        ValueError: a key comes twice, or there are not as many values as keys.
    """

    def __init__(self, keys: Array, values: Int32Array) -> None:
        # Imported here: it brings numba, which takes half a second.
        from rankd.features.rows.decoding_kernels import fill_table, find_values

        if keys.shape != values.shape:
            raise ValueError(f"{keys.shape[0]} keys and {values.shape[0]} values; give one value for each key")
        self._find_values = find_values
        slots = 1 << max(2 * keys.shape[0] - 1, 1).bit_length()
        self.table: Array = np.zeros((slots, 2), np.uint64)
        """(slots, 2) uint64: key and value; see `decoding_kernels.py`."""
        if not fill_table(self.table, np.ascontiguousarray(keys, np.uint64), np.ascontiguousarray(values, np.int32)):
            raise ValueError(f"a key comes twice among {keys.shape[0]}; every key may have one value")

    @property
    def memory_bytes(self) -> int:
        """Bytes of the table."""
        return self.table.nbytes

    def find(self, keys: Array, out: Int32Array, missing: int) -> None:
        """The values of keys (m,) uint64 into out (m,) int32; `missing` for 0 and for keys that are not here.

        Raises:
            ValueError: `out` has not one place for each key.
        """
        if keys.shape != out.shape:
            raise ValueError(f"out has {out.shape[0]} places for {keys.shape[0]} keys")
        self._find_values(self.table, keys, out, missing)
