"""Changes of a running deployment: each starts what is new beside what is old, goes over, and then ends the old.

In: what is wanted. Out: a record (`deployment_record.py`) that all processes follow. One change at a time; between
changes `follow` sees to it that what is in the record runs, and that ranking servers know where shards are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from msgspec.structs import replace

from rankd.deploy.deployment_record import DeploymentRecord, Process, Wanted, is_server
from rankd.deploy.deployment_status import DeploymentStatus, ProcessStatus
from rankd.deploy.process_report import ProcessState, Reports
from rankd.errors import ConfigError, NotFound, Unavailable, nearest
from rankd.plan.plan_file import PlanFile
from rankd.shards.placement_file import Placement
from rankd.shards.planned_shards import identity

LOOK_S = 0.2
"""Between two looks at all processes while a change waits for them."""
TURN_S = 10.0
"""How long a change waits for another one to end."""


class Fleet(Protocol):
    """Whoever starts and ends processes; `ray_fleet.RayFleet`."""

    def save(self, record: DeploymentRecord) -> None:
        """Keep a record."""

    def names(self) -> set[str]:
        """Processes that were started and not ended."""
        ...

    def nodes(self) -> Mapping[str, str]:
        """The addresses of all nodes, by their ids."""
        ...

    def start(self, wanted: Collection[Wanted]) -> None:
        """Start processes, all or none.

        Raises:
            Unavailable: there is no room.
        """

    def reports(self, names: Collection[str]) -> Reports:
        """How processes are, by name; those that nothing is known of are left out."""
        ...

    def tell(self, names: Collection[str], placement: Placement) -> None:
        """Tell ranking servers where shards are."""

    def stop(self, names: Collection[str], drain_seconds: float) -> None:
        """End processes, with time to finish."""


class Controller:
    """One deployment. Thread-safe."""

    def __init__(self, record: DeploymentRecord, fleet: Fleet) -> None:
        self._record, self._fleet = record, fleet
        self._changes = threading.Lock()
        self._change = ""

    def up(self) -> None:
        """Start everything.

        Raises:
            Unavailable: there is no room, or a process did not come up in time; nothing is left running.
        """
        with self._changing("up"):
            wanted = self._record.deployment
            try:
                shards = self._start(self._shard_numbers(wanted.replicas))
                self._go_over(shards, shards)
                servers = self._start([None] * wanted.servers)
                self._go_over((*shards, *servers), servers)
            except BaseException:
                self._end_everything()
                raise

    def apply(self, plan: PlanFile) -> None:
        """Go over to another plan of the same tables.

        Raises:
            ConfigError: it is of other tables. Unavailable: as `up`, or a ranking server does not go over; then all is
            as it was.
        """
        with self._changing("apply"):
            before = self._record
            if plan.plan.specs != before.plan.plan.specs:
                raise ConfigError(
                    f"plan {identity(plan)} is of other tables than {identity(before.plan)}, which is in use; plan "
                    "again for the tables of this deployment"
                )
            following = replace(before, plan=plan)
            numbers = [n for n in range(len(plan.plan.shards)) for _ in range(before.deployment.replicas)]
            new = self._start(numbers, following)
            self._go_over((*new, *before.servers), new, plan)
            self._end(_names(before.shards))

    def scale(self, replicas: int | None = None, servers: int | None = None) -> None:
        """Have so many processes for each shard, and so many ranking servers; None leaves them as they are.

        Raises:
            Unavailable: as `apply`.
        """
        with self._changing("scale"):
            before = self._record
            wanted = before.deployment
            wanted = replace(wanted, replicas=replicas or wanted.replicas)
            wanted = replace(wanted, servers=wanted.servers if servers is None else servers)
            have: dict[int | None, list[Process]] = {kind: [] for kind in (None, *self._shard_numbers(1))}
            for one in before.processes:
                have[one.shard].append(one)
            most = {kind: wanted.servers if kind is None else wanted.replicas for kind in have}
            new = self._start([kind for kind, own in have.items() for _ in range(most[kind] - len(own))])
            leaving = [one for kind, own in have.items() for one in own[most[kind] :]]
            self._go_over((*(one for one in before.processes if one not in leaving), *new), new)
            self._adopt(replace(self._record, deployment=wanted))
            self._end(_names(leaving))

    def drain(self, names: Sequence[str], node: str = "") -> None:
        """Start others in place of these processes, and of all on a node (its address or the first digits of its id;
        elsewhere), then end them.

        Raises:
            NotFound: no such process or node. Unavailable: as `apply`.
        """
        with self._changing("drain"):
            node = self._node(node) if node else ""
            leaving = self._leaving(names, node)
            new = self._start([one.shard for one in leaving], avoid=frozenset({node} if node else ()))
            staying = [one for one in self._record.processes if one not in leaving]
            self._go_over((*staying, *new), new)
            self._end(_names(leaving))

    def down(self) -> None:
        """End everything: ranking servers first, so that none misses its shards."""
        with self._changing("down"):
            self._end_everything()

    def status(self) -> DeploymentStatus:
        """What runs, also while something changes."""
        record = self._record
        reports = self._fleet.reports(_names(record.processes))
        processes = tuple(
            ProcessStatus(one.name, one.shard, reports[one.name][0] if one.name in reports else None)
            for one in record.processes
        )
        return DeploymentStatus(
            record.deployment.name, identity(record.plan), record.generation, self._change, processes
        )

    def follow(self) -> None:
        """What is to be done between changes; nothing while one is under way, which does it itself.

        Raises:
            Unavailable: there is no room for a process that has to be started.
        """
        if not self._changes.acquire(blocking=False):
            return
        try:
            record, started = self._record, self._fleet.names()
            expected = {one.name: one for one in record.processes}
            if lost := [one for name, one in expected.items() if name not in started]:
                self._fleet.start([record.wanted(one, record.processes, frozenset()) for one in lost])
            reports = self._fleet.reports(list(expected))
            self._follow_addresses(reports)
            left = started - set(expected)
            if left and not self._behind(reports):  # else a ranking server may still ask them
                self._end(left)
        finally:
            self._changes.release()

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        if not self._changes.acquire(timeout=TURN_S):
            raise Unavailable(
                f"`{self._change or 'a restart'}` is under way; try again when `rankd deploy status` shows that it is "
                "over"
            )
        self._change = what
        try:
            yield
        finally:
            self._change = ""
            self._changes.release()

    def _shard_numbers(self, replicas: int) -> list[int | None]:
        return [number for number in range(len(self._record.plan.plan.shards)) for _ in range(replicas)]

    def _leaving(self, names: Sequence[str], node: str) -> list[Process]:
        processes = {one.name: one for one in self._record.processes}
        for name in names:
            if name not in processes:
                raise NotFound(f"no process '{name}' here; there are {', '.join(processes)}.{nearest(name, processes)}")
        reports = self._fleet.reports(list(processes)) if node else {}
        there = {name for name, (report, _) in reports.items() if report.node == node}
        return [one for name, one in processes.items() if name in there or name in names]

    def _node(self, given: str) -> str:
        """The id of a node, of which its address or the first digits of its id were given."""
        nodes = self._fleet.nodes()
        found = [node for node, address in nodes.items() if given == address or node.startswith(given)]
        if len(found) != 1:
            shown = ", ".join(f"{node[:8]} at {address}" for node, address in sorted(nodes.items()))
            raise NotFound(f"'{given}' are {len(found)} nodes; there are {shown}: name one of them")
        return found[0]

    def _start(
        self,
        kinds: Sequence[int | None],
        following: DeploymentRecord | None = None,
        avoid: frozenset[str] = frozenset(),
    ) -> tuple[Process, ...]:
        """Processes of these kinds, up, and not in the record yet; `following` is the record that they will be of."""
        named, new = self._record.with_names(kinds)
        self._adopt(named)
        record = following or named
        others = new if following else (*named.processes, *new)
        try:
            self._fleet.start([record.wanted(one, others, avoid) for one in new])
            self._until(lambda reports: _not_up(_names(new), reports), _names(new))
        except BaseException:
            self._end(_names(new))
            raise
        return new

    def _go_over(self, processes: Sequence[Process], new: Sequence[Process] = (), plan: PlanFile | None = None) -> None:
        """Let the record have these processes, and wait until no ranking server asks others; else all is as before,
        and `new` are ended."""
        before = self._record
        after = replace(before, processes=tuple(processes), plan=plan or before.plan)
        if after.shards != before.shards:
            after = replace(after, generation=before.generation + 1, addresses=self._addresses(after))
        self._adopt(after)
        try:
            self._until(lambda reports: self._said(self._behind(reports)))
        except BaseException:
            self._go_back(before)
            self._end(_names(new))
            raise

    def _go_back(self, before: DeploymentRecord) -> None:
        """Let all be as before, and wait until no ranking server that had gone over asks new processes any more."""
        reports = self._fleet.reports(_names(self._record.servers))
        over = set(reports) - set(self._behind(reports))
        self._adopt(replace(before, generation=self._record.generation + 1))
        with suppress(Unavailable):
            self._until(lambda reports: self._said([name for name in self._behind(reports) if name in over]))

    def _behind(self, reports: Reports) -> list[str]:
        """Ranking servers that still ask where shards were, or may: also one that does not report."""
        wanted = self._record.generation
        servers = _names(self._record.servers)
        return [name for name in servers if name not in reports or reports[name][0].generation < wanted]

    def _said(self, behind: Sequence[str]) -> str:
        """Why a change has to wait for these."""
        if not behind:
            return ""
        return (
            f"{', '.join(behind)} did not go over to placement {self._record.generation}; does it serve a model with "
            "these tables, and what does its log say?"
        )

    def _until(self, holds_not: Callable[[Reports], str], more: Sequence[str] = ()) -> None:
        """Until `holds_not` gives no reason any more, of reports of all processes and `more`.

        Raises:
            Unavailable: it still does when processes have had time to start.
        """
        within_s = self._record.deployment.watch.start_seconds
        until = time.monotonic() + within_s
        while True:
            reports = self._fleet.reports([*_names(self._record.processes), *more])
            self._follow_addresses(reports)
            reason = holds_not(reports)
            if not reason:
                return
            if time.monotonic() > until:
                raise Unavailable(f"after {within_s:g} s (watch.start_seconds): {reason}")
            time.sleep(LOOK_S)

    def _addresses(self, record: DeploymentRecord, reports: Reports | None = None) -> dict[str, str]:
        """Of its shards: as reported now, or as they were."""
        found = self._fleet.reports(_names(record.shards)) if reports is None else reports
        now = {name: report.address for name, (report, _) in found.items() if report.address}
        both = {**record.addresses, **now}
        return {one.name: both[one.name] for one in record.shards if one.name in both}

    def _follow_addresses(self, reports: Reports) -> None:
        """A shard that has moved is in the next placement; a ranking server that was not told is told."""
        record = self._record
        addresses = self._addresses(record, reports)
        if addresses != record.addresses:
            self._adopt(replace(record, addresses=addresses, generation=record.generation + 1))
            return
        servers = _names(record.servers)
        behind = [name for name in servers if name in reports and reports[name][1] < record.generation]
        if behind and record.complete:
            self._fleet.tell(behind, record.placement())

    def _adopt(self, record: DeploymentRecord) -> None:
        """Let a record be what is to run; ranking servers are told if that changes anything for them."""
        told = self._record.generation == record.generation
        self._record = record
        self._fleet.save(record)
        if not told and record.complete:
            self._fleet.tell(_names(record.servers), record.placement())

    def _end_everything(self) -> None:
        """End all processes of the record, which has none first: else `follow` starts them again."""
        before = self._record
        self._adopt(replace(before, processes=()))
        self._end(_names(before.processes))

    def _end(self, names: Collection[str]) -> None:
        """End processes: ranking servers first, so that none misses its shards."""
        drain_seconds = self._record.deployment.watch.drain_seconds
        servers = sorted(name for name in names if is_server(name))
        for leaving in (servers, sorted(set(names) - set(servers))):
            if leaving:
                self._fleet.stop(leaving, drain_seconds)


def _names(processes: Sequence[Process]) -> list[str]:
    return [one.name for one in processes]


def _not_up(names: Collection[str], reports: Reports) -> str:
    """Which of these is not up, and why."""
    for name in names:
        if name not in reports:
            return f"{name} was not started by Ray"
        report = reports[name][0]
        if report.state is not ProcessState.UP:
            return f"{name} is {report.state.value} at {report.address} ({report.trouble or 'no answer yet'})"
    return ""
