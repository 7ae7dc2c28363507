"""Large pieces of page-locked memory, exactly as large as they are asked for, and given back when nobody has them.

Torch's own pinned memory is for what calls send: it locks the next power of two, twice the arena in the worst case, and
keeps what was freed for itself. Here the pages are the system's, and the driver locks them.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankd.engine.cuda.gpu_presence import DRIVER

PORTABLE, MAPPED = 1, 2  # CU_MEMHOSTREGISTER_PORTABLE and _DEVICEMAP: kernels read it at the addresses of the host
MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")
"""Of this container: its own files lie there."""


def locked_pages(num_bytes: int, open_driver: Callable[[str], Any] = ctypes.CDLL) -> Tensor:
    """(num_bytes,) uint8 of zeros, locked. The calling thread has to have a CUDA context.

    Raises:
        RuntimeError: this machine has no more, or the driver refuses.
    """
    if (left := available_bytes()) is not None and num_bytes > left:
        raise RuntimeError(f"{left >> 20} MiB of memory are available")  # asked for more, the system ends processes
    piece = (ctypes.c_uint8 * num_bytes).from_buffer(mmap.mmap(-1, num_bytes))
    address = ctypes.addressof(piece)
    said = open_driver(DRIVER).cuMemHostRegister_v2(
        ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_uint(PORTABLE | MAPPED)
    )
    if said != 0:
        raise RuntimeError(f"the driver says {said}")
    # Runs before the pages go. The runtime finds the context by itself, whichever thread this is.
    weakref.finalize(piece, unlock, address).atexit = False
    return torch.frombuffer(piece, dtype=torch.uint8)


def unlock(address: int) -> None:
    """Nobody has the piece any more."""
    torch.cuda.cudart().cudaHostUnregister(address)


def available_bytes() -> int | None:
    """What the system could give without ending anybody, the container's limit counted; None if it does not say."""
    found = [left for left in (_of_the_machine(), _of_the_container()) if left is not None]
    return min(found, default=None)


def _of_the_machine() -> int | None:
    try:
        lines = MEMORY.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _of_the_container() -> int | None:
    try:
        most, used = ((GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return max(int(most) - int(used), 0) if most != "max" else None
