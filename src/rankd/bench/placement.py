"""Where processes of a benchmark run, and what they have used of the machine.

A feature store is another machine in production. Here it shares one with the server, so where there are two cpus or
more the server gets one for itself, and everything else (store, network, load generator) has to do with the others.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

Cpus = frozenset[int]


@dataclass(frozen=True, slots=True)
class Placement:
    """The cpus of the server and those of everybody else; None where nobody can be told, or there is only one."""

    server: Cpus | None
    others: Cpus | None

    def describe(self) -> str:
        """For the report."""
        if self.server is None or self.others is None:
            return "server, store and load generator share all cpus"
        return f"server on cpu {_text(self.server)}; store, network and load generator on {_text(self.others)}"


def placement() -> Placement:
    """The last of the allowed cpus for the server: interrupts tend to come to the first."""
    if sys.platform != "linux":
        return Placement(None, None)
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return Placement(None, None)
    return Placement(frozenset(cpus[-1:]), frozenset(cpus[:-1]))


@contextmanager
def on_cpus(cpus: Cpus | None) -> Iterator[None]:
    """Bind this thread, and with it the processes that it starts meanwhile, to cpus; None binds nothing."""
    if cpus is None or sys.platform != "linux":
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and of all its threads, user and system; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0.0
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the number of its clock: clock_getcpuclockid(3)
    except OSError:
        return 0.0


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in use now; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_of_all(pid: int) -> int:
    """Memory in use now of a process and of those that it has started, what they share counted once; 0 where the system
    does not say."""
    kilobytes = 0
    for one in (pid, *_children(pid)):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kilobytes << 10


def _children(pid: int) -> list[int]:
    try:
        lists = [(thread / "children").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    return [int(child) for one in lists for child in one.split()]


def _text(cpus: Cpus) -> str:
    return ",".join(map(str, sorted(cpus)))
