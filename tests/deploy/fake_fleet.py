"""Processes that are only written down, and all that can go wrong with them."""

from __future__ import annotations

from collections.abc import Collection

from rankd.deploy.deployment_record import DeploymentRecord, Wanted
from rankd.deploy.process_report import ProcessReport, ProcessState, Reports
from rankd.deploy.roles import ServerRole
from rankd.errors import Unavailable
from rankd.shards.placement_file import Placement

NODES = ("n1", "n2")


class FakeFleet:
    """A `Fleet`. It notes what is done in `events`, and in `lost` each process that was ended or is away while a
    ranking server still asked it."""

    def __init__(self) -> None:
        self.running: dict[str, Wanted] = {}
        self.addresses: dict[str, str] = {}
        self.told: dict[str, Placement] = {}
        self.used: dict[str, Placement] = {}  # what ranking servers go by: what they were told, one report later
        self.nodes_of: dict[str, str] = {}
        self.events: list[str] = []
        self.lost: list[str] = []
        self.saved: DeploymentRecord | None = None
        self.room = 1000
        self.starts = True  # whether processes that are started come up
        self.stubborn: set[str] = set()  # ranking servers that do not go over
        self.deaf: set[str] = set()  # ranking servers that are not told
        self._ports = 0

    def save(self, record: DeploymentRecord) -> None:
        self.saved = record

    def names(self) -> set[str]:
        return set(self.running)

    def nodes(self) -> dict[str, str]:
        return {node: f"at-{node}" for node in NODES}

    def start(self, wanted: Collection[Wanted]) -> None:
        if len(self.running) + len(wanted) > self.room:
            raise Unavailable("no room")
        for one in wanted:
            self.events.append(f"start {one.name}")
            self.running[one.name] = one
            taken = [self.nodes_of.get(name) for name in one.apart_from]
            free = [node for node in NODES if node not in one.avoid]
            self.nodes_of[one.name] = min(free, key=taken.count)
            self.move(one.name)
            if isinstance(one.role, ServerRole):
                self.told[one.name] = one.role.placement
                if one.name not in self.stubborn:
                    self.used[one.name] = one.role.placement

    def reports(self, names: Collection[str]) -> Reports:
        return {name: self._report(name) for name in names if name in self.running}

    def tell(self, names: Collection[str], placement: Placement) -> None:
        for name in names:
            if name in self.running and name not in self.deaf:
                self.events.append(f"tell {name}")
                self.told[name] = placement

    def stop(self, names: Collection[str], drain_seconds: float) -> None:
        for name in names:
            self.events.append(f"stop {name}")
            self.told.pop(name, None)
            self.used.pop(name, None)
            self.running.pop(name, None)
            address = self.addresses.pop(name, "")
            if address in {asked for placement in self.used.values() for shard in placement.shards for asked in shard}:
                self.lost.append(name)

    def move(self, name: str) -> None:
        """Give a process another address, as if its node had ended and Ray had moved it."""
        self._ports += 1
        self.addresses[name] = f"10.0.0.1:{self._ports}"

    def lose(self, name: str) -> None:
        """Let a process be gone, as if somebody had ended its agent."""
        del self.running[name]
        self.told.pop(name, None)
        self.used.pop(name, None)

    def _report(self, name: str) -> tuple[ProcessReport, int]:
        told = self.told[name].generation if name in self.told else 0
        used = self.used[name].generation if name in self.used else 0
        if name in self.told and name not in self.stubborn:
            self.used[name] = self.told[name]
        state, trouble = (ProcessState.UP, "") if self.starts else (ProcessState.STARTING, "broken")
        node = self.nodes_of[name]
        return ProcessReport(state, self.addresses[name], 1, node, generation=used, trouble=trouble), told
