"""`python -m rankd.deploy.leashed PARENT ...` is `rankd ...` that is killed when the process PARENT ends.

The kernel counts the thread of PARENT that started this one: it has to stay as long as this is to run.

So no shard outlives its supervisor: neither a supervisor that is killed nor a process that hangs leaves one behind that
nobody knows of. Only Linux has this; elsewhere the command runs as ever.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def hold_to(parent: int) -> None:
    """End with `parent`, also if it has ended already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which started this one, has ended")


def main() -> None:
    """Run the command line."""
    hold_to(int(sys.argv.pop(1)))
    runpy.run_module("rankd", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
