"""Memory on huge pages for the peers, so that look-ups are compared and not pages."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

from rankd.types import Array

_HUGE_BYTES = 1 << 21


def huge_memory(size_bytes: int) -> Array:
    """(size_bytes,) uint8, zeros, at the beginning of a huge page where the machine has them."""
    region = mmap.mmap(-1, size_bytes + _HUGE_BYTES)
    with contextlib.suppress(AttributeError, OSError):  # this system has none
        region.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(region, np.uint8)
    return whole[-whole.ctypes.data % _HUGE_BYTES :][:size_bytes]
