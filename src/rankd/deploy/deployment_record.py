"""What is to run: the one document of a deployment. Whatever runs and is not in it is ended; what is in it and does not
run is started.

It is kept beside Ray's list of actors, so that it is there as long as they are, whichever node the controller is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from rankd.deploy.deployment import Deployment
from rankd.deploy.roles import Role, ServerRole, ShardRole
from rankd.plan.byte_sizes import read_bytes
from rankd.plan.plan_file import PlanFile
from rankd.shards.placement_file import Placement

SERVER = "server-"
"""How the names of ranking servers begin."""


def is_server(name: str) -> bool:
    """Whether a process of that name is a ranking server."""
    return name.startswith(SERVER)


class Process(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process by its name, which no other ever had. `shard`: its number in the plan; None: a ranking server."""

    name: str
    shard: int | None


class Needs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a process reserves on its node."""

    cpus: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A process to be started. Not on the nodes `avoid`; and on another node than the processes `apart_from` if that
    can be."""

    name: str
    role: Role
    needs: Needs
    avoid: frozenset[str]
    apart_from: tuple[str, ...]


class DeploymentRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`plan` is the one in use; `generation` counts placements, `named` the processes so far; `addresses` are those of
    the newest placement, by process."""

    deployment: Deployment
    plan: PlanFile
    generation: int = 1
    named: int = 0
    processes: tuple[Process, ...] = ()
    addresses: dict[str, str] = {}

    @property
    def shards(self) -> tuple[Process, ...]:
        """The processes that are shards."""
        return tuple(process for process in self.processes if process.shard is not None)

    @property
    def servers(self) -> tuple[Process, ...]:
        """The processes that are ranking servers."""
        return tuple(process for process in self.processes if process.shard is None)

    def placement(self) -> Placement:
        """Where the shards are, for ranking servers."""
        numbers = range(len(self.plan.plan.shards))
        known = [(one.shard, self.addresses[one.name]) for one in self.shards if one.name in self.addresses]
        shards = tuple(tuple(address for shard, address in known if shard == number) for number in numbers)
        return Placement(self.generation, self.plan, shards)

    @property
    def complete(self) -> bool:
        """Whether there is an address of each shard."""
        return all(self.placement().shards)

    def role(self, process: Process) -> Role:
        """What a process is to be."""
        wanted = self.deployment
        if process.shard is None:
            needs = wanted.server
            return ServerRole(wanted.models, needs.config, wanted.security, needs.ports, self.placement())
        shard = wanted.shard
        return ShardRole(
            self.plan, process.shard, wanted.tables, shard.workers, shard.config, wanted.security, shard.ports
        )

    def needs(self, process: Process) -> Needs:
        """What a process reserves: a shard also its tables."""
        wanted = self.deployment
        if process.shard is None:
            return Needs(wanted.server.cpus, read_bytes(wanted.server.memory))
        tables = self.plan.plan.shard_bytes[process.shard]
        return Needs(wanted.shard.cpus, read_bytes(wanted.shard.memory) + tables)

    def wanted(self, process: Process, others: tuple[Process, ...], avoid: frozenset[str]) -> Wanted:
        """A process as it is to be started; `others` are those that there will be, replicas of it among them."""
        replicas = tuple(one.name for one in others if one.shard == process.shard and one.name != process.name)
        return Wanted(process.name, self.role(process), self.needs(process), avoid, replicas)

    def with_names(self, kinds: Sequence[int | None]) -> tuple[DeploymentRecord, tuple[Process, ...]]:
        """New processes, and the record that has given their names away; it does not have them to run yet."""
        made = tuple(
            Process(f"{SERVER if kind is None else f'shard-{kind}-'}{self.named + number}", kind)
            for number, kind in enumerate(kinds, 1)
        )
        return replace(self, named=self.named + len(made)), made
