"""Which executor's thread runs on which cpus: decided once from the machine's `Topology`, logged, then applied.

In: a Topology and how many executors and threads are wanted. Out: a `ThreadPlan`. Next: `backend.py` makes it from a
configuration, and the threads of `schedule/scheduler.py` apply it to themselves.

The rules:

- Nothing is pinned on a machine with one NUMA node whose cpus this process may all use: the kernel does that better.
- A quota of cpu time is bound to no cpu, so alone it pins nothing. It limits how many executors there are by default:
  the allowed physical cores, at most the quota rounded down, at least one.
- Otherwise (several nodes, or a cpuset narrower than the machine) executors get allowed cpus alone. They are dealt over
  the nodes in proportion to the nodes' allowed cores: the next one goes where, with it, an executor has the most cores,
  to the lower node of equals.
- The executors of a node divide its cores: each has cores of its own with all their allowed cpus, and at least as many
  as it has threads. Where there are too few they take turns: each has as many cores as threads, and no core serves two
  executors more than another one does.
- An executor with more threads than a node has cores gets the node as a whole, if that has a cpu for each thread. Nodes
  too small are passed over as long as one is large enough. If none is, an executor gets whole nodes, the next one those
  after them, until there is a cpu for each thread or no node is left.

Example, two nodes of four cores with two cpus each (node 0: cpus 0-3 and their siblings 8-11; node 1: 4-7 and 12-15),
three executors of one thread: executor 0 has cpus 0-1,8-9; executor 1 has 4-7,12-15; executor 2 has 2-3,10-11.

The plan is for the executors' own threads. A thread that a pinned one starts inherits its cpus; one that an engine
starts elsewhere does not: each backend's module says what that means for it. Two models of a process, or two servers
without cpusets of their own, make the same plan and share cores executor by executor; `engine.pinning = "off"` is there
for them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rankd.engine.topology import Core, Topology, cpus_text

Cpus = frozenset[int]
log = logging.getLogger("rankd")
_said: set[Cpus] = set()  # what `pin` has complained of


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """For each executor its cpus, and all allowed cpus of the node or nodes these belong to; None: not pinned."""

    cpus: tuple[Cpus | None, ...]
    nodes: tuple[Cpus | None, ...]
    reason: str

    @property
    def num_executors(self) -> int:
        """How many executors the plan is for."""
        return len(self.cpus)

    def part(self, first: int, count: int) -> ThreadPlan:
        """That of `count` of its executors, from `first` on."""
        return replace(self, cpus=self.cpus[first : first + count], nodes=self.nodes[first : first + count])

    def by_node(self) -> ThreadPlan:
        """The same with each executor anywhere on its node or nodes."""
        return replace(self, cpus=self.nodes)

    def describe(self) -> str:
        """One paragraph for the log at start."""
        executors_on: dict[Cpus, list[str]] = {}
        for number, cpus in enumerate(self.cpus):
            if cpus is not None:
                executors_on.setdefault(cpus, []).append(str(number))
        if not executors_on:
            return f"engine threads: nothing pinned: {self.reason}"
        pinned = [f"{','.join(numbers)} on cpus {cpus_text(cpus)}" for cpus, numbers in executors_on.items()]
        return f"engine threads: {self.reason}: executors {'; '.join(pinned)}"


def unpinned(executors: int, reason: str) -> ThreadPlan:
    """The plan that leaves all threads to the kernel."""
    return ThreadPlan((None,) * executors, (None,) * executors, reason)


def default_executors(topology: Topology) -> int:
    """How many requests are computed at once where nobody says: allowed physical cores within the quota, at least 1."""
    cores, quota = len(topology.allowed_cores), topology.quota_cpus
    return max(1, cores if quota is None else min(cores, int(quota)))


def plan(topology: Topology, executors: int, threads: int) -> ThreadPlan:
    """The cpus of `executors` executors of `threads` threads each; 0 executors: as many as `default_executors`."""
    executors = executors or default_executors(topology)
    quota = "" if topology.quota_cpus is None else f", a quota of {topology.quota_cpus:g} cpus"
    if topology.num_nodes < 2 and not topology.narrowed:
        return unpinned(executors, f"one NUMA node, no cpuset{quota}")
    nodes: dict[int, list[Core]] = {}
    for core in topology.allowed_cores:
        nodes.setdefault(core.node, []).append(core)
    large = {node: cores for node, cores in nodes.items() if len(_cpus_of(cores)) >= threads}
    placed = _within_nodes(large, executors, threads) if large else _over_nodes(nodes, executors, threads)
    num_cpus = sum(len(core.cpus) for core in topology.cores)
    where = "one NUMA node" if topology.num_nodes == 1 else f"{topology.num_nodes} NUMA nodes"
    reason = f"{where}, {len(topology.allowed)} of {num_cpus} cpus allowed{quota}"
    return ThreadPlan(tuple(cpus for cpus, _ in placed), tuple(node for _, node in placed), reason)


def apply(threads: ThreadPlan, executor: int) -> None:
    """Pin the calling thread, and none else, as the plan says for an executor; see `pin`."""
    cpus = threads.cpus[executor]
    if cpus is not None:
        pin(cpus)


def pin(cpus: Cpus) -> None:
    """Bind the calling thread to cpus, on Linux; elsewhere nothing happens.

    Cpus that this process may no longer use (they went offline, or its cpuset has changed) are left out; if no other is
    left the thread stays as it is, which is logged once.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        if cpus not in _said:
            _said.add(cpus)
            log.warning("threads stay unpinned, cpus %s are not to be had: %s", cpus_text(cpus), error)


def _within_nodes(nodes: Mapping[int, Sequence[Core]], executors: int, threads: int) -> list[tuple[Cpus, Cpus]]:
    """Executors dealt over nodes that are large enough for one: for each its cpus, and those of its node."""
    dealt: dict[int, list[int]] = {node: [] for node in nodes}
    for executor in range(executors):
        node = max(nodes, key=lambda node: (len(nodes[node]) / (len(dealt[node]) + 1), -node))
        dealt[node].append(executor)
    placed: dict[int, tuple[Cpus, Cpus]] = {}
    for node, here in dealt.items():
        whole, parts = _cpus_of(nodes[node]), _divided(nodes[node], len(here), threads)
        placed |= {executor: (cpus, whole) for executor, cpus in zip(here, parts, strict=True)}
    return [placed[executor] for executor in range(executors)]


def _divided(cores: Sequence[Core], executors: int, threads: int) -> list[Cpus]:
    """The cores of one node for its executors: parts of it where they suffice, turns where they do not."""
    num = len(cores)
    if executors * threads <= num:
        return [_cpus_of(cores[num * i // executors : num * (i + 1) // executors]) for i in range(executors)]
    width = min(threads, num)
    return [_cpus_of([cores[(i * width + k) % num] for k in range(width)]) for i in range(executors)]


def _over_nodes(nodes: Mapping[int, Sequence[Core]], executors: int, threads: int) -> list[tuple[Cpus, Cpus]]:
    """Whole nodes for executors that need more than one, each beginning where the one before ended."""
    wholes = [_cpus_of(cores) for cores in nodes.values()]
    placed, start = [], 0
    for _ in range(executors):
        cpus, taken = frozenset[int](), 0
        while taken < len(wholes) and len(cpus) < threads:
            cpus |= wholes[(start + taken) % len(wholes)]
            taken += 1
        placed.append((cpus, cpus))
        start += taken
    return placed


def _cpus_of(cores: Sequence[Core]) -> Cpus:
    return frozenset(cpu for core in cores for cpu in core.cpus)
