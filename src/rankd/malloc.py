"""Memory that a server gives back and soon needs again stays with it, where the C library is glibc.

By itself glibc hands a few megabytes that a request has used back to the system, and the next request pays for them
anew: zeroed pages, one interrupt each. A call of shards with an answer of 3.6 MB takes a fifth less of its client's CPU
without that (docs/log.md).
"""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
MIB = 1 << 20
MAPPED_FROM_BYTES = 32 * MIB
"""The most that glibc allows. What is as large is given back as soon as it is freed, as ever."""
KEPT_BYTES = 256 * MIB
"""At the end of a heap, free: more is given back."""


def keep_freed() -> bool:
    """Let this process keep what it frees, up to KEPT_BYTES in each of its heaps; whether it does."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or another system
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
