"""Signals end a benchmark through its exits, also after a library has left the thread without a stack for signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from rankd.bench.ended_in_order import ended_in_order

LEFT_WITHOUT_STACK = """
import ctypes, os, signal
from rankd.bench.ended_in_order import ended_in_order, take_signals_again, _SignalStack

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
size = 1 << 16
memory = libc.mmap(None, ctypes.c_size_t(size), 3, 0x22, -1, ctypes.c_size_t(0))  # read and write; private, anonymous
assert libc.sigaltstack(ctypes.byref(_SignalStack(memory, 0, size)), None) == 0
assert libc.munmap(ctypes.c_void_p(memory), ctypes.c_size_t(size)) == 0
{call}
with ended_in_order():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        print("ended in order", flush=True)
"""


def test_sigterm_leaves_through_the_exits() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, ended_in_order():
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this trouble")
@pytest.mark.parametrize(("call", "code"), [("take_signals_again()", 143), ("", -signal.SIGSEGV)])
def test_a_stack_that_is_gone_is_not_used(call: str, code: int) -> None:
    script = LEFT_WITHOUT_STACK.format(call=call)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert (done.stdout == "ended in order\n") is (code == 143)
