"""A signal ends a program in order after its last model was closed, whatever a library did to the thread."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

UNMAPPED = """
import ctypes, os, signal
from contextlib import nullcontext
from rankd.engine.signal_stack import SignalStack, kept_signal_stack

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
size = 1 << 16
memory = libc.mmap(None, ctypes.c_size_t(size), 3, 0x22, -1, ctypes.c_size_t(0))  # read and write; private, anonymous
with {guard}:
    assert libc.sigaltstack(ctypes.byref(SignalStack(memory, 0, size)), None) == 0
assert libc.munmap(ctypes.c_void_p(memory), ctypes.c_size_t(size)) == 0
os.kill(os.getpid(), signal.SIGINT)
"""
A_RANKER = """
import os, signal, sys
from rankd import Ranker, RankRequest
with Ranker.load(sys.argv[1]) as ranker:
    ranker.rank(RankRequest("u", ("a",)))
del ranker
import gc; gc.collect()
os.kill(os.getpid(), signal.SIGINT)
"""


def code_of(script: str, *arguments: str) -> int:
    """The exit status; a KeyboardInterrupt that nobody catches is the signal's."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=False)
    return done.returncode


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this trouble")
@pytest.mark.parametrize(
    ("guard", "code"), [("kept_signal_stack()", -signal.SIGINT), ("nullcontext()", -signal.SIGSEGV)]
)
def test_a_stack_that_is_gone_is_not_used(guard: str, code: int) -> None:
    assert code_of(UNMAPPED.format(guard=guard)) == code


def test_a_program_can_be_interrupted_after_its_last_ranker(demo_models: Path) -> None:
    assert code_of(A_RANKER, str(demo_models / "demo")) == -signal.SIGINT
