"""Signals that end a benchmark end its processes too: SIGTERM becomes an exception, as SIGINT is one."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SS_DISABLE = 2


class _SignalStack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM raises SystemExit in the main thread while this is open; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def take_signals_again() -> None:
    """To be called where OpenVINO was used in this thread and no model is open any more.

    OpenVINO 2026.4 gives the thread that compiles a stack of its own for signals (AMX needs a large one), and unmaps it
    with its last model while the thread still has it: the next signal that Python handles is a segmentation fault.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(ctypes.byref(_SignalStack(None, SS_DISABLE, 0)), None)
