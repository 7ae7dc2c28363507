"""Memory that is freed and needed again: counted in pages that the system had to give."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from rankd import malloc

REQUESTS = """
import resource
import numpy as np
from rankd.malloc import keep_freed

if {keep}:
    assert keep_freed()
for _ in range(60):
    for array in [np.empty(3 << 20, np.uint8) for _ in range(4)]:
        array.fill(1)
    del array
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def pages_given(keep: bool) -> int:
    command = [sys.executable, "-c", REQUESTS.format(keep=keep)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has its own ways")
def test_what_a_request_has_freed_is_there_for_the_next() -> None:
    """60 requests of 12 MiB: 3,072 pages each, given once or each time."""
    given, kept = pages_given(keep=False), pages_given(keep=True)
    assert given - kept > 30 * 3072


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        pass

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Other())
    assert malloc.keep_freed() is False
