"""One piece of memory under a byte budget, cut into slabs of a few sizes.

The memory is cut into chunks of the largest size. A chunk belongs to one size at a time and is cut into as many slabs
of it as fit; when all of them are free it can become another size. Worked example, sizes 64, 128 and 256 KiB in a
budget of 600 KiB: two chunks of 256 KiB; one may hold four states of 64, the other one of 256.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankd.errors import ConfigError
from rankd.types import Allocate, Array, Bytes

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Slab:
    """A place in the arena."""

    chunk: int
    offset: int
    size: int


class Arena:
    """Not thread-safe: whoever owns it holds a lock. Sizes are rounded up to `ALIGNMENT` bytes. `allocate` makes its
    memory, of which only what is written to should be taken from the machine, where that can be.

    Raises:
        ConfigError: not even one slab of the largest size fits.
    """

    def __init__(self, budget_bytes: int, sizes: Sequence[int], allocate: Allocate | None = None) -> None:
        self._chunk_bytes = aligned(max(sizes))
        self._num_chunks = budget_bytes // self._chunk_bytes
        if self._num_chunks == 0:
            raise ConfigError(
                f"states.budget_mib gives {budget_bytes} bytes, and one state of this model takes up to "
                f"{self._chunk_bytes}; give more, or 0 to keep no states"
            )
        self._memory = (allocate or _anonymous)(self._num_chunks * self._chunk_bytes)
        self._untouched = 0  # chunks from here on were never used; those below are in use or in _free_chunks
        self._free_chunks: list[int] = []
        self._free: dict[int, set[int]] = {aligned(size): set() for size in sizes}  # size -> chunks with a free slab
        self._free_offsets: dict[int, list[int]] = {}
        self._used: dict[int, int] = {}

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all chunks."""
        return self._memory.nbytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the chunks that hold at least one slab."""
        return len(self._used) * self._chunk_bytes

    def slabs_in(self, chunk: int) -> int:
        """How many slabs of a chunk are taken."""
        return self._used.get(chunk, 0)

    def take(self, size: int) -> Slab | None:
        """A free slab of at least `size` bytes (one of the arena's sizes); None if there is none."""
        size = aligned(size)
        if not self._free[size] and not self._cut_chunk(size):
            return None
        chunk = next(iter(self._free[size]))
        offsets = self._free_offsets[chunk]
        slab = Slab(chunk, offsets.pop(), size)
        if not offsets:
            self._free[size].discard(chunk)
        self._used[chunk] = self._used.get(chunk, 0) + 1
        return slab

    def give(self, slab: Slab) -> None:
        """Put a slab back."""
        self._free_offsets[slab.chunk].append(slab.offset)
        self._free[slab.size].add(slab.chunk)
        self._used[slab.chunk] -= 1
        if self._used[slab.chunk] == 0:
            del self._used[slab.chunk], self._free_offsets[slab.chunk]
            self._free[slab.size].discard(slab.chunk)
            self._free_chunks.append(slab.chunk)

    def bytes_of(self, slab: Slab) -> Array:
        """The slab's memory, (size,) uint8."""
        start = slab.chunk * self._chunk_bytes + slab.offset
        return self._memory[start : start + slab.size]

    def _cut_chunk(self, size: int) -> bool:
        if self._free_chunks:
            chunk = self._free_chunks.pop()
        elif self._untouched < self._num_chunks:
            chunk, self._untouched = self._untouched, self._untouched + 1
        else:
            return False
        self._free_offsets[chunk] = list(range(0, self._chunk_bytes - size + 1, size))
        self._free[size].add(chunk)
        return True


def _anonymous(num_bytes: int) -> Bytes:
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT, at least one."""
    return max(-(-size // ALIGNMENT), 1) * ALIGNMENT
