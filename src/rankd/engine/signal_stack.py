"""Keeping a thread's stack for signals as it was while a library is called that puts another one there.

OpenVINO 2026.4 gives the thread that compiles a stack of its own for signals (AMX needs a large one), and unmaps it
with its last model while the thread still has it: the next signal that Python handles is a segmentation fault.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class SignalStack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """After the block this thread's stack for signals (or that it has none) is what it was before; Linux alone."""
    if sys.platform != "linux":
        yield
        return
    before, libc = SignalStack(), ctypes.CDLL(None)
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
