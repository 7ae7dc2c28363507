"""What the machine says about itself: NUMA nodes, physical cores, and the cpus and the time that this process may use.

In: the files of Linux under /sys, /proc and /sys/fs/cgroup. Out: a `Topology`. Next: `thread_plan.py`.

Nothing here fails: what a machine does not say is taken to be plain. No nodes: one node; no siblings: every cpu is a
core; no list of cpus: the machine is what the process may use; no quota: none. So it is everywhere but on Linux.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CPUS = "sys/devices/system/cpu"
NODES = "sys/devices/system/node"
CGROUPS = "sys/fs/cgroup"


@dataclass(frozen=True, slots=True)
class Core:
    """A physical core: its NUMA node and the cpus (hardware threads) it has."""

    node: int
    cpus: frozenset[int]


@dataclass(frozen=True, slots=True)
class Topology:
    """The cores of the machine, by node and then by first cpu, and what of them this process may use.

    `allowed` are cpus that are online and in the process's affinity mask, which a cgroup's cpuset, `taskset` and
    `numactl` narrow. `quota_cpus` is the time that the process's cgroups grant, in cpus; None: as much as there is.
    """

    cores: tuple[Core, ...]
    allowed: frozenset[int]
    quota_cpus: float | None = None

    @property
    def allowed_cores(self) -> tuple[Core, ...]:
        """Cores of which the process may use a cpu, with those cpus alone."""
        usable = (Core(core.node, core.cpus & self.allowed) for core in self.cores)
        return tuple(core for core in usable if core.cpus)

    @property
    def num_nodes(self) -> int:
        """NUMA nodes that have cpus; nodes of memory alone do not count."""
        return len({core.node for core in self.cores})

    @property
    def narrowed(self) -> bool:
        """Whether there are cpus on this machine that the process may not use."""
        return any(core.cpus - self.allowed for core in self.cores)


def read_topology(root: Path = Path("/")) -> Topology:
    """The machine whose files lie under `root`."""
    online = parse_cpus(_text(root / CPUS / "online"))
    allowed = _allowed(root)
    online, allowed = online or allowed, allowed & online if online else allowed
    node_of = _node_of(root, online)
    cores: dict[tuple[int, int], set[int]] = {}
    for cpu in sorted(online):
        folder = root / CPUS / f"cpu{cpu}" / "topology"
        siblings = parse_cpus(_text(folder / "core_cpus_list") or _text(folder / "thread_siblings_list"))
        first = min((one for one in siblings & online if node_of[one] == node_of[cpu]), default=cpu)
        cores.setdefault((node_of[cpu], first), set()).add(cpu)
    listed = tuple(Core(node, frozenset(cpus)) for (node, _), cpus in sorted(cores.items()))
    return Topology(listed, allowed or online, quota_cpus(root))


def quota_cpus(root: Path = Path("/")) -> float | None:
    """The least that this process's cgroups, of version 1 or 2, and those above them grant, in cpus; None: no limit.

    A container often sees the path its cgroup has outside, where only the folder mounted as the root exists inside:
    a folder that is not there is passed over, and the root is always asked.
    """
    quotas = [quota for folder in _cgroup_folders(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def parse_cpus(text: str) -> frozenset[int]:
    """A list as the kernel writes it, "0-3,8,10-11"; empty where it is no such list."""
    cpus: set[int] = set()
    try:
        for part in filter(None, text.strip().split(",")):
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    except ValueError:
        return frozenset()
    return frozenset(cpus)


def cpus_text(cpus: frozenset[int]) -> str:
    """A list as the kernel writes it; the inverse of `parse_cpus`."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and parts[-1][-1] == cpu - 1:
            parts[-1][1:] = [cpu]
        else:
            parts.append([cpu])
    return ",".join("-".join(map(str, part)) for part in parts)


def _allowed(root: Path) -> frozenset[int]:
    """Cpus of the process's first thread, which is never pinned here, whichever thread asks."""
    for line in _text(root / "proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == "Cpus_allowed_list":
            return parse_cpus(value)
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(os.getpid()))
    return frozenset(range(os.cpu_count() or 1))


def _node_of(root: Path, online: frozenset[int]) -> Mapping[int, int]:
    """The node of each cpu. Node 0 for all where the nodes' lists do not name every cpu once."""
    nodes: dict[int, int] = {}
    listed = 0
    for folder in (root / NODES).glob("node[0-9]*"):
        cpus = parse_cpus(_text(folder / "cpulist")) & online
        listed += len(cpus)
        nodes.update(dict.fromkeys(cpus, int(folder.name.removeprefix("node"))))
    return nodes if len(nodes) == listed == len(online) else dict.fromkeys(online, 0)


def _cgroup_folders(root: Path) -> Iterator[Path]:
    """Folders of the cgroups that may limit the cpu time of this process: its own and all above, for each hierarchy."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mounts = [root / CGROUPS, root / CGROUPS / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / CGROUPS / controllers, root / CGROUPS / "cpu"]
        else:
            continue
        own = PurePosixPath(path.removeprefix("/"))
        if ".." in own.parts:  # a cgroup outside of what is mounted here
            own = PurePosixPath()
        for mount in mounts:
            yield from (mount / part for part in (own, *own.parents))


def _quota_of(folder: Path) -> float | None:
    """`cpu.max` is "QUOTA PERIOD" or "max PERIOD" (version 2); version 1 has a file for each, -1 is no quota."""
    quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    try:
        cpus = int(quota) / int(period or 100_000)
    except (ValueError, ZeroDivisionError):
        return None
    return cpus if cpus > 0 and math.isfinite(cpus) else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
